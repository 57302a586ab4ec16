// grad_reduce and grad_apply on the CPU.
#pragma once

#include "../core/layout.h"
#include "kernels.h"
#include "pack.h"
#include "tiles.h"

namespace bnext::cpu {
namespace CPU_CAPABILITY {
namespace {

// The constants of K packs, which both backward kernels read.
template <typename scalar_t, int K>
struct GradConstants {
  using P = Pack<scalar_t>;

  template <typename Source>
  BNEXT_INLINE GradConstants(const GradArgs<scalar_t>& args, const Source& source) {
    BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
      mean[k] = source.template get<P>(args.mean, k);
      scale[k] = source.template get<P>(args.scale, k);
      shift[k] = source.template get<P>(args.shift, k);
    }
  }

  P mean[K];
  P scale[K];
  P shift[K];
};

// Pack k of a line: x - mean, and the gradient after the activation.
template <typename scalar_t>
struct GradPack {
  using P = Pack<scalar_t>;

  template <typename Act, Derivative kDerivative, int K>
  BNEXT_INLINE static GradPack load(
      const GradArgs<scalar_t>& args,
      const Strip& strip,
      std::int64_t line,
      const GradConstants<scalar_t, K>& constants,
      int k) {
    const std::int64_t at = strip.at + line * strip.stride + k * P::kSize;
    const P grad = P::load(args.grad_output + at, strip.lanes);
    const P xmu = P::load(args.input + at, strip.lanes) - constants.mean[k];
    if constexpr (std::is_same_v<Act, NoActivation>) {
      return {xmu, grad};
    } else if constexpr (kDerivative == Derivative::kFromOutput) {
      return {xmu, Act::backward(grad, P::load(args.extra + at, strip.lanes))};
    } else {
      P z = normalize_centred(xmu, constants.scale[k], constants.shift[k]);
      if constexpr (kDerivative == Derivative::kFromResidual) {
        z = z + P::load(args.extra + at, strip.lanes);
      }
      return {xmu, Act::backward(grad, z)};
    }
  }

  P xmu;
  P dy;
};

// Calls f with the functor of the activation and the constant of its derivative's source; the
// checks let an activation have the output or the residual, not either.
template <typename F>
inline void dispatch_derivative(Activation activation, Derivative derivative, F&& f) {
  using FromInput = std::integral_constant<Derivative, Derivative::kFromInput>;
  using FromResidual = std::integral_constant<Derivative, Derivative::kFromResidual>;
  using FromOutput = std::integral_constant<Derivative, Derivative::kFromOutput>;
  dispatch_activation(activation, [&](auto act) {
    using Act = decltype(act);
    using FromExtra = std::conditional_t<Act::kFromOutput, FromOutput, FromResidual>;
    if (std::is_same_v<Act, NoActivation> || derivative == Derivative::kFromInput) {
      f(act, FromInput{});
    } else if constexpr (!std::is_same_v<Act, NoActivation>) {
      f(act, FromExtra{});
    }
  });
}

// Sums of dy and of dy * (x - mean) over the lines of a strip.
template <typename scalar_t, int K>
struct StripGradSums {
  using P = Pack<scalar_t>;

  BNEXT_INLINE StripGradSums() {
    BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
      dy[k] = dy_xmu[k] = P(0);
    }
  }

  template <typename Act, Derivative kDerivative, FetchInto kInto>
  BNEXT_INLINE void add_lines(
      const GradArgs<scalar_t>& args,
      const Strip& strip,
      std::int64_t begin,
      std::int64_t end,
      const GradConstants<scalar_t, K>& constants) {
    for (std::int64_t i = begin; i < end; ++i) {
      BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
        fetch<kInto>(args.input, strip, i, k);
        fetch<kInto>(args.grad_output, strip, i, k);
        add_pack(
            GradPack<scalar_t>::template load<Act, kDerivative>(args, strip, i, constants, k), k);
      }
    }
  }

  BNEXT_INLINE void add_pack(const GradPack<scalar_t>& pack, int k) {
    dy[k] = dy[k] + pack.dy;
    dy_xmu[k] = Math<P>::fmadd(pack.dy, pack.xmu, dy_xmu[k]);
  }

