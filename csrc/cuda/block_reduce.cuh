// Sums over the threads of a block, and which block arrives last. Orders are fixed, so that sums
// have the same bits in every run.
#pragma once

#include "walk.cuh"

namespace bnext::cuda {

// Two sums of one channel: of d and d * d, or of dy and dy * (x - mean).
struct PairOfSums {
  double a = 0;
  double b = 0;
};

constexpr unsigned kFullWarp = 0xffffffffu;

// Adds up the sums of all parts of each channel of the tile, `lane_sums(k)` the thread's own of
// lane k. Thread t gets those of channel t, t < tile_channels(); `scratch` may be reused after a
// barrier.
template <bool kRows, int kVec, typename LaneSums>
__device__ __forceinline__ PairOfSums sum_over_block(LaneSums&& lane_sums, double* scratch) {
  using At = Position<kRows, kVec>;
  const int channels = At::tile_channels();
  const int thread = At::thread();
  double* own = scratch + 2 * (thread / kWarp) * channels + At::channel();
  BNEXT_UNROLL
  for (int k = 0; k < At::kLanes; ++k) {
    PairOfSums sums = lane_sums(k);
    // Lanes of one column are columns() apart: a power of two, at most a warp.
    for (int offset = kWarp / 2; offset >= At::columns(); offset /= 2) {
      sums.a += __shfl_xor_sync(kFullWarp, sums.a, offset);
      sums.b += __shfl_xor_sync(kFullWarp, sums.b, offset);
    }
    if (thread % kWarp < At::columns()) {
      own[k] = sums.a;
      own[channels + k] = sums.b;
    }
  }
  __syncthreads();
  PairOfSums total;
  if (thread < channels) {
    for (int w = 0; w < kThreads / kWarp; ++w) {
      total.a += scratch[2 * w * channels + thread];
      total.b += scratch[(2 * w + 1) * channels + thread];
    }
  }
  return total;
}

// True in all threads of the block that is the last of `expected` to arrive; it sees what the
// others wrote before they arrived. The counter is left at zero for the next launch.
__device__ __forceinline__ bool arrive_last(unsigned* counter, unsigned expected, int* flag) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    __threadfence();  // the block's writes before its arrival ...
    const bool last = atomicAdd(counter, 1u) == expected - 1;
    if (last) {
      atomicExch(counter, 0u);
    }
    __threadfence();  // ... and the reads of others' after it
    *flag = last ? 1 : 0;
  }
  __syncthreads();
  return *flag != 0;
}

}  // namespace bnext::cuda
