// How the kernels walk a slab: strips of a few packs side by side, whose lines are read one after
// the other while everything that belongs to their columns stays in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pack.h"

namespace bnext {
namespace CPU_CAPABILITY {

// Vectors side by side in a strip. Few enough for the registers of the instruction set, several so
// that additions into one accumulator do not wait for each other.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kStripVecs = 4;
#else
constexpr int kStripVecs = 2;
#endif

template <typename scalar_t>
constexpr int kStripPacks = std::max(1, kStripVecs / Pack<scalar_t>::kVecs);

// Backward holds twice as much per column.
template <typename scalar_t>
constexpr int kGradStripPacks = std::max(1, kStripVecs / 2 / Pack<scalar_t>::kVecs);

// Lines of a strip, whose sums are added to those of the block: two levels round less than one.
constexpr std::int64_t kGroupLines = 8;

// Columns of a wide matrix: their sums stay in the first-level cache.
constexpr std::int64_t kTileColumns = 512;

// Lines of a wide matrix that are walked strip by strip.
constexpr std::int64_t kWalkLines = 32;

// Lines are fetched this many bytes ahead, at least one line.
constexpr std::int64_t kPrefetchBytes = 16384;

// K adjacent packs of `lines` lines; only a strip of one pack may have fewer than all lanes.
struct Strip {
  std::int64_t at;  // of its first element in the slab
  std::int64_t lines;
  std::int64_t stride;
  std::int64_t lanes;
  std::int64_t ahead;  // elements from what is read to what is fetched, 0: the hardware does it
};

template <int K>
using Packs = std::integral_constant<int, K>;

// The constants of a strip: those of its columns, or those of the one channel it belongs to.
struct PerColumn {
  std::int64_t column;
  std::int64_t lanes;

  template <typename P>
  BNEXT_INLINE P get(const typename P::acc_t* values, int k) const {
    return P::load_acc(values + column + k * P::kSize, lanes);
  }
};
struct PerChannel {
  std::int64_t channel;

  template <typename P>
  BNEXT_INLINE P get(const typename P::acc_t* values, int) const {
    return P(values[channel]);
  }
};

// Calls f(packs, column, lanes) for strips of K packs that cover `columns` columns, and of one pack
// for the rest. The last pack overlaps the one before it: its columns are computed twice, alike.
template <typename scalar_t, int K, typename F>
BNEXT_INLINE void for_each_column_strip(std::int64_t columns, F&& f) {
  constexpr std::int64_t kSize = Pack<scalar_t>::kSize;
  std::int64_t column = 0;
  for (; column + K * kSize <= columns; column += K * kSize) {
    f(Packs<K>{}, column, kSize);
  }
  for (; column < columns; column += kSize) {
    const std::int64_t lanes = std::min(kSize, columns);
    f(Packs<1>{}, std::min(column, columns - lanes), lanes);
  }
}

// Elements from a line to the one that is fetched with it.
template <typename scalar_t>
std::int64_t prefetch_distance(std::int64_t stride) {
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(scalar_t));
  return std::max<std::int64_t>(1, kPrefetchBytes / (stride * kBytes)) * stride;
}

// Calls f(packs, strip) for strips that cover a run of adjacent elements, read as lines of K packs,
// and f_rest(strip, rest) for its last pack if only `rest` lanes of it are not in the strips.
template <typename scalar_t, int K, typename F, typename Rest>
BNEXT_INLINE void for_each_run_strip(
    std::int64_t at, std::int64_t size, F&& f, Rest&& f_rest) {
  constexpr std::int64_t kSize = Pack<scalar_t>::kSize;
  const std::int64_t lines = size / (K * kSize);
  if (lines != 0) {
    f(Packs<K>{}, Strip{at, lines, K * kSize, kSize, 0});
  }
  const std::int64_t packs = size / kSize - lines * K;
  if (K > 1 && packs != 0) {
    f(Packs<1>{}, Strip{at + lines * K * kSize, packs, kSize, kSize, 0});
  }
  if (size % kSize != 0) {
    f_rest(Strip{at + size - kSize, 1, kSize, kSize, 0}, size % kSize);
  }
}

// Calls f(packs, strip, constants) for strips that cover the slab, some elements of it twice: of a
// wide matrix, or of one run after the other.
template <typename scalar_t, int K, typename F>
BNEXT_INLINE void for_each_strip(const Slab& slab, F&& f) {
  if (slab.inner > kShortRun) {
    for (std::int64_t line = 0; line < slab.lines; ++line) {
      for (std::int64_t channel = 0; channel < slab.channels(); ++channel) {
        const PerChannel constants{channel};
        for_each_run_strip<scalar_t, K>(
            line * slab.stride + channel * slab.inner, slab.inner,
            [&](auto packs, const Strip& strip) { f(packs, strip, constants); },
            [&](const Strip& strip, std::int64_t) { f(Packs<1>{}, strip, constants); });
      }
    }
    return;
  }
  const std::int64_t ahead = prefetch_distance<scalar_t>(slab.stride);
  for (std::int64_t line = 0; line < slab.lines; line += kWalkLines) {
    const std::int64_t lines = std::min(kWalkLines, slab.lines - line);
    for_each_column_strip<scalar_t, K>(
        slab.length, [&](auto packs, std::int64_t column, std::int64_t lanes) {
      f(packs, Strip{line * slab.stride + column, lines, slab.stride, lanes, ahead},
        PerColumn{column, lanes});
    });
  }
}

template <typename scalar_t>
BNEXT_INLINE void prefetch(const scalar_t* p, std::int64_t ahead) {
  if (ahead != 0) {
    __builtin_prefetch(p + ahead);
  }
}

template <typename T, int K>
BNEXT_INLINE T sum_of(const T (&values)[K]) {
  T sum = values[0];
  BNEXT_UNROLL_HOST for (int k = 1; k < K; ++k) {
    sum = sum + values[k];
  }
  return sum;
}

// Values per channel as values per column where a channel is a few columns of a wide matrix; no
// copy elsewhere.
template <typename acc_t>
class Constants {
 public:
  const acc_t* expand(const acc_t* per_channel, const Slab& slab) {
    if (per_channel == nullptr || slab.inner == 1 || slab.inner > kShortRun) {
      return per_channel;
    }
    values_.resize(slab.length);
    for (std::int64_t c = 0; c < slab.channels(); ++c) {
      std::fill_n(values_.data() + c * slab.inner, slab.inner, per_channel[c]);
    }
    return values_.data();
  }

 private:
  std::vector<acc_t> values_;
};

}  // namespace CPU_CAPABILITY
}  // namespace bnext