  P dy[K];
  P dy_xmu[K];
};

// Finds the sums of each column of a wide matrix.
template <typename scalar_t>
class ColumnGradSums {
  using acc_t = AccType<scalar_t>;
  using P = Pack<scalar_t>;

 public:
  template <typename Act, Derivative kDerivative>
  BNEXT_KERNEL void reduce(
      const GradArgs<scalar_t>& args,
      const Slab& slab,
      std::int64_t first,
      std::int64_t columns,
      double* __restrict sum_dy,
      double* __restrict sum_dy_xmu) {
    const std::int64_t group = sum_group_lines<scalar_t>(slab.stride);
    const std::int64_t blocks = num_blocks(slab.lines, kBlockLines);
    for (std::int64_t block = 0; block < blocks; ++block) {
      const Range range = split_range(slab.lines, blocks, block);
      const std::int64_t begin = range.begin;
      const std::int64_t lines = range.size();
      for (std::int64_t line = 0; line < lines; line += group) {
        const std::int64_t group_lines = std::min(group, lines - line);
        for_each_column_strip<scalar_t, kStripPacks<scalar_t>>(
            columns, [&](auto packs, std::int64_t column, std::int64_t lanes, std::int64_t fresh) {
          const Strip strip{
              (begin + line) * slab.stride + first + column, group_lines, slab.stride, lanes,
              fetch_next_lines<scalar_t, packs()>(slab, begin + line, group_lines, first + column)};
          constexpr int K = packs();
          StripGradSums<scalar_t, K> sums;
          sums.template add_lines<Act, kDerivative, PerColumn::kFetchFar<scalar_t>>(
              args, strip, 0, strip.lines,
              GradConstants<scalar_t, K>(args, PerColumn{first + column, lanes}));
          BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
            const std::int64_t at = column + k * P::kSize;
            add_to(block_dy_ + at, sums.dy[k], lanes, fresh, line == 0);
            add_to(block_dy_xmu_ + at, sums.dy_xmu[k], lanes, fresh, line == 0);
          }
        });
      }
      for (std::int64_t i = 0; i < columns; ++i) {
        sum_dy[i] += block_dy_[i];
        sum_dy_xmu[i] += block_dy_xmu_[i];
      }
    }
  }

 private:
  alignas(64) acc_t block_dy_[kTileColumns];
  alignas(64) acc_t block_dy_xmu_[kTileColumns];
};

// Of the channel whose `inner` columns start at `column`, and again every `period` columns.
inline double sum_columns(
    const double* values,
    std::int64_t column,
    std::int64_t inner,
    std::int64_t period,
    std::int64_t columns) {
  double sum = 0;
  for (; column < columns; column += period) {
    for (std::int64_t i = column; i < column + inner; ++i) {
      sum += values[i];
    }
  }
  return sum;
}

template <typename scalar_t, typename Act, Derivative kDerivative>
void grad_reduce_columns(
    const GradReduceArgs<scalar_t>& args, const Slab& slab, std::int64_t repeat) {
  ColumnGradSums<scalar_t> sums;
  const std::int64_t tile = kTileColumns / slab.inner * slab.inner;
  const std::int64_t period = slab.length / repeat;
  for (std::int64_t begin = 0; begin < period; begin += tile) {
    const std::int64_t columns = std::min(tile, slab.length - begin);
    const std::int64_t channel = begin / slab.inner;
    if (slab.inner == 1 && repeat == 1) {
      sums.template reduce<Act, kDerivative>(
          args, slab, begin, columns, args.sum_dy + channel, args.sum_dy_xmu + channel);
      continue;
    }
    double sum_dy[kTileColumns] = {}, sum_dy_xmu[kTileColumns] = {};
    sums.template reduce<Act, kDerivative>(args, slab, begin, columns, sum_dy, sum_dy_xmu);
    for (std::int64_t c = 0; c < std::min(columns, period) / slab.inner; ++c) {
      const std::int64_t column = c * slab.inner;
      args.sum_dy[channel + c] += sum_columns(sum_dy, column, slab.inner, period, columns);
      args.sum_dy_xmu[channel + c] += sum_columns(sum_dy_xmu, column, slab.inner, period, columns);
    }
  }
}

