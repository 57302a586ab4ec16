#include "tensors.h"

#include <ATen/ops/empty.h>

namespace bnext {

at::Tensor empty_on(const at::Tensor& tensor, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
  return tensor.is_cpu() ? empty_cpu(C10_AS_INTARRAYREF_SLOW(sizes), dtype)
                         : at::empty_symint(sizes, tensor.options().dtype(dtype));
}

void StatsTensors::zero() const {
  mean.zero_();
  mean_lo.zero_();
  invstd.zero_();
}

StatsTensors empty_stats(
    const at::Tensor& on,
    const c10::SymInt& num_ghosts,
    const c10::SymInt& n_channel,
    at::ScalarType dtype) {
  const auto empty = [&] { return empty_on(on, {num_ghosts, n_channel}, acc_type(dtype)); };
  return {empty(), empty(), empty()};
}

StatsTensors contiguous_stats(const SavedStatsArgs& saved) {
  return {
      saved.save_mean.contiguous(), saved.save_mean_lo.contiguous(),
      saved.save_invstd.contiguous()};
}

void MomentTensors::zero() const {
  count.zero_();
  mean.zero_();
  m2.zero_();
}

MomentTensors empty_moments(
    const at::Tensor& on, const c10::SymInt& sets, const c10::SymInt& n_channel) {
  return {
      empty_on(on, {sets}, at::kLong), empty_on(on, {sets, n_channel}, at::kDouble),
      empty_on(on, {sets, n_channel}, at::kDouble)};
}

MomentTensors contiguous_moments(const MergeCall& sets) {
  return {sets.count.contiguous(), sets.mean.contiguous(), sets.m2.contiguous()};
}

BackwardTensors backward_tensors(
    const BackwardInputs& in,
    Activation activation,
    DenseFormat format,
    const at::Tensor& grad_input,
    const at::Tensor& grad_residual) {
  const bool from_output = is_given(in.output);
  return {
      layout_of(in.input, format),
      to_dense(in.grad_output, format),
      to_dense(in.input, format),
      to_dense(from_output ? in.output : in.residual, format),
      in.weight,
      in.bias,
      contiguous_stats(in.saved),
      activation,
      from_output             ? Derivative::kFromOutput
      : is_given(in.residual) ? Derivative::kFromResidual
                              : Derivative::kFromInput,
      grad_input,
      grad_residual};
}

void bump_versions(const RunningStatsArgs& running) {
  for (const OptionalTensor* buffer :
       {&running.running_mean, &running.running_var, &running.num_batches_tracked}) {
    if (is_given(*buffer) && !(*buffer)->is_inference()) {
      (*buffer)->unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace bnext
