// The CPU kernels, compiled once per instruction set by kernels_*.cpp.
#pragma once

#include "kernels.h"
#include "pack.h"
#include "tiles.h"

namespace bnext {
namespace CPU_CAPABILITY {
namespace {

// Lines whose sums are kept in acc_t before they are merged in double. Backward sums cancel, so
// that their rounding shows: shorter blocks.
constexpr std::int64_t kBlockLines = 64;
constexpr std::int64_t kGradBlockLines = 16;

// The first lines of a block, whose mean is its pivot.
constexpr std::int64_t kPivotLines = 8;

// Lines of one column read together, so that what belongs to the column is loaded once for all of
// them: only as many as lie close together, since the prefetchers follow one stream a page.
constexpr std::int64_t kMaxLinesAtOnce = 8;
constexpr std::int64_t kNearElements = 256;

constexpr std::int64_t kMinLinesAdded = 4;

inline std::int64_t lines_at_once(const Tile& tile) {
  return std::clamp<std::int64_t>(kNearElements / tile.stride, 1, kMaxLinesAtOnce);
}

// Moments of each column of a tile. A block of lines is read once: the mean of its first group of
// k lines is the pivot of all its n lines, so that sum(d * d) <= (1 + n / k) * M2 and the
// correction cannot cancel (docs/math.md).
template <typename scalar_t>
class TileMoments {
  using acc_t = AccType<scalar_t>;
  using P = Pack<scalar_t>;

 public:
  BNEXT_KERNEL void reduce(const scalar_t* input, const Tile& tile) {
    columns_ = tile.columns;
    lines_ = tile.lines;
    for (std::int64_t begin = 0; begin < tile.lines; begin += kBlockLines) {
      const std::int64_t end = std::min(begin + kBlockLines, tile.lines);
      add_block(input, tile, begin, end);
      merge_block(begin, end - begin);
    }
    slots_to_columns<scalar_t>(mean_, columns_);
    slots_to_columns<scalar_t>(m2_, columns_);
  }

  // Of the `inner` columns of one channel.
  Welford<double> channel(std::int64_t column, std::int64_t inner) const {
    const auto lines = static_cast<double>(lines_);
    if (inner == 1) {
      return {lines, mean_[column], m2_[column]};
    }
    return merge_equal(mean_ + column, m2_ + column, inner, lines);
  }

 private:
  BNEXT_INLINE void add_block(
      const scalar_t* input, const Tile& tile, std::int64_t begin, std::int64_t end) {
    const std::int64_t pivot_end = std::min(begin + kPivotLines, end);
    add_lines<true>(input, tile, begin, pivot_end, kPivotLines);
    // Some lines at once in any case: their sum is then added to that of the block, which rounds
    // less than 64 additions in a row.
    const std::int64_t group = std::max(kMinLinesAdded, lines_at_once(tile));
    add_lines<false>(input, tile, pivot_end, end, group);
  }

  template <bool kFirst>
  BNEXT_INLINE void add_lines(
      const scalar_t* input,
      const Tile& tile,
      std::int64_t begin,
      std::int64_t end,
      std::int64_t group) {
    for_each_pack<scalar_t>(
        tile, begin, end, group,
        [&](std::int64_t line, std::int64_t lines, std::int64_t column, std::int64_t slot,
            std::int64_t lanes) {
      const scalar_t* x = input + line * tile.stride + column;
      P pivot, sum_d(0), sum_dd(0);
      if constexpr (kFirst) {
        P sum = P::load(x, lanes);
        for (std::int64_t i = 1; i < lines; ++i) {
          sum = sum + P::load(x + i * tile.stride, lanes);
        }
        pivot = finite_pivot(sum * P(acc_t(1) / static_cast<acc_t>(lines)));
        pivot.store_acc(pivot_ + slot);
      } else {
        pivot = P::load_acc(pivot_ + slot);
      }
      for (std::int64_t i = 0; i < lines; ++i) {
        const P d = P::load(x + i * tile.stride, lanes) - pivot;
        sum_d = sum_d + d;
        sum_dd = Math<P>::fmadd(d, d, sum_dd);
      }
      if constexpr (!kFirst) {
        sum_d = P::load_acc(sum_d_ + slot) + sum_d;
        sum_dd = P::load_acc(sum_dd_ + slot) + sum_dd;
      }
      sum_d.store_acc(sum_d_ + slot);
      sum_dd.store_acc(sum_dd_ + slot);
    });
  }

