// Teams of blocks that hold one (ghost, tile) on chip between them. All blocks of a team are
// resident, which a cooperative launch guarantees, so that they may wait for each other.
#pragma once

#include "block_reduce.cuh"
#include "kernel_args.h"

namespace bnext::cuda {

// A block's team and its place in it. In each round all blocks of a team bring a partial result,
// the last to arrive merges them, and releases the others.
struct Member {
  int team;
  std::int32_t split;

  __device__ __forceinline__ explicit Member(const Tiling& tiling) {
    team = static_cast<int>(blockIdx.x / tiling.splits());
    split = static_cast<std::int32_t>(blockIdx.x % tiling.splits());
  }

  // The first set of the team's workspace in a round: one a block, and one for the merge. Two
  // buffers by turns: a block may be one round ahead of another of its team, never two.
  __device__ __forceinline__ std::int64_t buffer(const Tiling& tiling, int round) const {
    return (static_cast<std::int64_t>(team) * 2 + round % 2) * (tiling.splits() + 1);
  }

  // Whether all others have arrived in this round, and what they wrote before is visible.
  __device__ __forceinline__ bool arrive_last(
      const Tiling& tiling, const Teams& teams, int round, int* flag) const {
    __syncthreads();
    if (first_thread()) {
      const unsigned all = static_cast<unsigned>(round + 1) * tiling.splits();
      __threadfence();  // the block's writes before its arrival ...
      *flag = atomicAdd(arrivals(teams), 1u) == all - 1 ? 1 : 0;
      __threadfence();  // ... and the reads of others' after it
    }
    __syncthreads();
    return *flag != 0;
  }

  // By the last: what it has written is there for the others.
  __device__ __forceinline__ void release(const Teams& teams, int round) const {
    __syncthreads();
    if (first_thread()) {
      __threadfence();
      atomicExch(releases(teams), static_cast<unsigned>(round + 1));
    }
  }

  // By the others.
  __device__ __forceinline__ void wait(const Teams& teams, int round) const {
    if (first_thread()) {
      while (atomicAdd(releases(teams), 0u) < static_cast<unsigned>(round + 1)) {
        __nanosleep(32);
      }
      __threadfence();
    }
    __syncthreads();
  }

  // The last block to leave sets the team's counters back to zero, for the next launch.
  __device__ __forceinline__ void leave(
      const Tiling& tiling, const Teams& teams, const Counters& counters, int* flag) const {
    if (tiling.splits() > 1 && cuda::arrive_last(counters.pieces + team, tiling.splits(), flag) &&
        first_thread()) {
      atomicExch(arrivals(teams), 0u);
      atomicExch(releases(teams), 0u);
    }
  }

 private:
  __device__ __forceinline__ static bool first_thread() {
    return threadIdx.x == 0 && threadIdx.y == 0;
  }
  __device__ __forceinline__ unsigned* arrivals(const Teams& teams) const {
    return teams.barriers + 2 * team;
  }
  __device__ __forceinline__ unsigned* releases(const Teams& teams) const {
    return teams.barriers + 2 * team + 1;
  }
};

}  // namespace bnext::cuda
