// Backward: grad_reduce and grad_apply, and what they share with the kernel that does both.
#pragma once

#include "forward_kernels.cuh"
#include "grad_sums.cuh"

namespace bnext::cuda {

// Where a kernel that keeps its piece on chip is: it fills its shared memory, or reads from it.
enum class Cache { kNone, kFill, kRead };

// Vectors of a group of n that are loaded together: one where the loop decides at run time what it
// does, since its code is long already, and three tensors give loads enough; half of them on chip,
// where registers are scarce.
template <Fusion kFusion, Cache kCache, int n>
constexpr int kGradBatch = kFusion == Fusion::kAny  ? 1
                           : kCache != Cache::kNone ? (n + 1) / 2
                                                    : n;

// The inputs of backward at n places, as they lie in memory.
template <typename scalar_t, int kWidth, int n>
struct GradGroup {
  Raw<scalar_t, kWidth> dy[n], x[n], extra[n];
};

// Where a thread stands in the inputs of backward, and the constants of its channels: what the two
// passes share.
template <typename scalar_t, int kLanes, typename index_t, Fusion kFusion>
class GradInputs {
  using acc_t = AccType<scalar_t>;

 public:
  __device__ __forceinline__ GradInputs(
      const BackwardElements<scalar_t>& elements,
      const Piece& piece,
      scalar_t* cache,
      int cache_elements)
      : elements_(elements),
        piece_(piece.offset),
        cache_(cache),
        cache_elements_(cache_elements),
        has_extra_(
            kFusion == Fusion::kReluResidual ||
            (kFusion == Fusion::kAny && elements.extra != nullptr)) {}

  template <Cache kCache>
  __device__ __forceinline__ void seek(index_t offset, int cache) {
    if constexpr (kCache != Cache::kRead) {
      grad_output_ = elements_.grad_output + piece_ + offset;
      input_ = elements_.input + piece_ + offset;
      if (has_extra_) {
        extra_ = elements_.extra + piece_ + offset;
      }
    }
    cached_ = cache;
  }

  template <Cache kCache>
  __device__ __forceinline__ void advance(index_t step, int cache_step) {
    if constexpr (kCache != Cache::kRead) {
      grad_output_ += step;
      input_ += step;
      if (has_extra_) {
        extra_ += step;
      }
    }
    cached_ += cache_step;
  }

  // Places first, first + 1, ... of the series.
  template <Cache kCache, int kWidth, int n>
  __device__ __forceinline__ void load(
      GradGroup<scalar_t, kWidth, n>& group, int first, index_t step, int cache_step) const {
    constexpr Reuse kReuse = kCache == Cache::kNone ? Reuse::kSoon : Reuse::kNever;
    const auto slot = [&](int tensor, int u) {
      return cache_ + tensor * cache_elements_ + cached_ + (first + u) * cache_step;
    };
    BNEXT_UNROLL
    for (int u = 0; u < n; ++u) {
      if constexpr (kCache == Cache::kRead) {
        group.dy[u] = load_shared<kWidth>(slot(0, u));
        group.x[u] = load_shared<kWidth>(slot(1, u));
        if (has_extra_) {
          group.extra[u] = load_shared<kWidth>(slot(2, u));
        }
      } else {
        group.dy[u] = load_raw<kReuse, kWidth>(grad_output_ + (first + u) * step);
        group.x[u] = load_raw<kReuse, kWidth>(input_ + (first + u) * step);
        if (has_extra_) {
          group.extra[u] = load_raw<kReuse, kWidth>(extra_ + (first + u) * step);
        }
      }
    }
    if constexpr (kCache == Cache::kFill) {
      BNEXT_UNROLL
      for (int u = 0; u < n; ++u) {
        store_shared(slot(0, u), group.dy[u]);
        store_shared(slot(1, u), group.x[u]);
        if (has_extra_) {
          store_shared(slot(2, u), group.extra[u]);
        }
      }
    }
  }

