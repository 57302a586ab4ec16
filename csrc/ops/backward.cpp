// The ops of the backward: all of it, grad_reduce, and grad_apply.
#include "../checks.h"
#include "ops.h"

namespace bnext {
namespace {

// The gradients over elements that are wanted; undefined where not.
struct ElementGrads {
  at::Tensor input;
  at::Tensor residual;

  ElementGrads(const at::Tensor& like, DenseFormat format, std::array<bool, 2> wanted)
      : input(wanted[0] ? empty_dense(like, format) : at::Tensor()),
        residual(wanted[1] ? empty_dense(like, format) : at::Tensor()) {}

  bool any() const { return input.defined() || residual.defined(); }
};

// What is not wanted comes back empty: an op has no undefined outputs.
at::Tensor or_empty(const at::Tensor& grad, const at::Tensor& input) {
  return grad.defined() ? grad : empty_on(input, {0}, input.scalar_type());
}

}  // namespace

Tensor4 batch_norm_backward(const Backend* backend, BackwardCall& call) {
  check(call);
  const at::Tensor& input = call.in.input;
  const DenseFormat format = dense_format(input);
  const ElementGrads grads(input, format, call.output_mask);
  const at::ScalarType acc = acc_type(input.scalar_type());
  const at::Tensor grad_weight = empty_on(input, {input.sym_size(1)}, acc);
  const at::Tensor grad_bias = empty_on(input, {input.sym_size(1)}, acc);
  if (backend != nullptr) {
    if (input.numel() != 0) {
      backend->backward(
          backward_tensors(call.in, call.activation, format, grads.input, grads.residual),
          /*frozen=*/!call.training, grad_weight, grad_bias);
    } else {
      grad_weight.zero_();
      grad_bias.zero_();
    }
  }
  return {or_empty(grads.input, input), grad_weight, grad_bias, or_empty(grads.residual, input)};
}

Tensor2 batch_norm_grad_reduce(const Backend* backend, GradReduceCall& call) {
  check(call);
  const at::Tensor& input = call.in.input;
  const c10::SymInt n_channel = input.sym_size(1);
  const at::Tensor sum_dy = empty_on(input, {call.num_ghosts, n_channel}, at::kDouble);
  const at::Tensor sum_dy_xmu = empty_on(input, {call.num_ghosts, n_channel}, at::kDouble);
  if (backend != nullptr) {
    if (input.numel() != 0) {
      backend->grad_reduce(
          backward_tensors(call.in, call.activation, dense_format(input), {}, {}),
          {at::Tensor(), sum_dy, sum_dy_xmu});
    } else {
      sum_dy.zero_();
      sum_dy_xmu.zero_();
    }
  }
  return {sum_dy, sum_dy_xmu};
}

Tensor2 batch_norm_grad_apply(const Backend* backend, GradApplyCall& call) {
  check(call);
  const at::Tensor& input = call.in.input;
  const DenseFormat format = dense_format(input);
  const ElementGrads grads(input, format, call.output_mask);
  if (backend != nullptr && input.numel() != 0 && grads.any()) {
    std::optional<GradSumTensors> sums;
    if (is_given(call.count)) {
      sums = {call.count->contiguous(), call.sum_dy->contiguous(), call.sum_dy_xmu->contiguous()};
    }
    backend->grad_apply(
        backward_tensors(call.in, call.activation, format, grads.input, grads.residual), sums);
  }
  return {or_empty(grads.input, input), or_empty(grads.residual, input)};
}

}  // namespace bnext
