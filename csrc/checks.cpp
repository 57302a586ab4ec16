#include "checks.h"

#include <ATen/MemoryOverlap.h>

#include "tensors.h"

namespace bnext {
namespace {

bool is_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

void check_device(at::Device device, const at::Tensor& other, const char* name) {
  TORCH_CHECK(
      other.device() == device, name, " must be on device ", device,
      " like the other arguments, but its device is ", other.device());
}

void check_strided(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.defined(), name, " must be a defined tensor");
  TORCH_CHECK(
      tensor.layout() == at::kStrided, name, " must be a dense (strided) tensor, got layout ",
      tensor.layout());
}

void check_matrix(
    const at::Tensor& tensor,
    const char* name,
    const c10::SymInt& rows,
    const c10::SymInt& columns,
    at::ScalarType dtype) {
  check_strided(tensor, name);
  TORCH_CHECK(
      tensor.scalar_type() == dtype, name, " must have dtype ", dtype, ", got dtype ",
      tensor.scalar_type());
  TORCH_CHECK(
      tensor.dim() == 2 && tensor.sym_size(0) == rows && tensor.sym_size(1) == columns, name,
      " must have shape [", rows, ", ", columns, "], got shape ", tensor.sym_sizes());
}

void check_count(const at::Tensor& count, const c10::SymInt& size) {
  check_strided(count, "count");
  TORCH_CHECK(
      count.scalar_type() == at::kLong, "count must have dtype Long, got dtype ",
      count.scalar_type());
  TORCH_CHECK(
      count.dim() == 1 && count.sym_size(0) == size, "count must have shape [", size,
      "], got shape ", count.sym_sizes());
}

void check_writable(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(
      !tensor.requires_grad(), name,
      " must not require grad: it is updated in place and never differentiated");
  TORCH_CHECK(
      at::has_internal_overlap(tensor) != at::MemOverlap::Yes, name,
      " must not be an expanded tensor: several of its elements share one memory location");
}

Activation parse_activation(OptionalString name) {
  if (!name.has_value()) {
    return Activation::kNone;
  }
  const auto activation = Activations::find(*name);
  TORCH_CHECK_VALUE(
      activation.has_value(), "activation must be one of ", Activations::names(), ", got '", *name,
      "'");
  return *activation;
}

// A symbolic size is taken to be large enough, without a guard on it: the kernel checks the real
// one.
bool is_known_one(const c10::SymInt& size) {
  return size.sym_eq(1).maybe_as_bool().value_or(false);
}

void check_training_size(const at::Tensor& input, const c10::SymInt& num_ghosts) {
  c10::SymInt smallest = input.sym_size(0) / num_ghosts;
  for (int64_t i = 2; i < input.dim(); ++i) {
    smallest *= input.sym_size(i);
  }
  if (!is_known_one(smallest)) {
    return;
  }
  TORCH_CHECK_VALUE(
      !is_known_one(num_ghosts),
      "Expected more than 1 value per channel when training, got input size torch.Size(",
      input.sym_sizes(), ")");
  TORCH_CHECK_VALUE(
      false, "Expected more than 1 value per channel when training, got input size torch.Size(",
      input.sym_sizes(), ") in ", num_ghosts,
      " ghosts, the smallest of one value: use a larger ghost_batch_size");
}

void check_like_input(const at::Tensor& input, const at::Tensor& other, const char* name) {
  check_strided(other, name);
  TORCH_CHECK(
      other.scalar_type() == input.scalar_type(), name, " must have input's dtype ",
      input.scalar_type(), ", got dtype ", other.scalar_type());
  check_device(input.device(), other, name);
  bool same = other.dim() == input.dim();
  for (int64_t i = 0; same && i < input.dim(); ++i) {
    same = other.sym_size(i) == input.sym_size(i);
  }
  TORCH_CHECK(
      same, name, " must have input's shape ", input.sym_sizes(), ", got shape ",
      other.sym_sizes());
}

c10::SymInt check_saved_stats(const at::Tensor& input, const SavedStatsArgs& saved) {
  const auto& [save_mean, save_mean_lo, save_invstd] = saved;
  check_strided(save_mean, "save_mean");
  TORCH_CHECK(
      save_mean.dim() == 2, "save_mean must have shape [num_ghosts, C], got shape ",
      save_mean.sym_sizes());
  const c10::SymInt num_ghosts = save_mean.sym_size(0);
  TORCH_CHECK(
      num_ghosts >= 1 && (num_ghosts == 1 || num_ghosts <= input.sym_size(0)),
      "save_mean must have between 1 and N = ", input.sym_size(0), " ghosts, got shape ",
      save_mean.sym_sizes());
  const at::ScalarType dtype = acc_type(input.scalar_type());
  const c10::SymInt n_channel = input.sym_size(1);
  check_matrix(save_mean, "save_mean", num_ghosts, n_channel, dtype);
  check_matrix(save_mean_lo, "save_mean_lo", num_ghosts, n_channel, dtype);
  check_matrix(save_invstd, "save_invstd", num_ghosts, n_channel, dtype);
  check_device(input.device(), save_mean, "save_mean");
  check_device(input.device(), save_mean_lo, "save_mean_lo");
  check_device(input.device(), save_invstd, "save_invstd");
  return num_ghosts;
}

void check_derivative_source(
    const at::Tensor& input,
    Activation activation,
    const OptionalTensor& output,
    const OptionalTensor& residual) {
  TORCH_CHECK(
      !(is_given(output) && is_given(residual)),
      "output and residual must not both be given: the activation's derivative is taken "
      "from one of them");
  if (activation != Activation::kNone) {
    dispatch_activation(activation, [&](auto act) {
      TORCH_CHECK(
          !is_given(output) || act.kFromOutput,
          "output does not determine the derivative of activation '", act.kName,
          "': pass residual");
      TORCH_CHECK(
          !is_given(residual) || !act.kFromOutput,
          "residual is not needed for the derivative of activation '", act.kName,
          "': pass output, which determines it");
    });
  }
  if (is_given(output)) {
    check_like_input(input, *output, "output");
  }
}

void check_eps(double eps, bool training) {
  if (training) {
    TORCH_CHECK_VALUE(eps > 0, "batch_norm eps must be positive during training, but got ", eps);
  }
  TORCH_CHECK_VALUE(eps >= 0, "batch_norm eps must be non-negative, but got ", eps);
}

void check_channel_vector(
    const OptionalTensor& vector,
    const char* name,
    const c10::SymInt& n_channel,
    at::ScalarType dtype,
    at::Device device) {
  if (!is_given(vector)) {
    return;
  }
  check_strided(*vector, name);
  const at::ScalarType given = vector->scalar_type();
  const at::ScalarType acc = acc_type(dtype);
  TORCH_CHECK(
      given == dtype || given == acc, name, " must have input's dtype ", dtype,
      acc == dtype ? "" : c10::str(" or dtype ", acc), ", got dtype ", given);
  check_device(device, *vector, name);
  TORCH_CHECK(
      vector->dim() == 1 && vector->sym_size(0) == n_channel, name, " must have shape [", n_channel,
      "], one element per channel, got shape ", vector->sym_sizes());
}

// Both or none of running_mean and running_var; writable, since they are updated in place.
void check_running_stats(
    const RunningStatsArgs& running,
    std::optional<double> momentum,
    bool updates,
    const c10::SymInt& n_channel,
    at::ScalarType dtype,
    at::Device device) {
  const auto& [running_mean, running_var, num_batches_tracked] = running;
  if (is_given(num_batches_tracked)) {
    const at::Tensor& counter = *num_batches_tracked;
    check_strided(counter, "num_batches_tracked");
    TORCH_CHECK(
        counter.scalar_type() == at::kLong && counter.dim() == 0,
        "num_batches_tracked must be a scalar tensor of dtype Long, got dtype ",
        counter.scalar_type(), " and shape ", counter.sym_sizes());
    check_device(device, counter, "num_batches_tracked");
  }
  TORCH_CHECK(
      is_given(running_mean) == is_given(running_var),
      "running_mean and running_var must both be given or both be None, got only ",
      is_given(running_mean) ? "running_mean" : "running_var");
  if (!is_given(running_mean)) {
    return;
  }
  check_channel_vector(running_mean, "running_mean", n_channel, dtype, device);
  check_channel_vector(running_var, "running_var", n_channel, dtype, device);
  TORCH_CHECK(
      running_mean->scalar_type() == running_var->scalar_type(),
      "running_var must have running_mean's dtype ", running_mean->scalar_type(), ", got dtype ",
      running_var->scalar_type());
  check_writable(*running_mean, "running_mean");
  check_writable(*running_var, "running_var");
  TORCH_CHECK_VALUE(
      !updates || momentum.has_value() || is_given(num_batches_tracked),
      "momentum must be a number, got None: a cumulative average needs "
      "num_batches_tracked");
}

void check_affine(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) {
  const c10::SymInt n_channel = input.sym_size(1);
  check_channel_vector(weight, "weight", n_channel, input.scalar_type(), input.device());
  check_channel_vector(bias, "bias", n_channel, input.scalar_type(), input.device());
}

// (N, C, *) of a floating dtype, dense layout.
void check_input(const at::Tensor& input) {
  check_strided(input, "input");
  TORCH_CHECK(
      is_floating(input.scalar_type()),
      "input must have dtype float64, float32, float16 or bfloat16, got dtype ",
      input.scalar_type());
  TORCH_CHECK(
      input.dim() >= 2, "input must have at least 2 dimensions (N, C, ...), got ", input.dim(),
      "D input");
}

// ceil(N / ghost_batch_size); 1 for plain batch norm and for an empty batch.
c10::SymInt check_num_ghosts(
    const at::Tensor& input, const std::optional<c10::SymInt>& ghost_batch_size) {
  if (!ghost_batch_size.has_value()) {
    return 1;
  }
  TORCH_CHECK_VALUE(
      *ghost_batch_size > 0, "ghost_batch_size must be a positive integer or None, got ",
      *ghost_batch_size);
  // Without a branch on N: it may be symbolic.
  return (input.sym_size(0).max(1) - 1) / *ghost_batch_size + 1;
}

// What the ops that normalise by given statistics share; `call` gets the numbers.
template <typename Args, typename Call>
void check_given_stats(const Args& args, Call& call) {
  check_input(args.input);
  call.activation = parse_activation(call.activation_name);
  call.num_ghosts = check_saved_stats(args.input, args.saved);
  check_affine(args.input, args.weight, args.bias);
  if (is_given(args.residual)) {
    check_like_input(args.input, *args.residual, "residual");
  }
}

template <typename Call>
void check_backward(Call& call) {
  check_given_stats(call.in, call);
  check_like_input(call.in.input, call.in.grad_output, "grad_output");
  check_derivative_source(call.in.input, call.activation, call.in.output, call.in.residual);
}

}  // namespace

