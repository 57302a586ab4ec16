// Backward: grad_reduce and grad_apply, and what they share with the kernel that does both.
#pragma once

#include "forward_kernels.cuh"
#include "grad_sums.cuh"

namespace bnext::cuda {

// Where a kernel that keeps its piece on chip is: it fills its shared memory, or reads from it.
enum class Cache { kNone, kFill, kRead };

// Vectors loaded together: one where the loop decides at run time what it does, since its code is
// long already, and three tensors give loads enough.
template <Fusion kFusion, int n>
constexpr int kGradBatch = kFusion == Fusion::kAny ? 1 : n;

// The inputs of backward at n places, as they lie in memory.
template <typename scalar_t, int kWidth, int n>
struct GradGroup {
  Raw<scalar_t, kWidth> dy[n], x[n], extra[n];
};

// The piece's tensors and constants, for both passes.
template <typename scalar_t, int kLanes, typename index_t, Fusion kFusion>
struct GradPiece {
  using acc_t = AccType<scalar_t>;

  const scalar_t* grad_output;
  const scalar_t* input;
  const scalar_t* extra;
  scalar_t* cache;
  int cache_elements;  // of each tensor's copy in shared memory
  bool has_extra;
  Activation activation;
  Derivative derivative;
  BackwardLanes<acc_t, kLanes> constants;

  __device__ __forceinline__
  GradPiece(const BackwardElements<scalar_t>& elements, const Piece& piece)
      : grad_output(elements.grad_output + piece.offset),
        input(elements.input + piece.offset),
        has_extra(
            kFusion == Fusion::kReluResidual ||
            (kFusion == Fusion::kAny && elements.extra != nullptr)),
        activation(elements.activation),
        derivative(elements.derivative) {
    extra = has_extra ? elements.extra + piece.offset : nullptr;
  }