// The sums of elements of one channel: a stretch of a run, or several short runs.
template <typename scalar_t, typename Act, Derivative kDerivative>
BNEXT_INLINE GradSums grad_reduce_block(
    const GradArgs<scalar_t>& args,
    std::int64_t at,
    std::int64_t size,
    std::int64_t runs,
    std::int64_t stride,
    std::int64_t ahead,
    std::int64_t channel) {
  constexpr int K = kStripPacks<scalar_t>;
  const PerChannel source{channel};
  StripGradSums<scalar_t, 1> sums;
  for (std::int64_t run = 0; run < runs; ++run, at += stride) {
    for_each_run_strip<scalar_t, K>(at, size, ahead, [&](auto packs, const Strip& strip) {
      const GradConstants<scalar_t, packs()> constants(args, source);
      // A few lines at a time: two levels of sums round less than one.
      for (std::int64_t begin = 0; begin < strip.lines; begin += kGroupLines) {
        StripGradSums<scalar_t, packs()> group;
        group.template add_lines<Act, kDerivative, PerChannel::kFetchFar<scalar_t>>(
            args, strip, begin, std::min(begin + kGroupLines, strip.lines), constants);
        sums.dy[0] = sums.dy[0] + sum_of(group.dy);
        sums.dy_xmu[0] = sums.dy_xmu[0] + sum_of(group.dy_xmu);
      }
    }, [&](const Strip& strip, std::int64_t rest) {
      auto pack = GradPack<scalar_t>::template load<Act, kDerivative>(
          args, strip, 0, GradConstants<scalar_t, 1>(args, source), 0);
      pack.dy = pack.dy.last(rest);
      pack.xmu = pack.xmu.last(rest);
      sums.add_pack(pack, 0);
    });
  }
  return {sums.dy[0].sum_lanes(), sums.dy_xmu[0].sum_lanes()};
}

template <typename scalar_t, typename Act, Derivative kDerivative>
BNEXT_KERNEL void grad_reduce_runs(const GradReduceArgs<scalar_t>& given, const Slab& slab) {
  const GradReduceArgs<scalar_t> args = given;
  constexpr std::int64_t kBlock = kBlockLines * kStripPacks<scalar_t> * Pack<scalar_t>::kSize;
  const std::int64_t channels = slab.channels();
  for_each_run_block<scalar_t>(
      slab, kBlock, [&](std::int64_t at, std::int64_t size, std::int64_t runs, std::int64_t ahead) {
    for (std::int64_t c = 0; c < channels; ++c, at += slab.inner) {
      const GradSums sums = grad_reduce_block<scalar_t, Act, kDerivative>(
          args, at, size, runs, slab.stride, ahead, c);
      args.sum_dy[c] += sums.sum_dy;
      args.sum_dy_xmu[c] += sums.sum_dy_xmu;
    }
  });
}

// The constants of `args` as the strips of the slab read them.
template <typename scalar_t>
class ExpandedGradConstants {
 public:
  void expand(GradArgs<scalar_t>& args, const Slab& slab, std::int64_t repeat) {
    args.mean = mean_.expand(args.mean, slab, repeat);
    args.scale = scale_.expand(args.scale, slab, repeat);
    args.shift = shift_.expand(args.shift, slab, repeat);
  }

 private:
  Constants<AccType<scalar_t>> mean_, scale_, shift_;
};

template <typename scalar_t>
void grad_reduce(const GradReduceArgs<scalar_t>& args, const Slab& slab) {
  std::fill_n(args.sum_dy, slab.channels(), 0.0);
  std::fill_n(args.sum_dy_xmu, slab.channels(), 0.0);
  for_each_part<scalar_t>(slab, [&](const Slab& part, std::int64_t offset, std::int64_t repeat) {
    ExpandedGradConstants<scalar_t> constants;
    GradReduceArgs<scalar_t> expanded = args;
    expanded.advance(offset);
    constants.expand(expanded, part, repeat);
    dispatch_derivative(args.activation, args.derivative, [&](auto act, auto derivative) {
      if (part.inner > kShortRun) {
        grad_reduce_runs<scalar_t, decltype(act), derivative()>(expanded, part);
      } else {
        grad_reduce_columns<scalar_t, decltype(act), derivative()>(expanded, part, repeat);
      }
    });
  });
}