void check(ForwardCall& call) {
  const at::Tensor& input = call.input;
  check_input(input);
  call.activation = parse_activation(call.activation_name);
  const c10::SymInt num_ghosts = check_num_ghosts(input, call.ghost_batch_size);
  check_eps(call.eps, call.training);
  check_affine(input, call.weight, call.bias);
  check_running_stats(
      call.running, call.momentum, call.training, input.sym_size(1), input.scalar_type(),
      input.device());
  if (is_given(call.residual)) {
    check_like_input(input, *call.residual, "residual");
  }
  if (call.training) {
    check_training_size(input, num_ghosts);
    call.num_ghosts = num_ghosts;
  } else {
    TORCH_CHECK(
        is_given(call.running.running_mean),
        "running_mean and running_var must be given when training is False");
  }
}

void check(ReduceCall& call) {
  check_input(call.input);
  call.num_ghosts = check_num_ghosts(call.input, call.ghost_batch_size);
}

void check(const MergeCall& call) {
  const auto& [count, mean, m2] = call;
  check_strided(mean, "mean");
  TORCH_CHECK(
      mean.dim() == 2 && mean.sym_size(0) >= 1, "mean must have shape [K, C], got shape ",
      mean.sym_sizes());
  check_matrix(mean, "mean", mean.sym_size(0), mean.sym_size(1), at::kDouble);
  check_matrix(m2, "m2", mean.sym_size(0), mean.sym_size(1), at::kDouble);
  check_count(count, mean.sym_size(0));
  check_device(mean.device(), m2, "m2");
  check_device(mean.device(), count, "count");
}

