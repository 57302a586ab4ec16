// grad_reduce and grad_apply on the CPU.
#pragma once

#include "kernels.h"
#include "pack.h"
#include "tiles.h"

namespace bnext {
namespace CPU_CAPABILITY {
namespace {

// Lines of a block, whose sums are kept in acc_t before they are added in double. Shorter than
// forward's: these sums cancel, so that their rounding shows.
constexpr std::int64_t kGradBlockLines = 16;

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

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext
