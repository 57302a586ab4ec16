// Backward on the CPU: the fused op, and grad_reduce and grad_apply on their own.
#include <algorithm>
#include <vector>

#include "../ops.h"
#include "steps.h"
#include "tensors.h"

namespace bnext {
namespace {

// (G, C): the sums of each ghost and channel, given (grad_apply) or to be found; null where not
// needed.
struct SumsPointers {
  double* sum_dy;
  double* sum_dy_xmu;
  const std::int64_t* count;
};

enum class Statistics { kBatch, kFrozen };

template <typename scalar_t>
class BackwardSteps {
 public:
  using acc_t = AccType<scalar_t>;
  struct Scratch {
    std::vector<double> sum_dy, sum_dy_xmu;  // [num_partials, C]
    std::vector<acc_t> scale, shift, coef_x, coef_0;
    const acc_t* mean;
  };

  // Sums that were given are used by apply; else reduce finds them, and they are also written to
  // `sums` where that is not null.
  BackwardSteps(
      const Schedule& schedule,
      const BackwardTensors& tensors,
      Statistics statistics,
      const SumsPointers& sums,
      bool sums_given)
      : schedule_(schedule),
        weight_(tensors.weight),
        bias_(tensors.bias),
        mean_(tensors.save_mean.const_data_ptr<acc_t>()),
        mean_lo_(tensors.save_mean_lo.const_data_ptr<acc_t>()),
        invstd_(tensors.save_invstd.const_data_ptr<acc_t>()),
        frozen_(statistics == Statistics::kFrozen),
        sums_(sums),
        sums_given_(sums_given),
        group_dy_(sums_given ? 0 : schedule.num_groups() * schedule.n_channel()),
        group_dy_xmu_(group_dy_),
        grad_input_(optional_grad(tensors.grad_input)),
        grad_residual_(optional_grad(tensors.grad_residual)) {
    advise_huge_pages(tensors.grad_input);
    advise_huge_pages(tensors.grad_residual);
    args_.grad_output = tensors.grad_output.const_data_ptr<scalar_t>();
    args_.input = tensors.input.const_data_ptr<scalar_t>();
    args_.extra = optional_data<scalar_t>(tensors.extra);
    args_.activation = tensors.activation;
    args_.derivative = tensors.derivative;
  }

  Scratch make_scratch() const {
    const std::int64_t n_channel = schedule_.n_channel();
    const std::vector<double> partials(schedule_.num_partials() * n_channel);
    const std::vector<acc_t> channels(n_channel);
    return {partials, partials, channels, channels, channels, channels, nullptr};
  }

  void prepare(std::int64_t ghost, Scratch& scratch) const {
    const std::int64_t n_channel = schedule_.n_channel();
    scratch.mean = mean_ + ghost * n_channel;
    const std::int64_t first = ghost * n_channel;
    kernel_table().of<scalar_t>().constants(
        {scratch.mean, mean_lo_ + first, invstd_ + first, weight_.data(), bias_.data(),
         scratch.scale.data(), scratch.shift.data()},
        n_channel);
    if (sums_given_ && !frozen_) {
      set_coefficients(
          ghost, Range{0, n_channel}, sums_.sum_dy + first, sums_.sum_dy_xmu + first,
          static_cast<double>(sums_.count[ghost]), scratch);
    }
  }

  void reduce(const Piece& piece, Scratch& scratch) const {
    GradReduceArgs<scalar_t> args;
    set_args(piece, scratch, args);
    const std::int64_t first = piece.partial * schedule_.n_channel() + piece.channel;
    args.sum_dy = scratch.sum_dy.data() + first;
    args.sum_dy_xmu = scratch.sum_dy_xmu.data() + first;
    kernel_table().of<scalar_t>().grad_reduce(args, piece.slab);
  }