  template <Cache kCache, int kWidth, int n>
  __device__ __forceinline__ void load(
      GradGroup<scalar_t, kWidth, n>& group,
      index_t offset,
      index_t step,
      int cache_offset,
      int cache_step) const {
    constexpr Reuse kReuse = kCache == Cache::kNone ? Reuse::kSoon : Reuse::kNever;
    const auto slot = [&](int tensor, int u) {
      return reinterpret_cast<Raw<scalar_t, kWidth>*>(
          cache + tensor * cache_elements + cache_offset + u * cache_step);
    };
    BNEXT_UNROLL
    for (int u = 0; u < n; ++u) {
      if constexpr (kCache == Cache::kRead) {
        group.dy[u] = *slot(0, u);
        group.x[u] = *slot(1, u);
        if (has_extra) {
          group.extra[u] = *slot(2, u);
        }
      } else {
        group.dy[u] = load_raw<kReuse, kWidth>(grad_output + (offset + u * step));
        group.x[u] = load_raw<kReuse, kWidth>(input + (offset + u * step));
        if (has_extra) {
          group.extra[u] = load_raw<kReuse, kWidth>(extra + (offset + u * step));
        }
      }
    }
    if constexpr (kCache == Cache::kFill) {
      BNEXT_UNROLL
      for (int u = 0; u < n; ++u) {
        *slot(0, u) = group.dy[u];
        *slot(1, u) = group.x[u];
        if (has_extra) {
          *slot(2, u) = group.extra[u];
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
    derive_vector<kFusion>(dy, x, group.extra[u], constants, activation, derivative);
  }
};

template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion, Cache kCache>
struct GradReduceVisitor {
  using acc_t = AccType<scalar_t>;
  static constexpr int kLanes = Position<kRows, kVec>::kLanes;

  const GradPiece<scalar_t, kLanes, index_t, kFusion>& piece;
  ThreadGradSums<acc_t, kLanes> sums;

  template <int n>
  __device__ __forceinline__ void vectors(
      index_t offset, index_t step, int cache_offset, int cache_step) {
    visit<n, kVec>(offset, step, cache_offset, cache_step);
  }
  __device__ __forceinline__ void scalar(index_t offset, int cache_offset) {
    if constexpr (!kRows) {
      visit<1, 1>(offset, 0, cache_offset, 0);
    }
  }

 private:
  template <int n, int kWidth>
  __device__ __forceinline__ void visit(
      index_t offset, index_t step, int cache_offset, int cache_step) {
    constexpr int kBatch = kGradBatch<kFusion, n>;
    GroupGradSums<acc_t, kWidth> group_sums;
    for (int first = 0; first < n; first += kBatch) {
      GradGroup<scalar_t, kWidth, kBatch> group;
      piece.template load<kCache>(
          group, offset + first * step, step, cache_offset + first * cache_step, cache_step);
      BNEXT_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        acc_t dy[kWidth], x[kWidth];
        piece.derive(group, u, dy, x);
        group_sums.add(dy, x, piece.constants.mean);
      }
    }
    sums.add(group_sums);
  }
};

template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion, Cache kCache>
struct GradApplyVisitor {
  using acc_t = AccType<scalar_t>;
  static constexpr int kLanes = Position<kRows, kVec>::kLanes;

  const GradPiece<scalar_t, kLanes, index_t, kFusion>& piece;
  scalar_t* grad_input;     // of the piece, null if not wanted
  scalar_t* grad_residual;  // likewise
  bool frozen;

  __device__ __forceinline__ GradApplyVisitor(
      const GradPiece<scalar_t, kLanes, index_t, kFusion>& grad_piece,
      const BackwardElements<scalar_t>& elements,
      const Piece& at)
      : piece(grad_piece), frozen(kFusion == Fusion::kAny && elements.frozen) {
    grad_input = elements.grad_input == nullptr ? nullptr : elements.grad_input + at.offset;
    grad_residual =
        elements.grad_residual == nullptr ? nullptr : elements.grad_residual + at.offset;
  }

  template <int n>
  __device__ __forceinline__ void vectors(
      index_t offset, index_t step, int cache_offset, int cache_step) {
    visit<n, kVec>(offset, step, cache_offset, cache_step);
  }
  __device__ __forceinline__ void scalar(index_t offset, int cache_offset) {
    if constexpr (!kRows) {
      visit<1, 1>(offset, 0, cache_offset, 0);
    }
  }

 private:
  template <int n, int kWidth>
  __device__ __forceinline__ void visit(
      index_t offset, index_t step, int cache_offset, int cache_step) {
    constexpr Cache kFrom = kCache == Cache::kNone ? Cache::kNone : Cache::kRead;
    constexpr int kBatch = kGradBatch<kFusion, n>;
    for (int first = 0; first < n; first += kBatch) {
      GradGroup<scalar_t, kWidth, kBatch> group;
      piece.template load<kFrom>(
          group, offset + first * step, step, cache_offset + first * cache_step, cache_step);
      BNEXT_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        acc_t dy[kWidth], x[kWidth];
        piece.derive(group, u, dy, x);
        store(offset + (first + u) * step, dy, x);
      }
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void store(index_t at, const acc_t (&dy)[kWidth], acc_t (&x)[kWidth]) {
    if ((kFusion == Fusion::kReluResidual || kFusion == Fusion::kAny) && grad_residual != nullptr) {
      store_raw(grad_residual + at, pack<scalar_t, kWidth>(dy));
    }
    // The kernels for one fusion always want grad_input.
    if (kFusion == Fusion::kAny && grad_input == nullptr) {
      return;
    }
    const auto& c = piece.constants;
    BNEXT_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      x[k] = frozen ? dy[k] * lane(c.scale, k)
                    : bnext::grad_input(
                          dy[k], x[k], lane(c.mean, k), lane(c.scale, k), lane(c.coef_x, k),
                          lane(c.coef_0, k));
    }
    store_raw(grad_input + at, pack<scalar_t, kWidth>(x));
  }
};

// Sums of every piece; the last block of a ghost adds up its pieces, the last of a tile its ghosts.
template <typename scalar_t, bool kRows, int kVec, typename index_t, Fusion kFusion>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm)
    grad_reduce_kernel(const __grid_constant__ GradReduceArgs<scalar_t> args) {
  using At = Position<kRows, kVec>;
  const Tiling& tiling = args.tiling;
  const BackwardElements<scalar_t>& elements = args.elements;
  const GradOutputs<scalar_t>& outputs = args.outputs;
  const Counters& counters = args.workspace.counters;
  const Work work(tiling, blockIdx.x);
  const Piece piece = tiling.piece(kRows, work.ghost, work.tile, work.split);
  const std::int64_t first = work.ghost * tiling.n_channel;
  GradPiece<scalar_t, At::kLanes, index_t, kFusion> grad_piece(elements, piece);
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
  shared.constants().get(At::channel(), grad_piece.constants);
  GradReduceVisitor<scalar_t, kRows, kVec, index_t, kFusion, Cache::kNone> visitor{grad_piece};
  walk<kRows, kVec, index_t>(tiling, piece, visitor);

  double* scratch = shared.scratch();
  PairOfSums sums = sum_over_block<kRows, kVec>(visitor.sums, scratch);
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
  GradPiece<scalar_t, At::kLanes, index_t, kFusion> grad_piece(elements, piece);
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
  constants.get(At::channel(), grad_piece.constants);
  constants.get_coefficients(At::channel(), grad_piece.constants);
  GradApplyVisitor<scalar_t, kRows, kVec, index_t, kFusion, Cache::kNone> visitor(
      grad_piece, elements, piece);
  walk<kRows, kVec, index_t>(tiling, piece, visitor);
}

}  // namespace bnext::cuda
