// Teams of blocks that hold one (ghost, tile) on chip between them.
#pragma once

#include "block_reduce.cuh"
#include "kernel_args.h"

namespace bnext::cuda {

// A block's team and its place in it.
struct Member {
  int team;
  std::int32_t split;

  __device__ __forceinline__ explicit Member(const Tiling& tiling) {
    team = static_cast<int>(blockIdx.x / tiling.splits());
    split = static_cast<std::int32_t>(blockIdx.x % tiling.splits());
  }

  // The first set of the team's workspace in a round. Two buffers by turns: a block may be one
  // round ahead of another of its team, never two.
  __device__ __forceinline__ std::int64_t buffer(const Tiling& tiling, int round) const {
    return (static_cast<std::int64_t>(team) * 2 + round % 2) * tiling.splits();
  }

  // Returns when all blocks of the team have written what they write before; counts the rounds.
  __device__ __forceinline__ void meet(const Tiling& tiling, const Teams& teams, int& round) const {
    ++round;
    team_barrier(teams.barriers + team, static_cast<unsigned>(round) * tiling.splits());
  }

  // The last block to leave sets the team's barrier back to zero, for the next launch.
  __device__ __forceinline__ void leave(
      const Tiling& tiling, const Teams& teams, const Counters& counters, int* flag) const {
    if (tiling.splits() > 1 && arrive_last(counters.pieces + team, tiling.splits(), flag) &&
        threadIdx.x == 0 && threadIdx.y == 0) {
      atomicExch(teams.barriers + team, 0u);
    }
  }
};

}  // namespace bnext::cuda
