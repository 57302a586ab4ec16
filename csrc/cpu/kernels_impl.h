// The CPU kernels, compiled once per instruction set by kernels_*.cpp.
#pragma once

#include "kernels.h"
#include "pack.h"
#include "tiles.h"

namespace bnext {
namespace CPU_CAPABILITY {
namespace {

// Lines whose sums are kept in acc_t before they are merged in double.
constexpr std::int64_t kBlockLines = 64;

// Lines read together, so that a column's accumulators are loaded and stored once for all of them.
template <typename scalar_t>
constexpr int kReduceGroup = Pack<scalar_t>::kVecs == 1 ? 8 : 4;
constexpr int kApplyGroup = 4;

// Moments of each column of a tile. A block of lines is read once: the mean of its first group of
// k lines is the pivot of all its n lines, so that sum(d * d) <= (1 + n / k) * M2 and the
// correction cannot cancel (docs/math.md).
template <typename scalar_t>
class TileMoments {
  using acc_t = AccType<scalar_t>;
  using P = Pack<scalar_t>;

 public:
  void reduce(const scalar_t* input, const Tile& tile) {
    columns_ = tile.columns;
    lines_ = tile.lines;
    for (std::int64_t begin = 0; begin < tile.lines; begin += kBlockLines) {
      const std::int64_t end = std::min(begin + kBlockLines, tile.lines);
      bool first = true;
      for_each_group<kReduceGroup<scalar_t>>(begin, end, [&](std::int64_t line, auto group) {
        const scalar_t* lines = input + line * tile.stride;
        if (first) {
          add<group(), true>(lines, tile.stride);
        } else {
          add<group(), false>(lines, tile.stride);
        }
        first = false;
      });
      merge_block(begin, end - begin);
    }
  }

  Welford<double> channel(std::int64_t column, std::int64_t inner) const {
    const auto lines = static_cast<double>(lines_);
    if (inner == 1) {
      const std::int64_t slot = slot_of_column<scalar_t>(column, columns_);
      return {lines, mean_[slot], m2_[slot]};
    }
    double mean[kTileColumns], m2[kTileColumns];
    for (std::int64_t i = 0; i < inner; ++i) {
      const std::int64_t slot = slot_of_column<scalar_t>(column + i, columns_);
      mean[i] = mean_[slot];
      m2[i] = m2_[slot];
    }
    return merge_equal(mean, m2, inner, lines);
  }