// kPlain: batch statistics, and the gradient of the input alone is wanted. Frozen statistics do not
// depend on x: there are no coefficients, and a non-finite x must not reach its gradient.
template <typename scalar_t, typename Act, Derivative kDerivative, bool kPlain>
BNEXT_KERNEL void grad_apply_slab(const GradApplyArgs<scalar_t>& given, const Slab& slab) {
  const GradApplyArgs<scalar_t> args = given;
  using P = Pack<scalar_t>;
  const bool frozen = !kPlain && args.coef_x == nullptr;
  for_each_strip<scalar_t, kStripPacks<scalar_t>>(
      slab, args.ahead, [&](auto packs, const Strip& strip, auto source) {
    constexpr int K = packs();
    const GradConstants<scalar_t, K> constants(args, source);
    P coef_x[K], coef_0[K];
    BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
      coef_x[k] = frozen ? P(0) : source.template get<P>(args.coef_x, k);
      coef_0[k] = frozen ? P(0) : source.template get<P>(args.coef_0, k);
    }
    for (std::int64_t i = 0; i < strip.lines; ++i) {
      BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
        const std::int64_t here = strip.at + i * strip.stride + k * P::kSize;
        if (args.stream) {
          constexpr FetchInto kInto = decltype(source)::template kFetchFar<scalar_t>;
          fetch<kInto>(args.input, strip, i, k);
          fetch<kInto>(args.grad_output, strip, i, k);
        } else {
          fetch<FetchInto::kL1>(args.input, strip, i, k);
          fetch<FetchInto::kL1>(args.grad_output, strip, i, k);
          if constexpr (kPlain) {
            fetch<FetchInto::kL1ToWrite>(args.grad_input, strip, i, k);
          }
        }
        const auto pack =
            GradPack<scalar_t>::template load<Act, kDerivative>(args, strip, i, constants, k);
        if (!kPlain && args.grad_residual != nullptr) {
          pack.dy.store(args.grad_residual + here, strip.lanes);
        }
        if (kPlain || args.grad_input != nullptr) {
          const P dx = frozen ? pack.dy * constants.scale[k]
                              : grad_input_centred(
                                    pack.dy, pack.xmu, constants.scale[k], coef_x[k], coef_0[k]);
          if (kPlain && args.stream) {
            dx.stream(args.grad_input + here);
          } else {
            dx.store(args.grad_input + here, strip.lanes);
          }
        }
      }
    }
  });
}

template <typename scalar_t>
void grad_apply(const GradApplyArgs<scalar_t>& args, const Slab& slab) {
  const bool plain = !kFewKernels && args.coef_x != nullptr && args.grad_input != nullptr &&
                     args.grad_residual == nullptr;
  for_each_part<scalar_t>(slab, [&](const Slab& part, std::int64_t offset, std::int64_t repeat) {
    ExpandedGradConstants<scalar_t> constants;
    Constants<AccType<scalar_t>> coef_x, coef_0;
    GradApplyArgs<scalar_t> expanded = args;
    expanded.advance(offset);
    constants.expand(expanded, part, repeat);
    expanded.coef_x = coef_x.expand(args.coef_x, part, repeat);
    expanded.coef_0 = coef_0.expand(args.coef_0, part, repeat);
    dispatch_derivative(args.activation, args.derivative, [&](auto act, auto derivative) {
      if (plain) {
        grad_apply_slab<scalar_t, decltype(act), derivative(), !kFewKernels>(expanded, part);
      } else {
        grad_apply_slab<scalar_t, decltype(act), derivative(), false>(expanded, part);
      }
    });
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext::cpu
