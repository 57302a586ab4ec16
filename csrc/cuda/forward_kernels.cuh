// Forward in two passes: reduce, which also folds, and apply. forward_on_chip.cuh makes one of
// them.
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

// Fewer where eight channels a thread leave no registers for more, beside what a kernel on chip
// keeps of its work.
template <bool kRows, int kVec, typename index_t, bool kCached>
constexpr int kAtOnceFor = kCached && kRows && kVec == 8 ? kUnroll / 2 : kUnrollFor<index_t>;

// Loads vectors for the moments, and keeps a copy in shared memory where there is a cache.
template <typename scalar_t, bool kRows, int kVec, typename index_t, bool kCached>
class ReduceVisitor {
 public:
  static constexpr int kGroupsPerBlock = cuda::kGroupsPerBlock<scalar_t>;
  static constexpr int kAtOnce = kAtOnceFor<kRows, kVec, index_t, kCached>;

  __device__ __forceinline__ ReduceVisitor(const scalar_t* piece, scalar_t* cache)
      : piece_(piece), cache_(cache) {}

  __device__ __forceinline__ void seek(index_t offset, int cache) {
    input_ = piece_ + offset;
    cached_ = cache;
  }
  __device__ __forceinline__ void advance(index_t step, int cache_step) {
    input_ += step;
    cached_ += cache_step;
  }

  template <int n>
  __device__ __forceinline__ void first_vectors(index_t step, int cache_step) {
    Raw<scalar_t, kVec> raw[n];
    load(raw, input_, cached_, step, cache_step);
    moments.start_block(raw);
    moments.add(raw);
  }

  // Single vectors and elements, which no block may have been started for, look for themselves.
  template <int n>
  __device__ __forceinline__ void vectors(index_t step, int cache_step) {
    Raw<scalar_t, kVec> raw[n];
    load(raw, input_, cached_, step, cache_step);
    if constexpr (n > 1) {
      moments.add(raw);
    } else {
      moments.add_single(raw);
    }
  }

  __device__ __forceinline__ void scalar(index_t offset, int cache) {
    if constexpr (!kRows) {
      Raw<scalar_t, 1> raw[1];
      load(raw, piece_ + offset, cache, 0, 0);
      moments.add_single(raw);
    }
  }

  ThreadMoments<scalar_t, Position<kRows, kVec>::kLanes> moments;

 private:
  template <int n, int kWidth>
  __device__ __forceinline__ void load(
      Raw<scalar_t, kWidth> (&raw)[n],
      const scalar_t* input,
      int cached,
      index_t step,
      int cache_step) const {
    constexpr Reuse kReuse = kCached ? Reuse::kNever : Reuse::kSoon;
    BNEXT_UNROLL
    for (int u = 0; u < n; ++u) {
      raw[u] = load_raw<kReuse, kWidth>(input + u * step);
    }
    if constexpr (kCached) {
      BNEXT_UNROLL
      for (int u = 0; u < n; ++u) {
        store_shared(cache_ + cached + u * cache_step, raw[u]);
      }
    }
  }

  const scalar_t* piece_;
  scalar_t* cache_;
  const scalar_t* input_ = nullptr;
  int cached_ = 0;
};

// From global or shared memory to the output.
template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion, bool kCached>
class ApplyVisitor {
  using acc_t = AccType<scalar_t>;
  static constexpr int kLanes = Position<kRows, kVec>::kLanes;

 public:
  static constexpr int kGroupsPerBlock = 1;
  static constexpr int kAtOnce = kAtOnceFor<kRows, kVec, index_t, kCached>;

  __device__ __forceinline__
  ApplyVisitor(const ForwardElements<scalar_t>& elements, const Piece& piece, const scalar_t* cache)
      : elements_(elements),
        piece_(piece.offset),
        cache_(cache),
        has_residual_(
            kFusion == Fusion::kReluResidual ||
            (kFusion == Fusion::kAny && elements.residual != nullptr)) {}

  __device__ __forceinline__ void seek(index_t offset, int cache) {
    if constexpr (!kCached) {
      input_ = elements_.input + piece_ + offset;
    }
    if (has_residual_) {
      residual_ = elements_.residual + piece_ + offset;
    }
    output_ = elements_.output + piece_ + offset;
    cached_ = cache;
  }
  __device__ __forceinline__ void advance(index_t step, int cache_step) {
    if constexpr (!kCached) {
      input_ += step;
    }
    if (has_residual_) {
      residual_ += step;
    }
    output_ += step;
    cached_ += cache_step;
  }

