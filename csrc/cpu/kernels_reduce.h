// reduce on the CPU: the moments of each channel of a slab.
#pragma once

#include "../core/layout.h"
#include "kernels.h"
#include "pack.h"
#include "tiles.h"

namespace bnext::cpu {
namespace CPU_CAPABILITY {
namespace {

// Lines of a block to each of those whose mean is its pivot.
constexpr std::int64_t kLinesPerPivotLine = 8;

// Sums of d = x - pivot and of d * d over the lines of a strip. A block of n lines is read once:
// the mean of its first k is the pivot of all, so that sum(d * d) <= (1 + n / k) * M2 and the
// correction cannot cancel (docs/math.md).
template <typename scalar_t, int K>
struct StripSums {
  using P = Pack<scalar_t>;

  BNEXT_INLINE StripSums() {
    BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
      d[k] = dd[k] = P(0);
    }
  }

  template <FetchInto kInto>
  BNEXT_INLINE void add_lines(
      const scalar_t* input,
      const Strip& strip,
      std::int64_t begin,
      std::int64_t end,
      const P (&pivot)[K]) {
    const scalar_t* x = input + strip.at + begin * strip.stride;
    for (std::int64_t i = begin; i < end; ++i, x += strip.stride) {
      BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
        fetch<kInto>(input, strip, i, k);
        add_pack(P::load(x + k * P::kSize, strip.lanes) - pivot[k], k);
      }
    }
  }

  BNEXT_INLINE void add_pack(const P& deviation, int k) {
    d[k] = d[k] + deviation;
    dd[k] = Math<P>::fmadd(deviation, deviation, dd[k]);
  }

  P d[K];
  P dd[K];
};

// The sum of the lines of a strip.
template <typename scalar_t, int K>
BNEXT_INLINE void sum_lines(const scalar_t* input, const Strip& strip, Pack<scalar_t> (&sum)[K]) {
  using P = Pack<scalar_t>;
  const scalar_t* x = input + strip.at;
  BNEXT_UNROLL_HOST for (P& s : sum) {
    s = P(0);
  }
  for (std::int64_t i = 0; i < strip.lines; ++i, x += strip.stride) {
    BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
      fetch<FetchInto::kL1>(input, strip, i, k);
      sum[k] = sum[k] + P::load(x + k * P::kSize, strip.lanes);
    }
  }
}

// Finds moments of each column of a wide matrix.
template <typename scalar_t>
class ColumnMoments {
  using acc_t = AccType<scalar_t>;
  using P = Pack<scalar_t>;

 public:
  BNEXT_KERNEL void reduce(
      const scalar_t* input,
      const Slab& slab,
      std::int64_t first,
      std::int64_t columns,
      const double* base,
      double* mean,
      double* m2) {
    const std::int64_t group = sum_group_lines<scalar_t>(slab.stride);
    const std::int64_t blocks = num_blocks(slab.lines, kBlockLines);
    for (std::int64_t block = 0; block < blocks; ++block) {
      const Range range = split_range(slab.lines, blocks, block);
      const std::int64_t begin = range.begin;
      const std::int64_t block_lines = range.size();
      const std::int64_t pivot_lines = ceil_div(block_lines, kLinesPerPivotLine);
      for_each_column_strip<scalar_t, kStripPacks<scalar_t>>(
          columns, [&](auto packs, std::int64_t column, std::int64_t lanes, std::int64_t) {
        set_pivot(
            packs, input,
            Strip{
                begin * slab.stride + first + column, pivot_lines, slab.stride, lanes,
                fetch_next_lines<scalar_t, packs()>(slab, begin, pivot_lines, first + column)},
            column);
      });
      for (std::int64_t line = 0; line < block_lines; line += group) {
        const std::int64_t group_lines = std::min(group, block_lines - line);
        for_each_column_strip<scalar_t, kStripPacks<scalar_t>>(
            columns, [&](auto packs, std::int64_t column, std::int64_t lanes, std::int64_t fresh) {
          const Strip strip{
              (begin + line) * slab.stride + first + column, group_lines, slab.stride, lanes,
              fetch_next_lines<scalar_t, packs()>(slab, begin + line, group_lines, first + column)};
          add_group(packs, input, strip, column, fresh, line == 0);
        });
      }
      merge_block(
          static_cast<double>(begin), static_cast<double>(block_lines), columns, base, mean, m2);
    }
  }

