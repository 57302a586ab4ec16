// What the launchers of every backend do with the tensors of a call.
#pragma once

#include <array>

#include "checks.h"
#include "core/layout.h"
#include "dense_format.h"

namespace bnext {

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

inline std::optional<c10::SymInt> to_symint(const std::optional<std::int64_t>& value) {
  return value.has_value() ? std::optional<c10::SymInt>(*value) : std::nullopt;
}

// Of the input's accumulation dtype, on its device.
at::Tensor empty_acc(const at::Tensor& input, at::IntArrayRef sizes);

inline at::Tensor empty_stats(const at::Tensor& input, std::int64_t num_ghosts) {
  return empty_acc(input, {num_ghosts, input.size(1)});
}

// Autograd must see the write, as after an in-place operator.
void bump_version(const at::Tensor& tensor);

// The elements of forward: dense tensors of the input's format; undefined where not given.
struct ForwardTensors {
  at::Tensor input;
  at::Tensor residual;
  at::Tensor output;
  OptionalTensor weight;
  OptionalTensor bias;
  Activation activation;
};

ForwardTensors forward_tensors(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    Activation activation);

// Those of backward; undefined where not given or not wanted.
struct BackwardTensors {
  at::Tensor grad_output;
  at::Tensor input;
  at::Tensor extra;  // what the activation's derivative is taken from, besides the input
  OptionalTensor weight;
  OptionalTensor bias;
  at::Tensor save_mean;
  at::Tensor save_mean_lo;
  at::Tensor save_invstd;
  Activation activation;
  Derivative derivative;
  at::Tensor grad_input;
  at::Tensor grad_residual;
};

BackwardTensors backward_tensors(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    Activation activation,
    std::array<bool, 2> output_mask);

// What is not wanted comes back empty: an op has no undefined outputs.
at::Tensor or_empty(const at::Tensor& grad, const at::Tensor& input);

}  // namespace bnext