  void merge_block(std::int64_t lines_before, std::int64_t block_lines) {
    const auto before = static_cast<double>(lines_before);
    const auto block = static_cast<double>(block_lines);
    const double one_over_n = 1.0 / block;
    const double b_over_n = block / (before + block);
    const std::int64_t slots = num_slots<scalar_t>(columns_);
    for (std::int64_t i = 0; i < slots; ++i) {
      double mean, m2;
      shifted_moments<double>(pivot_[i], sum_d_[i], sum_dd_[i], one_over_n, mean, m2);
      if (lines_before == 0) {
        mean_[i] = mean;
        m2_[i] = m2;
      } else {
        merge_moments(mean_[i], m2_[i], mean, m2, b_over_n, before * b_over_n);
      }
    }
  }

  std::int64_t columns_ = 0;
  std::int64_t lines_ = 0;
  alignas(64) acc_t pivot_[kTileColumns];
  alignas(64) acc_t sum_d_[kTileColumns];
  alignas(64) acc_t sum_dd_[kTileColumns];
  alignas(64) double mean_[kTileColumns];
  alignas(64) double m2_[kTileColumns];
};

template <typename scalar_t>
void reduce(const ReduceArgs<scalar_t>& args, const Slab& slab) {
  std::fill_n(args.moments, slab.channels(), Welford<double>{});
  TileMoments<scalar_t> moments;
  for_each_tile<scalar_t>(slab, [&](const Tile& tile) {
    moments.reduce(args.input + tile.offset, tile);
    Welford<double>* out = args.moments + tile.channel;
    for (std::int64_t column = 0; column < tile.columns; column += tile.inner) {
      (out++)->merge(moments.channel(column, tile.inner));
    }
  });
}

template <typename scalar_t, typename Act, bool kResidual>
BNEXT_KERNEL void apply_tile(
    const ApplyArgs<scalar_t>& args,
    const Tile& tile,
    const AccType<scalar_t>* mean,
    const AccType<scalar_t>* scale,
    const AccType<scalar_t>* shift) {
  using P = Pack<scalar_t>;
  for_each_pack<scalar_t>(
      tile, 0, tile.lines, lines_at_once(tile),
      [&](std::int64_t line, std::int64_t lines, std::int64_t column, std::int64_t,
          std::int64_t lanes) {
    const P m = P::load_acc(mean + column, lanes);
    const P s = P::load_acc(scale + column, lanes);
    const P t = P::load_acc(shift + column, lanes);
    for (std::int64_t i = 0; i < lines; ++i) {
      const std::int64_t at = tile.offset + (line + i) * tile.stride + column;
      P z = normalize(P::load(args.input + at, lanes), m, s, t);
      if constexpr (kResidual) {
        z = z + P::load(args.residual + at, lanes);
      }
      Act::forward(z).store(args.output + at, lanes);
    }
  });
}

template <typename scalar_t, typename Act, bool kResidual>
void apply_tiles(const ApplyArgs<scalar_t>& args, const Slab& slab) {
  ColumnConstants<AccType<scalar_t>> means, scales, shifts;
  for_each_tile<scalar_t>(slab, [&](const Tile& tile) {
    apply_tile<scalar_t, Act, kResidual>(
        args, tile, means.expand(args.mean, tile), scales.expand(args.scale, tile),
        shifts.expand(args.shift, tile));
  });
}

template <typename scalar_t>
void apply(const ApplyArgs<scalar_t>& args, const Slab& slab) {
  dispatch_activation(args.activation, [&](auto act) {
    if (args.residual != nullptr) {
      apply_tiles<scalar_t, decltype(act), true>(args, slab);
    } else {
      apply_tiles<scalar_t, decltype(act), false>(args, slab);
    }
  });
}

// The constants of a tile that both backward kernels read, one per column.
template <typename scalar_t>
class GradConstants {
  using acc_t = AccType<scalar_t>;

 public:
  void expand(const GradArgs<scalar_t>& args, const Tile& tile) {
    mean = means_.expand(args.mean, tile);
    scale = scales_.expand(args.scale, tile);
    shift = shifts_.expand(args.shift, tile);
  }

  const acc_t* mean;
  const acc_t* scale;
  const acc_t* shift;