  // dy after the activation's derivative, and x, of one place.
  template <int kWidth, int n>
  __device__ __forceinline__ void derive(
      const GradGroup<scalar_t, kWidth, n>& group,
      int u,
      acc_t (&dy)[kWidth],
      acc_t (&x)[kWidth]) const {
    unpack(group.dy[u], dy);
    unpack(group.x[u], x);
    derive_vector<kFusion>(
        dy, x, group.extra[u], constants, elements_.activation, elements_.derivative);
  }

  BackwardLanes<acc_t, kLanes> constants;

 private:
  const BackwardElements<scalar_t>& elements_;
  std::int64_t piece_;
  scalar_t* cache_;
  int cache_elements_;  // of each tensor's copy in shared memory
  bool has_extra_;
  const scalar_t* grad_output_ = nullptr;
  const scalar_t* input_ = nullptr;
  const scalar_t* extra_ = nullptr;
  int cached_ = 0;
};

template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion, Cache kCache>
class GradReduceVisitor {
  using acc_t = AccType<scalar_t>;
  static constexpr int kLanes = Position<kRows, kVec>::kLanes;
  using Inputs = GradInputs<scalar_t, kLanes, index_t, kFusion>;

 public:
  static constexpr int kGroupsPerBlock = 1;
  static constexpr int kAtOnce = kUnrollFor<index_t>;

  __device__ __forceinline__ explicit GradReduceVisitor(Inputs& inputs) : inputs_(inputs) {}

  __device__ __forceinline__ void seek(index_t offset, int cache) {
    inputs_.template seek<kCache>(offset, cache);
  }
  __device__ __forceinline__ void advance(index_t step, int cache_step) {
    inputs_.template advance<kCache>(step, cache_step);
  }
  template <int n>
  __device__ __forceinline__ void vectors(index_t step, int cache_step) {
    visit<n, kVec>(step, cache_step);
  }
  __device__ __forceinline__ void scalar(index_t offset, int cache) {
    if constexpr (!kRows) {
      seek(offset, cache);  // the next series seeks again
      visit<1, 1>(0, 0);
    }
  }

  ThreadGradSums<acc_t, kLanes> sums;

 private:
  template <int n, int kWidth>
  __device__ __forceinline__ void visit(index_t step, int cache_step) {
    constexpr int kBatch = kGradBatch<kFusion, kCache, n>;
    GroupGradSums<acc_t, kWidth> group_sums{};
    BNEXT_NO_UNROLL
    for (int first = 0; first < n; first += kBatch) {
      GradGroup<scalar_t, kWidth, kBatch> group;
      inputs_.template load<kCache>(group, first, step, cache_step);
      BNEXT_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        acc_t dy[kWidth], x[kWidth];
        inputs_.derive(group, u, dy, x);
        group_sums.add(dy, x, inputs_.constants.mean, /*first=*/kBatch == n && u == 0);
      }
    }
    sums.add(group_sums);
  }

  Inputs& inputs_;
};

template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion, Cache kCache>
class GradApplyVisitor {
  using acc_t = AccType<scalar_t>;
  static constexpr int kLanes = Position<kRows, kVec>::kLanes;
  using Inputs = GradInputs<scalar_t, kLanes, index_t, kFusion>;

 public:
  static constexpr int kGroupsPerBlock = 1;
  static constexpr int kAtOnce = kUnrollFor<index_t>;

  // The kernels for one fusion always want grad_input, and none without an extra grad_residual.
  __device__ __forceinline__
  GradApplyVisitor(Inputs& inputs, const BackwardElements<scalar_t>& elements, const Piece& piece)
      : inputs_(inputs),
        elements_(elements),
        piece_(piece.offset),
        wants_input_(kFusion != Fusion::kAny || elements.grad_input != nullptr),
        wants_residual_(
            (kFusion == Fusion::kReluResidual || kFusion == Fusion::kAny) &&
            elements.grad_residual != nullptr),
        frozen_(kFusion == Fusion::kAny && elements.frozen) {}