void check(const FoldCall& call) {
  TORCH_CHECK(
      is_floating(call.dtype), "dtype must be float64, float32, float16 or bfloat16, got dtype ",
      call.dtype);
  check(call.sets);
  check_eps(call.eps, /*training=*/true);
  const at::Tensor& mean = call.sets.mean;
  check_running_stats(
      call.running, call.momentum, /*updates=*/true, mean.sym_size(1), call.dtype, mean.device());
}

void check(ApplyCall& call) {
  check_given_stats(call, call);
}

void check(BackwardCall& call) {
  check_backward(call);
}

void check(GradReduceCall& call) {
  check_backward(call);
}

void check(GradApplyCall& call) {
  check_backward(call);
  const auto& [count, sum_dy, sum_dy_xmu] = std::tie(call.count, call.sum_dy, call.sum_dy_xmu);
  TORCH_CHECK(
      is_given(count) == is_given(sum_dy) && is_given(sum_dy) == is_given(sum_dy_xmu),
      "count, sum_dy and sum_dy_xmu must all be given, or none for frozen statistics");
  if (!is_given(count)) {
    return;
  }
  const at::Tensor& input = call.in.input;
  check_count(*count, call.num_ghosts);
  check_matrix(*sum_dy, "sum_dy", call.num_ghosts, input.sym_size(1), at::kDouble);
  check_matrix(*sum_dy_xmu, "sum_dy_xmu", call.num_ghosts, input.sym_size(1), at::kDouble);
  check_device(input.device(), *count, "count");
  check_device(input.device(), *sum_dy, "sum_dy");
  check_device(input.device(), *sum_dy_xmu, "sum_dy_xmu");
}

}  // namespace bnext
