// From a plan to one of a kernel's instances, and its launch.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "elements.cuh"
#include "launch.h"
#include "launch_state.h"

namespace bnext::cuda {

template <typename Args>
cudaError_t start(
    void (*kernel)(Args),
    const Args& args,
    dim3 grid,
    dim3 block,
    int shared_bytes,
    bool cooperative,
    cudaStream_t stream) {
  if (const cudaError_t error =
          opt_in_to_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
      error != cudaSuccess) {
    return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename Args>
cudaError_t start(
    void (*kernel)(Args), const Args& args, const Launch& launch, cudaStream_t stream) {
  if (launch.blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  return start(
      kernel, args, dim3(static_cast<unsigned>(launch.blocks)),
      dim3(launch.threads_x, launch.threads_y), launch.shared_bytes, launch.cooperative, stream);
}

template <typename Args>
cudaError_t occupancy(void (*kernel)(Args), const Launch& launch, int* blocks_per_sm) {
  if (const cudaError_t error =
          opt_in_to_shared(reinterpret_cast<const void*>(kernel), launch.shared_bytes);
      error != cudaSuccess) {
    return error;
  }
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      blocks_per_sm, kernel, kThreads, static_cast<std::size_t>(launch.shared_bytes));
}

// Calls f<kRows, kVec, index_t>(). Single elements always take the wide index: a slower path
// anyway, and a third fewer kernels.
template <typename scalar_t, typename F>
cudaError_t with_layout(const Launch& launch, F&& f) {
  constexpr int kVec = kVectorSize<scalar_t>;
  const auto with_rows = [&]<bool kRows>() {
    if (!launch.vector) {
      return f.template operator()<kRows, 1, std::int64_t>();
    }
    return launch.wide_index ? f.template operator()<kRows, kVec, std::int64_t>()
                             : f.template operator()<kRows, kVec, int>();
  };
  return launch.rows ? with_rows.template operator()<true>()
                     : with_rows.template operator()<false>();
}

// Calls f<kRows, kVec>(): offsets on chip are 32-bit.
template <typename scalar_t, typename F>
cudaError_t with_layout_on_chip(const Launch& launch, F&& f) {
  constexpr int kVec = kVectorSize<scalar_t>;
  if (launch.rows) {
    return launch.vector ? f.template operator()<true, kVec>() : f.template operator()<true, 1>();
  }
  return launch.vector ? f.template operator()<false, kVec>() : f.template operator()<false, 1>();
}

// Loops of their own are for vectors of float and half types with 32-bit offsets.
template <typename scalar_t, int kVec, typename index_t>
constexpr bool kHasFastPaths =
    kVec > 1 && !std::is_same_v<scalar_t, double> && std::is_same_v<index_t, int>;

// f<kFusion>(): the instance of a kernel for a fusion, which is kAny where it has none of its own.
// `kOnChip`: no instance for a residual, whose third tensor fits on chip in few cases.
template <typename scalar_t, int kVec, typename index_t, bool kOnChip, typename F>
auto with_fusion(Fusion fusion, F&& f) {
  if constexpr (kHasFastPaths<scalar_t, kVec, index_t>) {
    if (fusion == Fusion::kNone) {
      return f.template operator()<Fusion::kNone>();
    }
    if (fusion == Fusion::kRelu) {
      return f.template operator()<Fusion::kRelu>();
    }
    if constexpr (!kOnChip) {
      if (fusion == Fusion::kReluResidual) {
        return f.template operator()<Fusion::kReluResidual>();
      }
    }
  }
  return f.template operator()<Fusion::kAny>();
}

}  // namespace bnext::cuda