  void fold(std::int64_t ghost, std::int64_t group, Range channels, Scratch& scratch) {
    const std::int64_t n_channel = schedule_.n_channel();
    double* const sum_dy = scratch.sum_dy.data();
    double* const sum_dy_xmu = scratch.sum_dy_xmu.data();
    for (std::int64_t p = 1; p < schedule_.num_partials(); ++p) {
      for (std::int64_t c = channels.begin; c < channels.end; ++c) {
        sum_dy[c] += sum_dy[p * n_channel + c];
        sum_dy_xmu[c] += sum_dy_xmu[p * n_channel + c];
      }
    }
    const std::int64_t first = channels.begin;
    const std::int64_t of_ghost = ghost * n_channel + first;
    const std::int64_t of_group = group * n_channel + first;
    kernel_table().of<scalar_t>().grad_fold(
        {sum_dy + first, sum_dy_xmu + first, group_dy_.data() + of_group,
         group_dy_xmu_.data() + of_group, mean_lo_ + of_ghost, invstd_ + of_ghost},
        channels.size());
    set_coefficients(ghost, channels, sum_dy, sum_dy_xmu, schedule_.count(ghost), scratch);
    if (sums_.sum_dy != nullptr) {
      std::copy_n(sum_dy + first, channels.size(), sums_.sum_dy + of_ghost);
      std::copy_n(sum_dy_xmu + first, channels.size(), sums_.sum_dy_xmu + of_ghost);
    }
  }

  void apply(const Piece& piece, Scratch& scratch) const {
    GradApplyArgs<scalar_t> args;
    set_args(piece, scratch, args);
    args.coef_x = frozen_ ? nullptr : scratch.coef_x.data() + piece.channel;
    args.coef_0 = frozen_ ? nullptr : scratch.coef_0.data() + piece.channel;
    args.grad_input = at_offset(grad_input_, piece.offset);
    args.grad_residual = at_offset(grad_residual_, piece.offset);
    args.stream = schedule_.stream(piece);
    args.ahead = args.stream ? piece.ahead : 0;  // else it is in the cache
    kernel_table().of<scalar_t>().grad_apply(args, piece.slab);
  }

  // (C,) in acc_t: sums over the ghosts.
  void parameter_grads(acc_t* grad_weight, acc_t* grad_bias) {
    const std::int64_t n_channel = schedule_.n_channel();
    at::parallel_for(0, n_channel, kGrainElements, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t group = 1; group < schedule_.num_groups(); ++group) {
        for (std::int64_t c = begin; c < end; ++c) {
          group_dy_[c] += group_dy_[group * n_channel + c];
          group_dy_xmu_[c] += group_dy_xmu_[group * n_channel + c];
        }
      }
      for (std::int64_t c = begin; c < end; ++c) {
        grad_weight[c] = static_cast<acc_t>(group_dy_xmu_[c]);
        grad_bias[c] = static_cast<acc_t>(group_dy_[c]);
      }
    });
  }

 private:
  static scalar_t* optional_grad(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr<scalar_t>() : nullptr;
  }

  void set_coefficients(
      std::int64_t ghost,
      Range channels,
      const double* sum_dy,
      const double* sum_dy_xmu,
      double count,
      Scratch& scratch) const {
    const std::int64_t first = channels.begin;
    const std::int64_t i = ghost * schedule_.n_channel() + first;
    kernel_table().of<scalar_t>().coefficients(
        {sum_dy + first, sum_dy_xmu + first, count, mean_lo_ + i, invstd_ + i,
         scratch.scale.data() + first, scratch.coef_x.data() + first,
         scratch.coef_0.data() + first},
        channels.size());
  }

  void set_args(const Piece& piece, const Scratch& scratch, GradArgs<scalar_t>& args) const {
    args = args_;
    args.grad_output += piece.offset;
    args.input += piece.offset;
    args.extra = at_offset(args_.extra, piece.offset);
    args.mean = scratch.mean + piece.channel;
    args.scale = scratch.scale.data() + piece.channel;
    args.shift = scratch.shift.data() + piece.channel;
  }

  const Schedule& schedule_;
  GradArgs<scalar_t> args_{};
  ChannelValues<acc_t> weight_;
  ChannelValues<acc_t> bias_;
  const acc_t* mean_;
  const acc_t* mean_lo_;
  const acc_t* invstd_;
  bool frozen_;
  SumsPointers sums_;
  bool sums_given_;
  std::vector<double> group_dy_, group_dy_xmu_;  // [num_groups, C], the latter times invstd
  scalar_t* grad_input_;
  scalar_t* grad_residual_;
};

}  // namespace

