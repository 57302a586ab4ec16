// The ops of each backend, as library.cpp and meta.cpp register them; docs/ops.md
// documents each.
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

// Each op once as a type, and its function for each backend (CUDA: in a build with CUDA).

using BatchNorm = Tensor4(
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
BatchNorm batch_norm_cpu, batch_norm_cuda;

using BatchNormBackward = Tensor4(
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
BatchNormBackward batch_norm_backward_cpu, batch_norm_backward_cuda;

using BatchNormReduce =
    Tensor3(const at::Tensor& input, std::optional<std::int64_t> ghost_batch_size);
BatchNormReduce batch_norm_reduce_cpu, batch_norm_reduce_cuda;

using BatchNormMerge =
    Tensor3(const at::Tensor& count, const at::Tensor& mean, const at::Tensor& m2);
BatchNormMerge batch_norm_merge_cpu, batch_norm_merge_cuda;

using BatchNormFold = Tensor3(
    const at::Tensor& count,
    const at::Tensor& mean,
    const at::Tensor& m2,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum,
    double eps,
    at::ScalarType dtype);
BatchNormFold batch_norm_fold_cpu, batch_norm_fold_cuda;

using BatchNormApply = at::Tensor(
    const at::Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& residual,
    const at::Tensor& save_mean,
    const at::Tensor& save_mean_lo,
    const at::Tensor& save_invstd,
    OptionalString activation);
BatchNormApply batch_norm_apply_cpu, batch_norm_apply_cuda;

using BatchNormGradReduce = Tensor2(
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
BatchNormGradReduce batch_norm_grad_reduce_cpu, batch_norm_grad_reduce_cuda;

using BatchNormGradApply = Tensor2(
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
BatchNormGradApply batch_norm_grad_apply_cpu, batch_norm_grad_apply_cuda;

// The instruction set in use, and those compiled in (dispatch.cpp).
std::string cpu_isa();
std::vector<std::string> cpu_isas();

// The launches of a training step's forward (tensors = 1) or backward (2; 3 with a residual) in
// words, such as "rows: team 264/4x64/s33/r2": grid/threads/splits/rounds.
std::string cuda_plan(
    const at::Tensor& input, std::optional<std::int64_t> ghost_batch_size, std::int64_t tensors);

// A hook for tests: from now on launches are planned as for a GPU with no more multiprocessors and
// bytes of shared memory than this, and with 32-bit offsets up to that many elements.
void limit_cuda_device(
    std::int64_t num_sms,
    std::int64_t shared_per_sm,
    std::int64_t shared_per_block,
    std::int64_t narrow_elements);

}  // namespace bnext
