// Forward: reduce, apply, and both in one kernel that keeps its piece on chip.
#pragma once

#include "elements.cuh"
#include "moments.cuh"

namespace bnext::cuda {

// Which piece a block works on. Tiles are innermost: neighbouring blocks read neighbouring memory.
struct Work {
  std::int64_t ghost;
  std::int32_t tile;
  std::int32_t split;

  __device__ __forceinline__ Work(const Tiling& tiling, unsigned block) {
    const unsigned tiles = tiling.tiles, splits = tiling.splits();
    tile = static_cast<std::int32_t>(block % tiles);
    split = static_cast<std::int32_t>(block / tiles % splits);
    ghost = block / tiles / splits;
  }
};

// Loads vectors for the moments, and keeps a copy in shared memory where there is a cache.
template <typename scalar_t, bool kRows, int kVec, typename index_t, bool kCached>
struct ReduceVisitor {
  static constexpr Reuse kReuse = kCached ? Reuse::kNever : Reuse::kSoon;

  const scalar_t* input;  // of the piece
  scalar_t* cache;
  ThreadMoments<scalar_t, Position<kRows, kVec>::kLanes> moments;

  template <int n>
  __device__ __forceinline__ void vectors(
      index_t offset, index_t step, int cache_offset, int cache_step) {
    Raw<scalar_t, kVec> raw[n];
    BNEXT_UNROLL
    for (int u = 0; u < n; ++u) {
      raw[u] = load_raw<kReuse, kVec>(input + (offset + u * step));
    }
    if constexpr (kCached) {
      BNEXT_UNROLL
      for (int u = 0; u < n; ++u) {
        *reinterpret_cast<Raw<scalar_t, kVec>*>(cache + cache_offset + u * cache_step) = raw[u];
      }
    }
    moments.add(raw);
  }

  __device__ __forceinline__ void scalar(index_t offset, int cache_offset) {
    const Raw<scalar_t, 1> raw[1] = {load_raw<kReuse, 1>(input + offset)};
    if constexpr (kCached) {
      cache[cache_offset] = raw[0].bits;
    }
    if constexpr (!kRows) {
      moments.add(raw);
    }
  }
};

// From global or shared memory to the output.
template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion, bool kCached>
struct ApplyVisitor {
  using acc_t = AccType<scalar_t>;
  static constexpr int kLanes = Position<kRows, kVec>::kLanes;

  const scalar_t* input;  // of the piece, as the next two
  const scalar_t* residual;
  scalar_t* output;
  const scalar_t* cache;
  Activation activation;
  ForwardLanes<acc_t, kLanes> constants;

  template <int n>
  __device__ __forceinline__ void vectors(
      index_t offset, index_t step, int cache_offset, int cache_step) {
    apply<n, kVec>(offset, step, cache_offset, cache_step);
  }
  __device__ __forceinline__ void scalar(index_t offset, int cache_offset) {
    if constexpr (!kRows) {
      apply<1, 1>(offset, 0, cache_offset, 0);
    }
  }

 private:
  template <int n, int kWidth>
  __device__ __forceinline__ void apply(
      index_t offset, index_t step, int cache_offset, int cache_step) {
    const bool has_residual =
        kFusion == Fusion::kReluResidual || (kFusion == Fusion::kAny && residual != nullptr);
    // The loops that decide at run time hold fewer vectors: their code is long already.
    constexpr int kBatch = kFusion == Fusion::kAny ? (n + 1) / 2 : n;
    for (int first = 0; first < n; first += kBatch) {
      Raw<scalar_t, kWidth> raw[kBatch], added[kBatch];
      BNEXT_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        const index_t at = offset + (first + u) * step;
        if constexpr (kCached) {
          raw[u] = *reinterpret_cast<const Raw<scalar_t, kWidth>*>(
              cache + cache_offset + (first + u) * cache_step);
        } else {
          raw[u] = load_raw<Reuse::kNever, kWidth>(input + at);
        }
        if (has_residual) {
          added[u] = load_raw<Reuse::kNever, kWidth>(residual + at);
        }
      }
      BNEXT_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        acc_t x[kWidth];
        unpack(raw[u], x);
        forward_vector<kFusion>(x, added[u], has_residual, constants, activation);
        store_raw(output + (offset + (first + u) * step), pack<scalar_t, kWidth>(x));
      }
    }
  }
};