 private:
  template <int kLines, bool kFirst>
  void add(const scalar_t* input, std::int64_t stride) {
    for_each_pack<scalar_t>(columns_, [&](std::int64_t column, std::int64_t slot, auto lanes) {
      P x[kLines];
      for (int i = 0; i < kLines; ++i) {
        x[i] = P::load(input + i * stride + column, lanes);
      }
      P pivot;
      if constexpr (kFirst) {
        pivot = finite_pivot(tree_sum(x) * P(acc_t(1) / kLines));
        pivot.store_acc(pivot_ + slot);
      } else {
        pivot = P::load_acc(pivot_ + slot);
      }
      for (int i = 0; i < kLines; ++i) {
        x[i] = x[i] - pivot;
      }
      P sum_d = tree_sum(x);
      P sum_dd = x[0] * x[0];
      for (int i = 1; i < kLines; ++i) {
        sum_dd = Math<P>::fmadd(x[i], x[i], sum_dd);
      }
      if constexpr (!kFirst) {
        sum_d = sum_d + P::load_acc(sum_d_ + slot);
        sum_dd = sum_dd + P::load_acc(sum_dd_ + slot);
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
void apply_tiles(const ApplyArgs<scalar_t>& args, const Slab& slab) {
  using P = Pack<scalar_t>;
  ColumnConstants<AccType<scalar_t>> means, scales, shifts;
  for_each_tile<scalar_t>(slab, [&](const Tile& tile) {
    const auto* mean = means.expand(args.mean, tile);
    const auto* scale = scales.expand(args.scale, tile);
    const auto* shift = shifts.expand(args.shift, tile);
    for_each_group<kApplyGroup>(0, tile.lines, [&](std::int64_t line, auto group) {
      for_each_pack<scalar_t>(tile.columns, [&](std::int64_t column, std::int64_t, auto lanes) {
        const P m = P::load_acc(mean + column, lanes);
        const P s = P::load_acc(scale + column, lanes);
        const P t = P::load_acc(shift + column, lanes);
        for (int i = 0; i < group(); ++i) {
          const std::int64_t at = tile.offset + (line + i) * tile.stride + column;
          P z = normalize(P::load(args.input + at, lanes), m, s, t);
          if constexpr (kResidual) {
            z = z + P::load(args.residual + at, lanes);
          }
          Act::forward(z).store(args.output + at, lanes);
        }
      });
    });
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

// The gradient of one pack after the activation, and (x - mean) where backward sums need it.
template <typename scalar_t, typename Act, Derivative kDerivative, typename Lanes>
inline Pack<scalar_t> grad_after_activation(
    const GradArgs<scalar_t>& args,
    std::int64_t at,
    const Pack<scalar_t>& x,
    const Pack<scalar_t>& mean,
    const Pack<scalar_t>& scale,
    const Pack<scalar_t>& shift,
    Lanes lanes) {
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

// Calls f with the functor of the activation and the constant of its derivative's source.
template <typename F>
inline void dispatch_derivative(Activation activation, Derivative derivative, F&& f) {
  using FromInput = std::integral_constant<Derivative, Derivative::kFromInput>;
  using FromResidual = std::integral_constant<Derivative, Derivative::kFromResidual>;
  using FromOutput = std::integral_constant<Derivative, Derivative::kFromOutput>;
  dispatch_activation(activation, [&](auto act) {
    using Act = decltype(act);
    if constexpr (std::is_same_v<Act, NoActivation>) {
      return f(act, FromInput{});
    }
    if constexpr (!std::is_same_v<Act, NoActivation> && !std::is_same_v<Act, Silu>) {
      if (derivative == Derivative::kFromOutput) {
        return f(act, FromOutput{});
      }
    }
    if constexpr (!std::is_same_v<Act, NoActivation>) {
      if (derivative == Derivative::kFromResidual) {
        return f(act, FromResidual{});
      }
      return f(act, FromInput{});
    }
  });
}

template <typename scalar_t, typename Act, Derivative kDerivative>
void grad_reduce_tiles(const GradReduceArgs<scalar_t>& args, const Slab& slab) {
  using acc_t = AccType<scalar_t>;
  using P = Pack<scalar_t>;
  GradConstants<scalar_t> constants;
  alignas(64) acc_t block_dy[kTileColumns], block_dy_xmu[kTileColumns];
  alignas(64) double sum_dy[kTileColumns], sum_dy_xmu[kTileColumns];
  for_each_tile<scalar_t>(slab, [&](const Tile& tile) {
    constants.expand(args, tile);
    const std::int64_t slots = num_slots<scalar_t>(tile.columns);
    std::fill_n(sum_dy, slots, 0.0);
    std::fill_n(sum_dy_xmu, slots, 0.0);
    for (std::int64_t begin = 0; begin < tile.lines; begin += kBlockLines) {
      const std::int64_t end = std::min(begin + kBlockLines, tile.lines);
      std::fill_n(block_dy, slots, acc_t(0));
      std::fill_n(block_dy_xmu, slots, acc_t(0));
      for_each_group<kApplyGroup>(begin, end, [&](std::int64_t line, auto group) {
        for_each_pack<scalar_t>(
            tile.columns, [&](std::int64_t column, std::int64_t slot, auto lanes) {
              const P mean = P::load_acc(constants.mean + column, lanes);
              const P scale = P::load_acc(constants.scale + column, lanes);
              const P shift = P::load_acc(constants.shift + column, lanes);
              P dy[group()];
              P dy_xmu(acc_t(0));
              for (int i = 0; i < group(); ++i) {
                const std::int64_t at = tile.offset + (line + i) * tile.stride + column;
                const P x = P::load(args.input + at, lanes);
                dy[i] = grad_after_activation<scalar_t, Act, kDerivative>(
                    args, at, x, mean, scale, shift, lanes);
                dy_xmu = Math<P>::fmadd(dy[i], x - mean, dy_xmu);
              }
              (P::load_acc(block_dy + slot) + tree_sum(dy)).store_acc(block_dy + slot);
              (P::load_acc(block_dy_xmu + slot) + dy_xmu).store_acc(block_dy_xmu + slot);
            });
      });
      for (std::int64_t i = 0; i < slots; ++i) {
        sum_dy[i] += block_dy[i];
        sum_dy_xmu[i] += block_dy_xmu[i];
      }
    }
    for (std::int64_t column = 0; column < tile.columns; ++column) {
      const std::int64_t slot = slot_of_column<scalar_t>(column, tile.columns);
      args.sums[tile.channel + column / tile.inner].add({sum_dy[slot], sum_dy_xmu[slot]});
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

template <typename scalar_t, typename Act, Derivative kDerivative>
void grad_apply_tiles(const GradApplyArgs<scalar_t>& args, const Slab& slab) {
  using P = Pack<scalar_t>;
  GradConstants<scalar_t> constants;
  ColumnConstants<AccType<scalar_t>> coefs_x, coefs_0;
  const bool frozen = args.coef_x == nullptr;
  for_each_tile<scalar_t>(slab, [&](const Tile& tile) {
    constants.expand(args, tile);
    const auto* coef_x = frozen ? nullptr : coefs_x.expand(args.coef_x, tile);
    const auto* coef_0 = frozen ? nullptr : coefs_0.expand(args.coef_0, tile);
    for_each_group<kApplyGroup>(0, tile.lines, [&](std::int64_t line, auto group) {
      for_each_pack<scalar_t>(tile.columns, [&](std::int64_t column, std::int64_t, auto lanes) {
        const P mean = P::load_acc(constants.mean + column, lanes);
        const P scale = P::load_acc(constants.scale + column, lanes);
        const P shift = P::load_acc(constants.shift + column, lanes);
        const P cx = frozen ? P(0) : P::load_acc(coef_x + column, lanes);
        const P c0 = frozen ? P(0) : P::load_acc(coef_0 + column, lanes);
        for (int i = 0; i < group(); ++i) {
          const std::int64_t at = tile.offset + (line + i) * tile.stride + column;
          const P x = P::load(args.input + at, lanes);
          const P dy = grad_after_activation<scalar_t, Act, kDerivative>(
              args, at, x, mean, scale, shift, lanes);
          if (args.grad_residual != nullptr) {
            dy.store(args.grad_residual + at, lanes);
          }
          if (args.grad_input != nullptr) {
            // Frozen statistics do not depend on x, so a non-finite x must not reach its gradient.
            const P dx = frozen ? dy * scale : grad_input(dy, x, mean, scale, cx, c0);
            dx.store(args.grad_input + at, lanes);
          }
        }
      });
    });
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
