// What the kernels are given: raw pointers and numbers. Pointers to elements are those of whole
// tensors; per-channel arrays of the statistics are (num_ghosts, C), contiguous.
#pragma once

#include <cstdint>

#include "../core/activation.h"
#include "../core/math.h"
#include "tiling.h"

namespace bnext::cuda {

// A per-channel tensor of any stride, of the input's type or of its acc type; null if not given.
struct ChannelArray {
  void* data = nullptr;
  std::int64_t stride = 1;
  bool is_acc = true;
};

// (count, mean, M2) of the channels of several sets, in global memory between the blocks. Of one
// tile: set i has its values of channel c at i * stride + c.
struct TripleSets {
  double* count;
  double* mean;
  double* m2;
  std::int64_t stride;
  std::int64_t count_stride;

  // Those of another tile, and from another set on.
  BNEXT_HD TripleSets at(std::int64_t tile, std::int64_t channel, std::int64_t set) const {
    return {
        count + set * count_stride + tile, mean + set * stride + channel,
        m2 + set * stride + channel, stride, count_stride};
  }
};

// Sums of dy and of dy * (x - mean) (or of dy * xhat), likewise.
struct SumSets {
  double* dy;
  double* dy_xmu;
  std::int64_t stride;

  BNEXT_HD SumSets at(std::int64_t, std::int64_t channel, std::int64_t set) const {
    return {dy + set * stride + channel, dy_xmu + set * stride + channel, stride};
  }
};

// Counts arrivals: for each (ghost, tile), for each tile, and of the tiles. Zero before and after a
// launch.
struct Counters {
  unsigned* pieces;
  unsigned* ghosts;
  unsigned* tiles;
};

// What lies between the blocks of one launch.
template <typename Sets>
struct Workspace {
  Sets pieces;  // of each piece: set ghost * splits + split, or (team * 2 + buffer) * (splits + 1)
                // + split
  Sets ghosts;  // of each ghost, or of what each team has seen
  Counters counters;
};

template <typename scalar_t>
struct SavedStats {
  using acc_t = AccType<scalar_t>;
  acc_t* mean;
  acc_t* mean_lo;
  acc_t* invstd;
};

struct RunningStats {
  ChannelArray mean;
  ChannelArray var;
  std::int64_t* num_batches = nullptr;
  double momentum = 0;
  bool cumulative = false;

  BNEXT_HD bool given() const { return mean.data != nullptr || num_batches != nullptr; }
};

// Where the statistics of a reduction go; null pointers are not written.
template <typename scalar_t>
struct StatsOutputs {
  std::int64_t* count = nullptr;  // the op batch_norm_reduce: triples
  double* mean = nullptr;
  double* m2 = nullptr;
  SavedStats<scalar_t> saved{};
  double eps = 0;
  RunningStats running;
};

template <typename scalar_t>
struct ReduceArgs {
  Tiling tiling;
  const scalar_t* input;
  StatsOutputs<scalar_t> outputs;
  Workspace<TripleSets> workspace;
};

// The pointers of activation(normalise(input) + residual).
template <typename scalar_t>
struct ForwardElements {
  const scalar_t* input;
  const scalar_t* residual;  // null if not given
  scalar_t* output;
  ChannelArray weight;
  ChannelArray bias;
  Activation activation;
};

template <typename scalar_t>
struct ApplyArgs {
  Tiling tiling;
  ForwardElements<scalar_t> elements;
  SavedStats<scalar_t> saved;
  // Eval: the statistics are the running ones, and are written to `saved`.
  bool eval;
  double eps;
  RunningStats running;
};

// How the teams of a launch share the work: a team of `splits` blocks holds one (ghost, tile) on
// chip at a time, and takes every tile_teams-th tile and every ghost_teams-th ghost.
struct Teams {
  std::int32_t tile_teams;
  std::int32_t ghost_teams;
  std::int32_t cache_elements;  // of one tensor's piece in shared memory
  unsigned* barriers;           // two counters a team, zero before and after; null for lone blocks
};

template <typename scalar_t>
struct ForwardOnChipArgs {
  Tiling tiling;
  Teams teams;
  ForwardElements<scalar_t> elements;
  StatsOutputs<scalar_t> outputs;
  Workspace<TripleSets> workspace;
};

template <typename scalar_t>
struct BackwardElements {
  using acc_t = AccType<scalar_t>;
  const scalar_t* grad_output;
  const scalar_t* input;
  const scalar_t* extra;    // the residual or the output, as `derivative` says; else null
  scalar_t* grad_input;     // null if not wanted
  scalar_t* grad_residual;  // null if not wanted
  ChannelArray weight;
  ChannelArray bias;
  const acc_t* mean;
  const acc_t* mean_lo;
  const acc_t* invstd;
  Activation activation;
  Derivative derivative;
  bool frozen;  // statistics are constants: grad_input = dy * scale
};

// Where the sums of a backward reduction go; null pointers are not written.
template <typename scalar_t>
struct GradOutputs {
  using acc_t = AccType<scalar_t>;
  double* sum_dy = nullptr;  // (num_ghosts, C)
  double* sum_dy_xmu = nullptr;
  acc_t* coef_x = nullptr;  // (num_ghosts, C): constants of grad_apply
  acc_t* coef_0 = nullptr;
  acc_t* grad_weight = nullptr;  // (C,)
  acc_t* grad_bias = nullptr;
};

template <typename scalar_t>
struct GradReduceArgs {
  Tiling tiling;
  BackwardElements<scalar_t> elements;
  GradOutputs<scalar_t> outputs;
  Workspace<SumSets> workspace;
};

template <typename scalar_t>
struct GradApplyArgs {
  using acc_t = AccType<scalar_t>;
  Tiling tiling;
  BackwardElements<scalar_t> elements;
  const acc_t* coef_x;  // null for frozen statistics
  const acc_t* coef_0;
};

template <typename scalar_t>
struct BackwardOnChipArgs {
  Tiling tiling;
  Teams teams;
  BackwardElements<scalar_t> elements;
  GradOutputs<scalar_t> outputs;
  Workspace<SumSets> workspace;
};

// The ops between reduce and apply, over (num_ghosts, C) values.
struct MergeArgs {
  const std::int64_t* count;  // [num_sets]
  const double* mean;         // [num_sets, C]
  const double* m2;
  std::int64_t* merged_count;  // [1]; null if not wanted, as the next two
  double* merged_mean;         // [1, C]
  double* merged_m2;
  std::int64_t num_sets;
  std::int64_t n_channel;
};

template <typename scalar_t>
struct FoldArgs {
  MergeArgs sets;
  SavedStats<scalar_t> saved;
  double eps;
  RunningStats running;
  unsigned* blocks_done;  // a counter of arrivals, zero before and after
};

template <typename scalar_t>
struct GradFoldArgs {
  using acc_t = AccType<scalar_t>;
  const std::int64_t* count;  // [num_ghosts]
  const double* sum_dy;       // [num_ghosts, C]
  const double* sum_dy_xmu;
  const acc_t* mean_lo;
  const acc_t* invstd;
  ChannelArray weight;
  acc_t* coef_x;
  acc_t* coef_0;
  std::int64_t num_ghosts;
  std::int64_t n_channel;
};

}  // namespace bnext::cuda