Tensor4 batch_norm_backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    bool training,
    OptionalString activation,
    std::array<bool, 2> output_mask) {
  const BatchNormCall call = check_backward(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      activation);
  const BackwardTensors tensors = backward_tensors(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      call.activation, output_mask);
  const at::Tensor grad_weight = empty_acc(input, {input.size(1)});
  const at::Tensor grad_bias = empty_acc(input, {input.size(1)});
  if (input.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
  } else {
    const Schedule schedule = schedule_of(
        input, call.num_ghosts.expect_int(),
        {/*reduce=*/true, /*apply=*/output_mask[0] || output_mask[1]});
    dispatch_dtype(input.scalar_type(), [&](auto tag) {
      using scalar_t = decltype(tag);
      using acc_t = AccType<scalar_t>;
      BackwardSteps<scalar_t> steps(
          schedule, tensors, training ? Statistics::kBatch : Statistics::kFrozen, SumsPointers{},
          /*sums_given=*/false);
      run_steps(schedule, steps);
      steps.parameter_grads(
          grad_weight.mutable_data_ptr<acc_t>(), grad_bias.mutable_data_ptr<acc_t>());
    });
  }
  return {
      or_empty(tensors.grad_input, input), grad_weight, grad_bias,
      or_empty(tensors.grad_residual, input)};
}

Tensor2 batch_norm_grad_reduce_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    OptionalString activation) {
  const BatchNormCall call = check_backward(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      activation);
  const at::Tensor sum_dy = save_mean.new_zeros(save_mean.sizes(), at::kDouble);
  const at::Tensor sum_dy_xmu = sum_dy.new_zeros(sum_dy.sizes());
  if (input.numel() != 0) {
    const BackwardTensors tensors = backward_tensors(
        grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
        call.activation, {false, false});
    const Schedule schedule =
        schedule_of(input, call.num_ghosts.expect_int(), {/*reduce=*/true, /*apply=*/false});
    const SumsPointers sums{
        sum_dy.mutable_data_ptr<double>(), sum_dy_xmu.mutable_data_ptr<double>(), nullptr};
    dispatch_dtype(input.scalar_type(), [&](auto tag) {
      BackwardSteps<decltype(tag)> steps(
          schedule, tensors, Statistics::kBatch, sums,
          /*sums_given=*/false);
      run_steps(schedule, steps);
    });
  }
  return {sum_dy, sum_dy_xmu};
}

Tensor2 batch_norm_grad_apply_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    const OptionalTensor& count,
    const OptionalTensor& sum_dy,
    const OptionalTensor& sum_dy_xmu,
    OptionalString activation,
    std::array<bool, 2> output_mask) {
  const BatchNormCall call = check_backward(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      activation);
  check_grad_sums(input, call.num_ghosts, count, sum_dy, sum_dy_xmu);
  const BackwardTensors tensors = backward_tensors(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      call.activation, output_mask);
  if (input.numel() != 0 && (output_mask[0] || output_mask[1])) {
    const bool frozen = !is_given(count);
    const at::Tensor counts = frozen ? at::Tensor() : count->contiguous();
    const at::Tensor dy = frozen ? at::Tensor() : sum_dy->contiguous();
    const at::Tensor dy_xmu = frozen ? at::Tensor() : sum_dy_xmu->contiguous();
    SumsPointers sums{};
    if (!frozen) {
      sums = {
          dy.mutable_data_ptr<double>(), dy_xmu.mutable_data_ptr<double>(),
          counts.const_data_ptr<std::int64_t>()};
    }
    const Schedule schedule =
        schedule_of(input, call.num_ghosts.expect_int(), {/*reduce=*/false, /*apply=*/true});
    dispatch_dtype(input.scalar_type(), [&](auto tag) {
      BackwardSteps<decltype(tag)> steps(
          schedule, tensors, frozen ? Statistics::kFrozen : Statistics::kBatch, sums,
          /*sums_given=*/true);
      run_steps(schedule, steps);
    });
  }
  return {or_empty(tensors.grad_input, input), or_empty(tensors.grad_residual, input)};
}

}  // namespace bnext