 private:
  ColumnConstants<acc_t> means_, scales_, shifts_;
};

// The gradient of one pack after the activation.
template <typename scalar_t, typename Act, Derivative kDerivative>
BNEXT_INLINE Pack<scalar_t> grad_after_activation(
    const GradArgs<scalar_t>& args,
    std::int64_t at,
    const Pack<scalar_t>& x,
    const Pack<scalar_t>& mean,
    const Pack<scalar_t>& scale,
    const Pack<scalar_t>& shift,
    std::int64_t lanes) {
  using P = Pack<scalar_t>;
  const P grad = P::load(args.grad_output + at, lanes);
  if constexpr (std::is_same_v<Act, NoActivation>) {
    return grad;
  } else if constexpr (kDerivative == Derivative::kFromOutput) {
    return Act::backward(grad, P::load(args.extra + at, lanes));
  } else if constexpr (kDerivative == Derivative::kFromResidual) {
    return Act::backward(grad, normalize(x, mean, scale, shift) + P::load(args.extra + at, lanes));
  } else {
    return Act::backward(grad, normalize(x, mean, scale, shift));
  }
}

// Calls f with the functor of the activation and the constant of its derivative's source; the
// checks leave the output to relu and leaky_relu, and the residual to silu.
template <typename F>
inline void dispatch_derivative(Activation activation, Derivative derivative, F&& f) {
  using FromInput = std::integral_constant<Derivative, Derivative::kFromInput>;
  using FromResidual = std::integral_constant<Derivative, Derivative::kFromResidual>;
  using FromOutput = std::integral_constant<Derivative, Derivative::kFromOutput>;
  dispatch_activation(activation, [&](auto act) {
    using Act = decltype(act);
    using FromExtra = std::conditional_t<std::is_same_v<Act, Silu>, FromResidual, FromOutput>;
    if (std::is_same_v<Act, NoActivation> || derivative == Derivative::kFromInput) {
      f(act, FromInput{});
    } else if constexpr (!std::is_same_v<Act, NoActivation>) {
      f(act, FromExtra{});
    }
  });
}

// The sums of each column of a tile.
template <typename scalar_t>
class TileGradSums {
  using acc_t = AccType<scalar_t>;
  using P = Pack<scalar_t>;

 public:
  template <typename Act, Derivative kDerivative>
  BNEXT_KERNEL void reduce(
      const GradArgs<scalar_t>& args, const Tile& tile, const GradConstants<scalar_t>& constants) {
    const std::int64_t slots = num_slots<scalar_t>(tile.columns);
    std::fill_n(sum_dy_, slots, 0.0);
    std::fill_n(sum_dy_xmu_, slots, 0.0);
    for (std::int64_t begin = 0; begin < tile.lines; begin += kGradBlockLines) {
      const std::int64_t end = std::min(begin + kGradBlockLines, tile.lines);
      for_each_pack<scalar_t>(
          tile, begin, end, lines_at_once(tile),
          [&](std::int64_t line, std::int64_t lines, std::int64_t column, std::int64_t slot,
              std::int64_t lanes) {
        const P mean = P::load_acc(constants.mean + column, lanes);
        const P scale = P::load_acc(constants.scale + column, lanes);
        const P shift = P::load_acc(constants.shift + column, lanes);
        P dy_sum(0), dy_xmu_sum(0);
        if (line != begin) {
          dy_sum = P::load_acc(block_dy_ + slot);
          dy_xmu_sum = P::load_acc(block_dy_xmu_ + slot);
        }
        for (std::int64_t i = 0; i < lines; ++i) {
          const std::int64_t at = tile.offset + (line + i) * tile.stride + column;
          const P x = P::load(args.input + at, lanes);
          const P dy = grad_after_activation<scalar_t, Act, kDerivative>(
              args, at, x, mean, scale, shift, lanes);
          dy_sum = dy_sum + dy;
          dy_xmu_sum = Math<P>::fmadd(dy, x - mean, dy_xmu_sum);
        }
        dy_sum.store_acc(block_dy_ + slot);
        dy_xmu_sum.store_acc(block_dy_xmu_ + slot);
      });
      for (std::int64_t i = 0; i < slots; ++i) {
        sum_dy_[i] += block_dy_[i];
        sum_dy_xmu_[i] += block_dy_xmu_[i];
      }
    }
    slots_to_columns<scalar_t>(sum_dy_, tile.columns);
    slots_to_columns<scalar_t>(sum_dy_xmu_, tile.columns);
  }

  // Of the `inner` columns of one channel.
  GradSums channel(std::int64_t column, std::int64_t inner) const {
    GradSums sums;
    for (std::int64_t i = column; i < column + inner; ++i) {
      sums.add({sum_dy_[i], sum_dy_xmu_[i]});
    }
    return sums;
  }

