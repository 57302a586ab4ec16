// The ops on meta (and so on fake) tensors: the same checks, outputs without data. Sizes may be
// symbolic.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "dense_format.h"
#include "ops.h"

namespace bnext {
namespace {

at::Tensor empty_stats(const at::Tensor& input, const c10::SymInt& num_ghosts) {
  return at::empty_symint(
      {num_ghosts, input.sym_size(1)}, input.options().dtype(acc_type(input.scalar_type())));
}

at::Tensor grad_or_empty(const at::Tensor& input, bool wanted) {
  return wanted ? empty_dense(input, dense_format(input)) : at::empty({0}, input.options());
}

Tensor4 batch_norm_meta(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    const OptionalTensor& residual,
    bool training,
    std::optional<double> momentum,
    double eps,
    OptionalString activation,
    std::optional<c10::SymInt> ghost_batch_size) {
  const BatchNormCall call = check_batch_norm(
      input, weight, bias, running_mean, running_var, num_batches_tracked, residual, training,
      momentum, eps, activation, ghost_batch_size);
  return {
      empty_dense(input, dense_format(input)), empty_stats(input, call.num_ghosts),
      empty_stats(input, call.num_ghosts), empty_stats(input, call.num_ghosts)};
}

Tensor4 batch_norm_backward_meta(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    bool /*training*/,
    OptionalString activation,
    std::array<bool, 2> output_mask) {
  check_backward(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      activation);
  const auto acc = input.options().dtype(acc_type(input.scalar_type()));
  return {
      grad_or_empty(input, output_mask[0]), at::empty_symint({input.sym_size(1)}, acc),
      at::empty_symint({input.sym_size(1)}, acc), grad_or_empty(input, output_mask[1])};
}

Tensor3 batch_norm_reduce_meta(
    const at::Tensor& input, std::optional<c10::SymInt> ghost_batch_size) {
  check_input(input);
  const c10::SymInt num_ghosts = check_num_ghosts(input, ghost_batch_size);
  const at::Tensor mean =
      at::empty_symint({num_ghosts, input.sym_size(1)}, input.options().dtype(at::kDouble));
  return {
      at::empty_symint({num_ghosts}, input.options().dtype(at::kLong)), mean, at::empty_like(mean)};
}

Tensor3 batch_norm_merge_meta(
    const at::Tensor& count, const at::Tensor& mean, const at::Tensor& m2) {
  check_moments(count, mean, m2);
  return {
      at::empty({1}, count.options()), at::empty_symint({1, mean.sym_size(1)}, mean.options()),
      at::empty_symint({1, mean.sym_size(1)}, mean.options())};
}

Tensor3 batch_norm_fold_meta(
    const at::Tensor& count,
    const at::Tensor& mean,
    const at::Tensor& m2,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum,
    double eps,
    at::ScalarType dtype) {
  check_fold(count, mean, m2, running_mean, running_var, num_batches_tracked, momentum, eps, dtype);
  const auto options = mean.options().dtype(acc_type(dtype));
  return {
      at::empty_symint(mean.sym_sizes(), options), at::empty_symint(mean.sym_sizes(), options),
      at::empty_symint(mean.sym_sizes(), options)};
}

at::Tensor batch_norm_apply_meta(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    OptionalString activation) {
  check_apply(input, weight, bias, residual, save_mean, save_mean_lo, save_invstd, activation);
  return empty_dense(input, dense_format(input));
}

Tensor2 batch_norm_grad_reduce_meta(
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
  check_backward(
      grad_output, input, weight, bias, output, residual, save_mean, save_mean_lo, save_invstd,
      activation);
  const auto options = input.options().dtype(at::kDouble);
  return {
      at::empty_symint(save_mean.sym_sizes(), options),
      at::empty_symint(save_mean.sym_sizes(), options)};
}

Tensor2 batch_norm_grad_apply_meta(
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
  return {grad_or_empty(input, output_mask[0]), grad_or_empty(input, output_mask[1])};
}

}  // namespace

TORCH_LIBRARY_IMPL(bnext, Meta, m) {
  m.impl("batch_norm", &batch_norm_meta);
  m.impl("batch_norm_backward", &batch_norm_backward_meta);
  m.impl("batch_norm_reduce", &batch_norm_reduce_meta);
  m.impl("batch_norm_merge", &batch_norm_merge_meta);
  m.impl("batch_norm_fold", &batch_norm_fold_meta);
  m.impl("batch_norm_apply", &batch_norm_apply_meta);
  m.impl("batch_norm_grad_reduce", &batch_norm_grad_reduce_meta);
  m.impl("batch_norm_grad_apply", &batch_norm_grad_apply_meta);
}

}  // namespace bnext