 private:
  template <int K>
  BNEXT_INLINE void set_pivot(
      Packs<K>, const scalar_t* input, const Strip& strip, std::int64_t column) {
    P pivot[K];
    sum_lines(input, strip, pivot);
    const P one_over_k(acc_t(1) / static_cast<acc_t>(strip.lines));
    BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
      finite_pivot(pivot[k] * one_over_k).store_acc(pivot_ + column + k * P::kSize, strip.lanes);
    }
  }

  template <int K>
  BNEXT_INLINE void add_group(
      Packs<K>,
      const scalar_t* input,
      const Strip& strip,
      std::int64_t column,
      std::int64_t fresh,
      bool first) {
    P pivot[K];
    BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
      pivot[k] = P::load_acc(pivot_ + column + k * P::kSize, strip.lanes);
    }
    StripSums<scalar_t, K> sums;
    sums.template add_lines<FetchInto::kL1>(input, strip, 0, strip.lines, pivot);
    BNEXT_UNROLL_HOST for (int k = 0; k < K; ++k) {
      const std::int64_t at = column + k * P::kSize;
      add_to(sum_d_ + at, sums.d[k], strip.lanes, fresh, first);
      add_to(sum_dd_ + at, sums.dd[k], strip.lanes, fresh, first);
    }
  }

  void merge_block(
      double before,
      double lines,
      std::int64_t columns,
      const double* base,
      double* __restrict mean,
      double* __restrict m2) const {
    const double one_over_n = 1.0 / lines;
    const double b_over_n = lines / (before + lines);
    const double ab_over_n = before * b_over_n;
    if (before == 0) {
      for (std::int64_t i = 0; i < columns; ++i) {
        shifted_moments<double>(
            from_base<scalar_t>(pivot_[i], base, i), sum_d_[i], sum_dd_[i], one_over_n, mean[i],
            m2[i]);
      }
      return;
    }
    for (std::int64_t i = 0; i < columns; ++i) {
      double block_mean, block_m2;
      shifted_moments<double>(
          from_base<scalar_t>(pivot_[i], base, i), sum_d_[i], sum_dd_[i], one_over_n, block_mean,
          block_m2);
      merge_moments(mean[i], m2[i], block_mean, block_m2, b_over_n, ab_over_n);
    }
  }

  alignas(64) acc_t pivot_[kTileColumns];
  alignas(64) acc_t sum_d_[kTileColumns];
  alignas(64) acc_t sum_dd_[kTileColumns];
};

// Of the channel whose `inner` columns start at `column`, and again every `period` columns.
inline Welford<double> merge_columns(
    const double* mean,
    const double* m2,
    std::int64_t column,
    std::int64_t inner,
    std::int64_t period,
    std::int64_t columns,
    std::int64_t lines) {
  double means[kTileColumns], m2s[kTileColumns];
  std::int64_t size = 0;
  for (; column < columns; column += period, size += inner) {
    std::copy_n(mean + column, inner, means + size);
    std::copy_n(m2 + column, inner, m2s + size);
  }
  return merge_equal(means, m2s, size, static_cast<double>(lines));
}

template <typename scalar_t>
void reduce_columns(const ReduceArgs<scalar_t>& args, const Slab& slab, std::int64_t repeat) {
  ColumnMoments<scalar_t> moments;
  Constants<double> expanded;
  const double* const base = expanded.expand(args.base, slab, repeat);
  // A repeated line is one tile.
  const std::int64_t tile = kTileColumns / slab.inner * slab.inner;
  const std::int64_t period = slab.length / repeat;
  for (std::int64_t begin = 0; begin < period; begin += tile) {
    const std::int64_t columns = std::min(tile, slab.length - begin);
    const std::int64_t channel = begin / slab.inner;
    if (slab.inner == 1 && repeat == 1) {
      moments.reduce(
          args.input, slab, begin, columns, at_offset(base, begin), args.mean + channel,
          args.m2 + channel);
      continue;
    }
    double mean[kTileColumns], m2[kTileColumns];
    moments.reduce(args.input, slab, begin, columns, at_offset(base, begin), mean, m2);
    for (std::int64_t c = 0; c < std::min(columns, period) / slab.inner; ++c) {
      const auto merged =
          merge_columns(mean, m2, c * slab.inner, slab.inner, period, columns, slab.lines);
      args.mean[channel + c] = merged.mean;
      args.m2[channel + c] = merged.m2;
    }
  }
}

// Elements of one channel: a stretch of a run, or several short runs.
template <typename scalar_t>
class RunBlock {
  using acc_t = AccType<scalar_t>;
  using P = Pack<scalar_t>;
  static constexpr int K = kStripPacks<scalar_t>;

 public:
  RunBlock(std::int64_t size, std::int64_t runs, std::int64_t stride)
      : size_(size),
        runs_(runs),
        stride_(stride),
        pivot_lines_(num_pivot_lines(size / (K * P::kSize), runs)),
        pivot_packs_(pivot_lines_ != 0 ? pivot_lines_ * K : num_pivot_packs(size, runs)),
        one_over_pivot_size_(acc_t(1) / static_cast<acc_t>(pivot_packs_ * P::kSize)),
        one_over_size_(1.0 / static_cast<double>(size * runs)) {}

