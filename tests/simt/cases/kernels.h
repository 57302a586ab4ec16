// Two patterns whose every fence and barrier matters, and mutants that lack one each.
#pragma once

#include "cases.h"

namespace executor_cases {

enum Mutant {
  kClean,
  kNoBarrierInSum,
  kNoRelease,
  kNoAcquire,
  kNoBarrierBefore,
  kNoBarrierAfter,
  kSwappedFence,
};

template <int mutant>
__device__ float block_sum(float value) {
  __shared__ float part[32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
  if (mutant != kNoBarrierInSum) __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += part[i];
  __syncthreads();
  return sum;
}

// The last block adds up the sums of all blocks.
template <int mutant>
__global__ void last_block(
    const float* input, float* partial, unsigned* count, float* output, int size) {
  __shared__ bool last;
  float* staged = reinterpret_cast<float*>(bnext_shared);
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    sum += __ldg(input + i);
  }
  staged[threadIdx.x] = sum;
  sum = block_sum<mutant>(staged[threadIdx.x]);
  if (threadIdx.x == 0) {
    if (mutant == kSwappedFence) __threadfence();
    __stcg(partial + blockIdx.x, sum);
    if (mutant != kNoRelease && mutant != kSwappedFence) __threadfence();
    last = atomicAdd(count, 1u) == gridDim.x - 1;
    if (mutant != kNoAcquire) __threadfence();
  }
  if (mutant != kNoBarrierAfter) __syncthreads();
  if (!last) return;
  sum = block_sum<kClean>(threadIdx.x < gridDim.x ? __ldcg(partial + threadIdx.x) : 0.0f);
  if (threadIdx.x == 0) {
    __stcs(output, sum);
    *count = 0;
  }
}

template <int mutant>
__device__ void grid_barrier(unsigned* count) {
  if (mutant != kNoBarrierBefore) __syncthreads();
  if (threadIdx.x == 0) {
    if (mutant != kNoRelease) __threadfence();
    unsigned target = (atomicAdd(count, 1u) / gridDim.x + 1) * gridDim.x;
    while (atomicAdd(count, 0u) < target) __nanosleep(20);
    if (mutant != kNoAcquire) __threadfence();
  }
  if (mutant != kNoBarrierAfter) __syncthreads();
}

// a and b are passed on twice by one block and one thread; so many threads, so many ints.
template <int mutant>
__global__ void pass_on(int* a, int* b, unsigned* count) {
  unsigned all = gridDim.x * blockDim.x;
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned from = (i + blockDim.x + 1) % all;
  int* staged = reinterpret_cast<int*>(bnext_shared);
  staged[threadIdx.x] = int(i);
  __syncthreads();
  __stcg(a + i, staged[threadIdx.x]);
  grid_barrier<mutant>(count);
  __stcg(b + i, __ldcg(a + from));
  grid_barrier<mutant>(count);
  // Also that each block has got its own shared memory back.
  __stcg(a + i, __ldcg(b + from) - staged[threadIdx.x]);
}

}  // namespace executor_cases
