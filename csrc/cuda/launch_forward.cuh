// The launches of forward for one dtype.
#pragma once

#include "forward_kernels.cuh"
#include "forward_on_chip.cuh"
#include "launch.cuh"

namespace bnext::cuda {

template <typename scalar_t>
Fusion fusion_of(const ForwardElements<scalar_t>& elements) {
  if (elements.activation == Activation::kRelu) {
    return elements.residual == nullptr ? Fusion::kRelu : Fusion::kReluResidual;
  }
  const bool plain = elements.activation == Activation::kNone && elements.residual == nullptr;
  return plain ? Fusion::kNone : Fusion::kAny;
}

template <typename scalar_t>
cudaError_t ForwardLaunches<scalar_t>::reduce(
    const Launch& launch, const ReduceArgs<scalar_t>& args, cudaStream_t stream) {
  return with_layout<scalar_t>(launch, [&]<bool kRows, int kVec, typename index_t>() {
    return start(&reduce_kernel<scalar_t, kRows, kVec, index_t>, args, launch, stream);
  });
}

template <typename scalar_t>
cudaError_t ForwardLaunches<scalar_t>::apply(
    const Launch& launch, const ApplyArgs<scalar_t>& args, cudaStream_t stream) {
  return with_layout<scalar_t>(launch, [&]<bool kRows, int kVec, typename index_t>() {
    const auto kernel = with_fusion<scalar_t, kVec, index_t, false>(
        fusion_of(args.elements),
        [&]<Fusion kFusion>() { return &apply_kernel<scalar_t, kRows, kVec, index_t, kFusion>; });
    return start(kernel, args, launch, stream);
  });
}

template <typename scalar_t, bool kRows, int kVec>
auto forward_on_chip(const ForwardElements<scalar_t>& elements) {
  return with_fusion<scalar_t, kVec, int, true>(fusion_of(elements), [&]<Fusion kFusion>() {
    return &forward_on_chip_kernel<scalar_t, kRows, kVec, kFusion>;
  });
}

template <typename scalar_t>
cudaError_t ForwardLaunches<scalar_t>::on_chip(
    const Launch& launch, const ForwardOnChipArgs<scalar_t>& args, cudaStream_t stream) {
  return with_layout_on_chip<scalar_t>(launch, [&]<bool kRows, int kVec>() {
    return start(forward_on_chip<scalar_t, kRows, kVec>(args.elements), args, launch, stream);
  });
}

template <typename scalar_t>
cudaError_t ForwardLaunches<scalar_t>::on_chip_occupancy(
    const Launch& launch, const ForwardElements<scalar_t>& elements, int* blocks_per_sm) {
  return with_layout_on_chip<scalar_t>(launch, [&]<bool kRows, int kVec>() {
    return occupancy(forward_on_chip<scalar_t, kRows, kVec>(elements), launch, blocks_per_sm);
  });
}

}  // namespace bnext::cuda