// (count, mean, M2) of every piece; the last block of a ghost merges its pieces, the last of a tile
// its ghosts, and updates the running statistics.
template <typename scalar_t, bool kRows, int kVec, typename index_t>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm)
    reduce_kernel(const __grid_constant__ ReduceArgs<scalar_t> args) {
  using At = Position<kRows, kVec>;
  const Tiling& tiling = args.tiling;
  const Work work(tiling, blockIdx.x);
  const Piece piece = tiling.piece(kRows, work.ghost, work.tile, work.split);
  ReduceVisitor<scalar_t, kRows, kVec, index_t, false> visitor{args.input + piece.offset, nullptr};
  walk<kRows, kVec, index_t>(tiling, piece, visitor);

  const Shared<scalar_t> shared{At::tile_channels()};
  double* scratch = shared.scratch();
  const int thread = At::thread();
  Welford<double> welford = visitor.moments.template over_block<kRows, kVec>(piece.count, scratch);
  const Counters& counters = args.workspace.counters;
  if (tiling.splits() > 1) {
    const TripleSets sets =
        args.workspace.pieces.at(work.tile, piece.channel, work.ghost * tiling.splits());
    store_triples(sets, work.split, piece, thread, welford);
    unsigned* counter = counters.pieces + work.ghost * tiling.tiles + work.tile;
    if (!arrive_last(counter, tiling.splits(), shared.flag())) {
      return;
    }
    welford = merge_triples<kRows, kVec>(
        sets, tiling.splits(), piece, tiling.ghost_count(work.ghost), scratch);
  }
  const StatsOutputs<scalar_t>& outputs = args.outputs;
  if (thread < piece.n_channel) {
    finish_ghost(outputs, work.ghost * tiling.n_channel + piece.channel + thread, welford);
  }
  if (outputs.count != nullptr && work.tile == 0 && thread == 0) {
    __stwb(outputs.count + work.ghost, static_cast<std::int64_t>(welford.count));
  }
  if (!outputs.running.given()) {
    return;
  }
  if (tiling.num_ghosts > 1) {
    const TripleSets ghosts = args.workspace.ghosts.at(work.tile, piece.channel, 0);
    store_triples(ghosts, work.ghost, piece, thread, welford);
    if (!arrive_last(
            counters.ghosts + work.tile, static_cast<unsigned>(tiling.num_ghosts), shared.flag())) {
      return;
    }
    welford =
        merge_triples<kRows, kVec>(ghosts, tiling.num_ghosts, piece, tiling.batch_count(), scratch);
  }
  if (thread < piece.n_channel) {
    update_running<scalar_t>(outputs.running, piece.channel + thread, welford);
  }
  count_batch(outputs.running, counters.tiles, tiling.tiles, shared.flag());
}

// The statistics that normalise a channel, and in eval the saved ones, which it writes.
template <typename scalar_t>
__device__ __forceinline__ ChannelStats<AccType<scalar_t>> stats_to_apply(
    const ApplyArgs<scalar_t>& args, const Work& work, std::int64_t channel, bool writes) {
  using acc_t = AccType<scalar_t>;
  const std::int64_t at = work.ghost * args.tiling.n_channel + channel;
  const SavedStats<scalar_t>& saved = args.saved;
  if (!args.eval) {
    return {__ldcg(saved.mean + at), __ldcg(saved.mean_lo + at), __ldcg(saved.invstd + at)};
  }
  const acc_t mean = get<scalar_t>(args.running.mean, channel, 0);
  const acc_t var = get<scalar_t>(args.running.var, channel, 1);
  const ChannelStats<acc_t> stats{mean, acc_t(0), inverse_std<acc_t>(var, args.eps)};
  if (writes) {
    __stwb(saved.mean + channel, stats.mean);
    __stwb(saved.mean_lo + channel, stats.mean_lo);
    __stwb(saved.invstd + channel, stats.invstd);
  }
  return stats;
}

template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm)
    apply_kernel(const __grid_constant__ ApplyArgs<scalar_t> args) {
  using At = Position<kRows, kVec>;
  const Tiling& tiling = args.tiling;
  // Backwards: what reduce read last is what the L2 cache still holds.
  const Work work(tiling, gridDim.x - 1 - blockIdx.x);
  const Piece piece = tiling.piece(kRows, work.ghost, work.tile, work.split);
  const ForwardElements<scalar_t>& elements = args.elements;
  ApplyVisitor<scalar_t, kRows, kVec, index_t, kFusion, false> visitor{
      elements.input + piece.offset,
      elements.residual == nullptr ? nullptr : elements.residual + piece.offset,
      elements.output + piece.offset, nullptr, elements.activation};
  const auto constants = Shared<scalar_t>{At::tile_channels()}.constants();
  const int thread = At::thread();
  if (thread < piece.n_channel) {
    const std::int64_t channel = piece.channel + thread;
    const auto stats = stats_to_apply(args, work, channel, work.split == 0);
    constants.set(thread, constants_of<scalar_t>(stats, elements.weight, elements.bias, channel));
  }
  __syncthreads();
  constants.get(At::channel(), visitor.constants);
  walk<kRows, kVec, index_t>(tiling, piece, visitor);
}

}  // namespace bnext::cuda