  __device__ __forceinline__ void seek(index_t offset, int cache) {
    inputs_.template seek<kCache>(offset, cache);
    if (wants_input_) {
      grad_input_ = elements_.grad_input + piece_ + offset;
    }
    if (wants_residual_) {
      grad_residual_ = elements_.grad_residual + piece_ + offset;
    }
  }
  __device__ __forceinline__ void advance(index_t step, int cache_step) {
    inputs_.template advance<kCache>(step, cache_step);
    if (wants_input_) {
      grad_input_ += step;
    }
    if (wants_residual_) {
      grad_residual_ += step;
    }
  }
  template <int n>
  __device__ __forceinline__ void vectors(index_t step, int cache_step) {
    constexpr int kBatch = kGradBatch<kFusion, kCache, n>;
    BNEXT_NO_UNROLL
    for (int first = 0; first < n; first += kBatch) {
      visit<kBatch, kVec>(first, step, cache_step);
    }
  }
  __device__ __forceinline__ void scalar(index_t offset, int cache) {
    if constexpr (!kRows) {
      seek(offset, cache);  // the next series seeks again
      visit<1, 1>(0, 0, 0);
    }
  }

 private:
  template <int n, int kWidth>
  __device__ __forceinline__ void visit(int first, index_t step, int cache_step) {
    GradGroup<scalar_t, kWidth, n> group;
    inputs_.template load<kCache>(group, first, step, cache_step);
    BNEXT_UNROLL
    for (int u = 0; u < n; ++u) {
      acc_t dy[kWidth], x[kWidth];
      if constexpr (kFusion == Fusion::kRelu) {
        unpack(group.dy[u], dy);
        unpack(group.x[u], x);
        relu_grad_input(dy, x, inputs_.constants);
      } else {
        inputs_.derive(group, u, dy, x);
        if (wants_residual_) {
          store_raw(grad_residual_ + (first + u) * step, pack<scalar_t, kWidth>(dy));
        }
        if (wants_input_) {
          to_grad_input(dy, x);
        }
      }
      if (wants_input_) {
        store_raw(grad_input_ + (first + u) * step, pack<scalar_t, kWidth>(x));
      }
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void to_grad_input(
      const acc_t (&dy)[kWidth], acc_t (&x)[kWidth]) const {
    const auto& c = inputs_.constants;
    BNEXT_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      x[k] = frozen_ ? dy[k] * lane(c.scale, k)
                     : bnext::grad_input(
                           dy[k], x[k], lane(c.mean, k), lane(c.scale, k), lane(c.coef_x, k),
                           lane(c.coef_0, k));
    }
  }

  Inputs& inputs_;
  const BackwardElements<scalar_t>& elements_;
  std::int64_t piece_;
  bool wants_input_;
  bool wants_residual_;
  bool frozen_;
  scalar_t* grad_input_ = nullptr;
  scalar_t* grad_residual_ = nullptr;
};

// Sums of every piece; the last block of a ghost adds up its pieces, the last of a tile its ghosts.
template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<kFusion, kRows, kVec>))
    grad_reduce_kernel(const __grid_constant__ GradReduceArgs<scalar_t> args) {
  using At = Position<kRows, kVec>;
  const Tiling& tiling = args.tiling;
  const BackwardElements<scalar_t>& elements = args.elements;
  const GradOutputs<scalar_t>& outputs = args.outputs;
  const Counters& counters = args.workspace.counters;
  const Work work(tiling, blockIdx.x);
  const Piece piece = tiling.piece(kRows, work.ghost, work.tile, work.split);
  const std::int64_t first = work.ghost * tiling.n_channel;
  GradInputs<scalar_t, At::kLanes, index_t, kFusion> inputs(elements, piece, nullptr, 0);
  const Shared<scalar_t> shared{At::tile_channels()};
  const int thread = At::thread();
  if (thread < piece.n_channel) {
    const std::int64_t channel = piece.channel + thread;
    shared.constants().set(
        thread,
        constants_of<scalar_t>(
            saved_stats(elements, first + channel), elements.weight, elements.bias, channel));
  }
  __syncthreads();
  shared.constants().get(At::channel(), inputs.constants);
  GradReduceVisitor<scalar_t, kRows, kVec, index_t, kFusion, Cache::kNone> visitor(inputs);
  walk<kRows, kVec, index_t>(tiling, piece, visitor);

  double* scratch = shared.scratch();
  PairOfSums sums = visitor.sums.template over_block<kRows, kVec>(scratch);
  if (tiling.splits() > 1) {
    const SumSets sets =
        args.workspace.pieces.at(work.tile, piece.channel, work.ghost * tiling.splits());
    store_sums(sets, work.split, piece, thread, sums);
    unsigned* counter = counters.pieces + work.ghost * tiling.tiles + work.tile;
    if (!arrive_last(counter, tiling.splits(), shared.flag())) {
      return;
    }
    sums = add_sets<kRows, kVec>(sets, tiling.splits(), piece, scratch);
  }
  if (thread < piece.n_channel) {
    const std::int64_t channel = piece.channel + thread;
    const auto stats = saved_stats(elements, first + channel);
    finish_grad_ghost(
        outputs, elements, stats, channel, first + channel, tiling.ghost_count(work.ghost), sums,
        /*writes=*/true);
    sums.b *= static_cast<double>(stats.invstd);
  }
  if (outputs.grad_weight == nullptr) {
    return;
  }
  if (tiling.num_ghosts > 1) {
    const SumSets ghosts = args.workspace.ghosts.at(work.tile, piece.channel, 0);
    store_sums(ghosts, work.ghost, piece, thread, sums);
    if (!arrive_last(
            counters.ghosts + work.tile, static_cast<unsigned>(tiling.num_ghosts), shared.flag())) {
      return;
    }
    sums = add_sets<kRows, kVec>(ghosts, tiling.num_ghosts, piece, scratch);
  }
  if (thread < piece.n_channel) {
    store_parameter_grads(outputs, piece.channel + thread, sums);
  }
}