 private:
  alignas(64) acc_t block_dy_[kTileColumns];
  alignas(64) acc_t block_dy_xmu_[kTileColumns];
  alignas(64) double sum_dy_[kTileColumns];
  alignas(64) double sum_dy_xmu_[kTileColumns];
};

template <typename scalar_t, typename Act, Derivative kDerivative>
void grad_reduce_tiles(const GradReduceArgs<scalar_t>& args, const Slab& slab) {
  GradConstants<scalar_t> constants;
  TileGradSums<scalar_t> sums;
  for_each_tile<scalar_t>(slab, [&](const Tile& tile) {
    constants.expand(args, tile);
    sums.template reduce<Act, kDerivative>(args, tile, constants);
    GradSums* out = args.sums + tile.channel;
    for (std::int64_t column = 0; column < tile.columns; column += tile.inner) {
      (out++)->add(sums.channel(column, tile.inner));
    }
  });
}

template <typename scalar_t>
void grad_reduce(const GradReduceArgs<scalar_t>& args, const Slab& slab) {
  std::fill_n(args.sums, slab.channels(), GradSums{});
  dispatch_derivative(args.activation, args.derivative, [&](auto act, auto derivative) {
    grad_reduce_tiles<scalar_t, decltype(act), derivative()>(args, slab);
  });
}

// Frozen statistics do not depend on x: there are no coefficients, and a non-finite x must not
// reach its gradient.
template <typename scalar_t, typename Act, Derivative kDerivative>
BNEXT_KERNEL void grad_apply_tile(
    const GradApplyArgs<scalar_t>& args,
    const Tile& tile,
    const GradConstants<scalar_t>& constants,
    const AccType<scalar_t>* coef_x,
    const AccType<scalar_t>* coef_0) {
  using P = Pack<scalar_t>;
  const bool frozen = coef_x == nullptr;
  for_each_pack<scalar_t>(
      tile, 0, tile.lines, lines_at_once(tile),
      [&](std::int64_t line, std::int64_t lines, std::int64_t column, std::int64_t,
          std::int64_t lanes) {
    const P mean = P::load_acc(constants.mean + column, lanes);
    const P scale = P::load_acc(constants.scale + column, lanes);
    const P shift = P::load_acc(constants.shift + column, lanes);
    const P cx = frozen ? P(0) : P::load_acc(coef_x + column, lanes);
    const P c0 = frozen ? P(0) : P::load_acc(coef_0 + column, lanes);
    for (std::int64_t i = 0; i < lines; ++i) {
      const std::int64_t at = tile.offset + (line + i) * tile.stride + column;
      const P x = P::load(args.input + at, lanes);
      const P dy =
          grad_after_activation<scalar_t, Act, kDerivative>(args, at, x, mean, scale, shift, lanes);
      if (args.grad_residual != nullptr) {
        dy.store(args.grad_residual + at, lanes);
      }
      if (args.grad_input != nullptr) {
        const P dx = frozen ? dy * scale : grad_input(dy, x, mean, scale, cx, c0);
        dx.store(args.grad_input + at, lanes);
      }
    }
  });
}

template <typename scalar_t, typename Act, Derivative kDerivative>
void grad_apply_tiles(const GradApplyArgs<scalar_t>& args, const Slab& slab) {
  GradConstants<scalar_t> constants;
  ColumnConstants<AccType<scalar_t>> coefs_x, coefs_0;
  const bool frozen = args.coef_x == nullptr;
  for_each_tile<scalar_t>(slab, [&](const Tile& tile) {
    constants.expand(args, tile);
    grad_apply_tile<scalar_t, Act, kDerivative>(
        args, tile, constants, frozen ? nullptr : coefs_x.expand(args.coef_x, tile),
        frozen ? nullptr : coefs_0.expand(args.coef_0, tile));
  });
}

template <typename scalar_t>
void grad_apply(const GradApplyArgs<scalar_t>& args, const Slab& slab) {
  dispatch_derivative(args.activation, args.derivative, [&](auto act, auto derivative) {
    grad_apply_tiles<scalar_t, decltype(act), derivative()>(args, slab);
  });
}

template <typename scalar_t>
constexpr Kernels<scalar_t> kernels_of = {
    reduce<scalar_t>, apply<scalar_t>, grad_reduce<scalar_t>, grad_apply<scalar_t>};

constexpr KernelTable kTable = {
    kernels_of<float>, kernels_of<double>, kernels_of<c10::Half>, kernels_of<c10::BFloat16>};

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext
