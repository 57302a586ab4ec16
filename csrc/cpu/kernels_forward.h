// reduce and apply on the CPU.
#pragma once

#include "kernels.h"
#include "pack.h"
#include "tiles.h"

namespace bnext {
namespace CPU_CAPABILITY {
namespace {

// Lines of a block, whose sums are kept in acc_t before they are merged in double.
constexpr std::int64_t kBlockLines = 64;

// The first lines of a block, whose mean is its pivot.
constexpr std::int64_t kPivotLines = 8;

// The least lines that are summed before their sum is added to the block's.
constexpr std::int64_t kMinLinesAdded = 4;

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

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace bnext
