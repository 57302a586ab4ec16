// The ops of one backend, as library.cpp registers them; docs/ops.md documents each.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace bnext {

using Tensor2 = std::tuple<at::Tensor, at::Tensor>;
using Tensor3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Tensor4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Tensor4 batch_norm_cpu(
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
    std::optional<std::int64_t> ghost_batch_size);

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
    std::array<bool, 2> output_mask);

Tensor3 batch_norm_reduce_cpu(
    const at::Tensor& input, std::optional<std::int64_t> ghost_batch_size);

Tensor3 batch_norm_merge_cpu(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& m2);

Tensor3 batch_norm_fold_cpu(
    const at::Tensor& count,
    const at::Tensor& mean,
    const at::Tensor& m2,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum,
    double eps,
    at::ScalarType dtype);

at::Tensor batch_norm_apply_cpu(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    OptionalString activation);

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
    OptionalString activation);

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
    std::array<bool, 2> output_mask);

// The instruction set in use, and those compiled in (dispatch.cpp).
std::string cpu_isa();
std::vector<std::string> cpu_isas();

}  // namespace bnext
