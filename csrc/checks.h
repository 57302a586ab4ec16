// One named check per contract of the ops. Every backend calls them, the meta backend with symbolic
// sizes, so that no shape, dtype, device or stride reaches a kernel unchecked.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>

#include "core/activation.h"

namespace bnext {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalString = std::optional<std::string_view>;

inline bool is_given(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}

// What the checks of a call find out about it.
struct BatchNormCall {
  Activation activation;
  c10::SymInt num_ghosts;
};

// The whole contract of each op.
BatchNormCall check_batch_norm(
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
    const std::optional<c10::SymInt>& ghost_batch_size);
BatchNormCall check_apply(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    OptionalString activation);
BatchNormCall check_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& output,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    OptionalString activation);

// (N, C, *) of a floating dtype, dense layout.
void check_input(const at::Tensor& input);

// ceil(N / ghost_batch_size); 1 for plain batch norm and for an empty batch.
c10::SymInt check_num_ghosts(
    const at::Tensor& input, const std::optional<c10::SymInt>& ghost_batch_size);

// count (K,) int64, mean and m2 (K, C) float64, on one device.
void check_moments(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& m2);

void check_fold(
    const at::Tensor& count,
    const at::Tensor& mean,
    const at::Tensor& m2,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum,
    double eps,
    at::ScalarType dtype);

// count, sum_dy and sum_dy_xmu of (num_ghosts,) and (num_ghosts, C): all, or none (frozen).
void check_grad_sums(
    const at::Tensor& input,
    const c10::SymInt& num_ghosts,
    const OptionalTensor& count,
    const OptionalTensor& sum_dy,
    const OptionalTensor& sum_dy_xmu);

inline at::ScalarType acc_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace bnext
