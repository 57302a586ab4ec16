// The tensors of a call as the backends get them: dense, allocated, of known sizes.
#pragma once

#include "core/layout.h"
#include "dense_format.h"
#include "ops/calls.h"

namespace bnext {

inline at::ScalarType acc_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// On the device of `tensor`.
at::Tensor empty_on(const at::Tensor& tensor, c10::SymIntArrayRef sizes, at::ScalarType dtype);

inline Layout layout_of(const at::Tensor& input, DenseFormat format) {
  const std::int64_t n_batch = input.size(0);
  const std::int64_t n_channel = input.size(1);
  std::int64_t spatial = 1;
  for (std::int64_t i = 2; i < input.dim(); ++i) {
    spatial *= input.size(i);
  }
  // A single channel lies alike in both orders, and has long runs as planes.
  const bool rows = format != DenseFormat::kContiguous && n_channel > 1;
  return {rows ? Order::kRows : Order::kPlanes, n_batch, n_channel, spatial};
}

inline at::Tensor to_dense(const OptionalTensor& tensor, DenseFormat format) {
  return is_given(tensor) ? to_dense(*tensor, format) : at::Tensor();
}

// The statistics of each ghost: (num_ghosts, C) of the input's acc dtype.
struct StatsTensors {
  at::Tensor mean;
  at::Tensor mean_lo;
  at::Tensor invstd;

  std::int64_t num_ghosts() const { return mean.size(0); }
  void zero() const;
};

StatsTensors empty_stats(
    const at::Tensor& on,
    const c10::SymInt& num_ghosts,
    const c10::SymInt& n_channel,
    at::ScalarType dtype);
StatsTensors contiguous_stats(const SavedStatsArgs& saved);

// (count, mean, M2) of K sets: (K,) int64 and (K, C) float64.
struct MomentTensors {
  at::Tensor count;
  at::Tensor mean;
  at::Tensor m2;

  void zero() const;
};

MomentTensors empty_moments(
    const at::Tensor& on, const c10::SymInt& sets, const c10::SymInt& n_channel);
MomentTensors contiguous_moments(const MergeCall& sets);

// The sums of backward over each ghost, (num_ghosts, C) float64, and the counts they are of,
// (num_ghosts,) int64, where given.
struct GradSumTensors {
  at::Tensor count;
  at::Tensor sum_dy;
  at::Tensor sum_dy_xmu;
};

// The elements of forward; undefined where not given.
struct ForwardTensors {
  Layout layout;
  at::Tensor input;
  at::Tensor residual;
  at::Tensor output;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  Activation activation;
};

// Of a ForwardCall or an ApplyCall.
template <typename Call>
ForwardTensors forward_tensors(const Call& call, DenseFormat format, const at::Tensor& output) {
  return {
      layout_of(call.input, format),
      to_dense(call.input, format),
      to_dense(call.residual, format),
      output,
      call.weight,
      call.bias,
      call.activation};
}

// Those of backward; undefined where not given or not wanted.
struct BackwardTensors {
  Layout layout;
  at::Tensor grad_output;
  at::Tensor input;
  at::Tensor extra;  // what the activation's derivative is taken from, besides the input
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  StatsTensors saved;
  Activation activation;
  Derivative derivative;
  at::Tensor grad_input;
  at::Tensor grad_residual;

  bool applies() const { return grad_input.defined() || grad_residual.defined(); }
};

BackwardTensors backward_tensors(
    const BackwardInputs& in,
    Activation activation,
    DenseFormat format,
    const at::Tensor& grad_input,
    const at::Tensor& grad_residual);

// Autograd must see that the buffers were written, as after an in-place operator.
void bump_versions(const RunningStatsArgs& running);

}  // namespace bnext
