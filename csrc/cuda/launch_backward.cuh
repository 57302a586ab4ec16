// The launches of backward for one dtype.
#pragma once

#include "backward_kernels.cuh"
#include "backward_on_chip.cuh"
#include "launch.cuh"

namespace bnext::cuda {

// A kernel of its own has what most networks ask for: batch statistics, and grad_input.
template <typename scalar_t>
Fusion fusion_of(const BackwardElements<scalar_t>& elements) {
  if (elements.frozen || elements.grad_input == nullptr) {
    return Fusion::kAny;
  }
  if (elements.activation == Activation::kRelu && elements.derivative == Derivative::kFromOutput) {
    return Fusion::kReluResidual;
  }
  if (elements.grad_residual != nullptr) {
    return Fusion::kAny;
  }
  return elements.activation == Activation::kRelu   ? Fusion::kRelu
         : elements.activation == Activation::kNone ? Fusion::kNone
                                                    : Fusion::kAny;
}

template <typename scalar_t>
cudaError_t BackwardLaunches<scalar_t>::reduce(
    const Launch& launch, const GradReduceArgs<scalar_t>& args, cudaStream_t stream) {
  return with_layout<scalar_t>(launch, [&]<bool kRows, int kVec, typename index_t>() {
    const auto kernel = with_fusion<scalar_t, kVec, index_t, false>(
        fusion_of(args.elements), [&]<Fusion kFusion>() {
      return &grad_reduce_kernel<scalar_t, kRows, kVec, index_t, kFusion>;
    });
    return start(kernel, args, launch, stream);
  });
}

template <typename scalar_t>
cudaError_t BackwardLaunches<scalar_t>::apply(
    const Launch& launch, const GradApplyArgs<scalar_t>& args, cudaStream_t stream) {
  return with_layout<scalar_t>(launch, [&]<bool kRows, int kVec, typename index_t>() {
    const auto kernel = with_fusion<scalar_t, kVec, index_t, false>(
        fusion_of(args.elements), [&]<Fusion kFusion>() {
      return &grad_apply_kernel<scalar_t, kRows, kVec, index_t, kFusion>;
    });
    return start(kernel, args, launch, stream);
  });
}

template <typename scalar_t, bool kRows, int kVec>
auto backward_on_chip(const BackwardElements<scalar_t>& elements) {
  return with_fusion<scalar_t, kVec, int, true>(fusion_of(elements), [&]<Fusion kFusion>() {
    return &backward_on_chip_kernel<scalar_t, kRows, kVec, kFusion>;
  });
}

template <typename scalar_t>
cudaError_t BackwardLaunches<scalar_t>::on_chip(
    const Launch& launch, const BackwardOnChipArgs<scalar_t>& args, cudaStream_t stream) {
  return with_layout_on_chip<scalar_t>(launch, [&]<bool kRows, int kVec>() {
    return start(backward_on_chip<scalar_t, kRows, kVec>(args.elements), args, launch, stream);
  });
}

template <typename scalar_t>
cudaError_t BackwardLaunches<scalar_t>::on_chip_occupancy(
    const Launch& launch, const BackwardElements<scalar_t>& elements, int* blocks_per_sm) {
  return with_layout_on_chip<scalar_t>(launch, [&]<bool kRows, int kVec>() {
    return occupancy(backward_on_chip<scalar_t, kRows, kVec>(elements), launch, blocks_per_sm);
  });
}

}  // namespace bnext::cuda
