// The launches: raw pointers and a plan in, an error code out. Defined in the .cu files, one a
// dtype and direction, so that they compile in parallel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "kernel_args.h"
#include "launch_config.h"

namespace bnext::cuda {

template <typename scalar_t>
struct ForwardLaunches {
  static cudaError_t reduce(const Launch&, const ReduceArgs<scalar_t>&, cudaStream_t);
  static cudaError_t apply(const Launch&, const ApplyArgs<scalar_t>&, cudaStream_t);
  static cudaError_t on_chip(const Launch&, const ForwardOnChipArgs<scalar_t>&, cudaStream_t);
  // Blocks of the on-chip kernel that a multiprocessor of the current device holds.
  static cudaError_t on_chip_occupancy(
      const Launch&, const ForwardElements<scalar_t>&, int* blocks_per_sm);
};

template <typename scalar_t>
struct BackwardLaunches {
  static cudaError_t reduce(const Launch&, const GradReduceArgs<scalar_t>&, cudaStream_t);
  static cudaError_t apply(const Launch&, const GradApplyArgs<scalar_t>&, cudaStream_t);
  static cudaError_t on_chip(const Launch&, const BackwardOnChipArgs<scalar_t>&, cudaStream_t);
  static cudaError_t on_chip_occupancy(
      const Launch&, const BackwardElements<scalar_t>&, int* blocks_per_sm);
};

// Blocks of fold_kernel, for whose arrivals a counter is needed.
inline std::int64_t fold_blocks(std::int64_t threads) {
  return std::max<std::int64_t>(1, ceil_div(threads, kThreads));  // a launch of none is an error
}

cudaError_t launch_merge(const MergeArgs&, cudaStream_t);

template <typename scalar_t>
struct FoldLaunches {
  static cudaError_t fold(const FoldArgs<scalar_t>&, cudaStream_t);
  static cudaError_t grad_fold(const GradFoldArgs<scalar_t>&, cudaStream_t);
};

}  // namespace bnext::cuda