  template <int n>
  __device__ __forceinline__ void vectors(index_t step, int cache_step) {
    // The loops that decide at run time hold fewer vectors: their code is long already.
    constexpr int kBatch = kFusion == Fusion::kAny ? (n + 1) / 2 : n;
    BNEXT_NO_UNROLL
    for (int first = 0; first < n; first += kBatch) {
      apply<kBatch, kVec>(first, step, cache_step);
    }
  }

  __device__ __forceinline__ void scalar(index_t offset, int cache) {
    if constexpr (!kRows) {
      ApplyVisitor at = *this;
      at.seek(offset, cache);
      at.template apply<1, 1>(0, 0, 0);
    }
  }

  ForwardLanes<acc_t, kLanes> constants;

 private:
  // Places first, first + 1, ... of the series.
  template <int n, int kWidth>
  __device__ __forceinline__ void apply(int first, index_t step, int cache_step) const {
    Raw<scalar_t, kWidth> raw[n], added[n];
    BNEXT_UNROLL
    for (int u = 0; u < n; ++u) {
      if constexpr (kCached) {
        raw[u] = load_shared<kWidth>(cache_ + cached_ + (first + u) * cache_step);
      } else {
        raw[u] = load_raw<Reuse::kNever, kWidth>(input_ + (first + u) * step);
      }
      if (has_residual_) {
        added[u] = load_raw<Reuse::kNever, kWidth>(residual_ + (first + u) * step);
      }
    }
    BNEXT_UNROLL
    for (int u = 0; u < n; ++u) {
      acc_t x[kWidth];
      unpack(raw[u], x);
      forward_vector<kFusion>(x, added[u], has_residual_, constants, elements_.activation);
      store_raw(output_ + (first + u) * step, pack<scalar_t, kWidth>(x));
    }
  }

  const ForwardElements<scalar_t>& elements_;
  std::int64_t piece_;
  const scalar_t* cache_;
  bool has_residual_;
  const scalar_t* input_ = nullptr;
  const scalar_t* residual_ = nullptr;
  scalar_t* output_ = nullptr;
  int cached_ = 0;
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
  ReduceVisitor<scalar_t, kRows, kVec, index_t, false> visitor(args.input + piece.offset, nullptr);
  walk<kRows, kVec, index_t>(tiling, piece, visitor);

  const Shared<scalar_t> shared{At::tile_channels()};
  double* scratch = shared.scratch();
  const int thread = At::thread();
  const double base = base_of<kRows>(args.input, tiling, work.ghost, work.tile, thread);
  Welford<double> welford =
      visitor.moments.template over_block<kRows, kVec>(piece.count, base, scratch);
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
        sets, tiling.splits(), piece, tiling.ghost_count(work.ghost),
        1 / tiling.ghost_count(work.ghost), scratch);
  }
  const StatsOutputs<scalar_t>& outputs = args.outputs;
  if (thread < piece.n_channel) {
    finish_ghost(outputs, work.ghost * tiling.n_channel + piece.channel + thread, welford, base);
  }
  if (outputs.count != nullptr && work.tile == 0 && thread == 0) {
    __stwb(outputs.count + work.ghost, static_cast<std::int64_t>(welford.count));
  }
  if (!outputs.running.given()) {
    return;
  }
  const double batch_base = base_of<kRows>(args.input, tiling, 0, work.tile, thread);
  if (tiling.num_ghosts > 1) {
    const TripleSets ghosts = args.workspace.ghosts.at(work.tile, piece.channel, 0);
    store_triples(ghosts, work.ghost, piece, thread, rebase<scalar_t>(welford, base - batch_base));
    if (!arrive_last(
            counters.ghosts + work.tile, static_cast<unsigned>(tiling.num_ghosts), shared.flag())) {
      return;
    }
    welford = merge_triples<kRows, kVec>(
        ghosts, tiling.num_ghosts, piece, tiling.batch_count(), tiling.one_over_batch_count,
        scratch);
  }
  if (thread < piece.n_channel) {
    update_running<scalar_t>(outputs.running, piece.channel + thread, welford, batch_base);
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
  ApplyVisitor<scalar_t, kRows, kVec, index_t, kFusion, false> visitor(elements, piece, nullptr);
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