  // All lanes share one pivot, so that their sums add up.
  BNEXT_INLINE void reduce(
      const scalar_t* x, std::int64_t ahead, const double* base, double& mean, double& m2) const {
    const acc_t pivot_value = pivot(x);
    const P one_pivot(pivot_value);
    StripSums<scalar_t, 1> sums;
    for (std::int64_t run = 0; run < runs_; ++run, x += stride_) {
      for_each_run_strip<scalar_t, K>(0, size_, ahead, [&](auto packs, const Strip& strip) {
        P pivots[packs()];
        BNEXT_UNROLL_HOST for (P& p : pivots) {
          p = one_pivot;
        }
        // A few lines at a time: two levels of sums round less than one.
        for (std::int64_t begin = 0; begin < strip.lines; begin += kGroupLines) {
          StripSums<scalar_t, packs()> group;
          group.template add_lines<PerChannel::kFetchFar<scalar_t>>(
              x, strip, begin, std::min(begin + kGroupLines, strip.lines), pivots);
          sums.d[0] = sums.d[0] + sum_of(group.d);
          sums.dd[0] = sums.dd[0] + sum_of(group.dd);
        }
      }, [&](const Strip& strip, std::int64_t rest) {
        sums.add_pack((P::load(x + strip.at) - one_pivot).last(rest), 0);
      });
    }
    shifted_moments<double>(
        from_base<scalar_t>(pivot_value, base, 0), sums.d[0].sum_lanes(), sums.dd[0].sum_lanes(),
        one_over_size_, mean, m2);
  }

 private:
  // The pivot is the mean of an eighth of the block at least: the first lines of a lone run, nearly
  // all of the first of up to four.
  static std::int64_t num_pivot_lines(std::int64_t lines, std::int64_t runs) {
    return runs > 1 || lines == 0 ? lines : ceil_div(lines + 1, kLinesPerPivotLine);
  }
  static std::int64_t num_pivot_packs(std::int64_t size, std::int64_t runs) {
    return runs > 1 ? size / P::kSize : 1;
  }
  static_assert(kMaxRunsAtOnce * 2 <= kLinesPerPivotLine);

  BNEXT_INLINE acc_t pivot(const scalar_t* x) const {
    P sum[1];
    if (pivot_lines_ != 0) {
      P sums[K];
      sum_lines(x, Strip{0, pivot_lines_, K * P::kSize, P::kSize, {}}, sums);
      sum[0] = sum_of(sums);
    } else {
      sum_lines(x, Strip{0, pivot_packs_, P::kSize, P::kSize, {}}, sum);
    }
    return finite_pivot(sum[0].rough_sum_of_lanes() * one_over_pivot_size_);
  }

  std::int64_t size_;
  std::int64_t runs_;
  std::int64_t stride_;
  std::int64_t pivot_lines_;  // of K packs; 0: of single packs
  std::int64_t pivot_packs_;
  acc_t one_over_pivot_size_;
  double one_over_size_;
};

// Runs of all lines and channels: long ones in blocks, short ones of a few lines at once.
template <typename scalar_t>
BNEXT_KERNEL void reduce_runs(const ReduceArgs<scalar_t>& given, const Slab& slab) {
  const ReduceArgs<scalar_t> args = given;
  constexpr std::int64_t kBlock = kBlockLines * kStripPacks<scalar_t> * Pack<scalar_t>::kSize;
  const std::int64_t channels = slab.channels();
  double before = 0;
  for_each_run_block<scalar_t>(
      slab, kBlock,
      [&](std::int64_t at, std::int64_t block_size, std::int64_t runs, std::int64_t ahead) {
    const RunBlock<scalar_t> block(block_size, runs, slab.stride);
    const auto size = static_cast<double>(block_size * runs);
    const double b_over_n = size / (before + size);
    const double ab_over_n = before * b_over_n;
    const scalar_t* x = args.input + at;
    for (std::int64_t c = 0; c < channels; ++c, x += slab.inner) {
      double mean, m2;
      block.reduce(x, ahead, at_offset(args.base, c), mean, m2);
      if (before == 0) {
        args.mean[c] = mean;
        args.m2[c] = m2;
      } else {
        merge_moments(args.mean[c], args.m2[c], mean, m2, b_over_n, ab_over_n);
      }
    }
    before += size;
  });
}

template <typename scalar_t>
void reduce(const ReduceArgs<scalar_t>& args, const Slab& slab) {
  if (slab.inner > kShortRun) {
    return reduce_runs(args, slab);
  }
  double rest_mean[kTileColumns], rest_m2[kTileColumns];
  for_each_part<scalar_t>(slab, [&](const Slab& part, std::int64_t offset, std::int64_t repeat) {
    if (offset == 0) {
      return reduce_columns(args, part, repeat);
    }
    reduce_columns<scalar_t>({args.input + offset, args.base, rest_mean, rest_m2}, part, repeat);
    const double b_over_n = static_cast<double>(part.lines) / static_cast<double>(slab.lines);
    const double ab_over_n = static_cast<double>((slab.lines - part.lines) * slab.inner) * b_over_n;
    for (std::int64_t c = 0; c < slab.channels(); ++c) {
      merge_moments(args.mean[c], args.m2[c], rest_mean[c], rest_m2[c], b_over_n, ab_over_n);
    }
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext::cpu