template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm)
    grad_apply_kernel(const __grid_constant__ GradApplyArgs<scalar_t> args) {
  using At = Position<kRows, kVec>;
  using acc_t = AccType<scalar_t>;
  const Tiling& tiling = args.tiling;
  const BackwardElements<scalar_t>& elements = args.elements;
  const Work work(tiling, gridDim.x - 1 - blockIdx.x);  // backwards, as apply_kernel
  const Piece piece = tiling.piece(kRows, work.ghost, work.tile, work.split);
  GradInputs<scalar_t, At::kLanes, index_t, kFusion> inputs(elements, piece, nullptr, 0);
  const auto constants = Shared<scalar_t>{At::tile_channels()}.constants();
  const int thread = At::thread();
  if (thread < piece.n_channel) {
    const std::int64_t channel = piece.channel + thread;
    const std::int64_t at = work.ghost * tiling.n_channel + channel;
    constants.set(
        thread,
        constants_of<scalar_t>(saved_stats(elements, at), elements.weight, elements.bias, channel));
    if (!elements.frozen) {
      constants.set(
          thread, BackwardConstants<acc_t>{__ldcg(args.coef_x + at), __ldcg(args.coef_0 + at)});
    }
  }
  __syncthreads();
  constants.get(At::channel(), inputs.constants);
  constants.get_coefficients(At::channel(), inputs.constants);
  GradApplyVisitor<scalar_t, kRows, kVec, index_t, kFusion, Cache::kNone> visitor(
      inputs, elements, piece);
  walk<kRows, kVec, index_t>(tiling, piece, visitor);
}

}  // namespace bnext::cuda
