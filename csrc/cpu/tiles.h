// How the kernels walk a slab: strips of a few packs side by side, whose lines are read one after
// the other while everything that belongs to their columns stays in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../core/layout.h"
#include "pack.h"

namespace bnext::cpu {
namespace CPU_CAPABILITY {

// Vectors side by side in a strip. Few enough for the registers of the instruction set, several so
// that additions into one accumulator do not wait for each other.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kStripVecs = 4;
#else
constexpr int kStripVecs = 2;
#endif

// The baseline of x86-64, where a vector is a loop over its lanes to the compiler, has fewer and
// smaller kernels: it would be compiled for longer than all other files for the CPU together.
#if defined(__x86_64__) && !defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
constexpr bool kFewKernels = true;
#else
constexpr bool kFewKernels = false;
#endif

// At least a cache line: half of one stored past the caches, and the other half later, is two
// writes.
template <typename scalar_t>
constexpr int kStripPacks =
    kFewKernels ? 1
                : std::max<int>(
                      kStripVecs / Pack<scalar_t>::kVecs,
                      kStreamAlign / (Pack<scalar_t>::kSize * sizeof(scalar_t)));

// Lines of a strip, whose sums are added to those of the block: two levels round less than one.
constexpr std::int64_t kGroupLines = 8;
constexpr std::int64_t kMinGroupLines = 4;

// Lines of a block, whose sums are kept in acc_t before they are merged or added in double.
constexpr std::int64_t kBlockLines = 64;

// Near-equal blocks of about `size` lines, less than half as many more: no block of a line or two.
inline std::int64_t num_blocks(std::int64_t lines, std::int64_t size) {
  return std::max<std::int64_t>(1, (lines + size / 2) / size);
}

// Columns of a wide matrix: their sums stay in the first-level cache.
constexpr std::int64_t kTileColumns = 512;

// Lines of a wide matrix that are walked strip by strip: as many as lie within `bytes`, since the
// prefetchers follow one stream a page.
template <typename scalar_t>
std::int64_t near_lines(
    std::int64_t stride, std::int64_t bytes, std::int64_t least, std::int64_t most) {
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(scalar_t));
  return std::clamp<std::int64_t>(bytes / (stride * kBytes), least, most);
}

// While an element is only read and written: what is set up per strip, which takes longer for types
// of 16 bits, against the first-level cache.
template <typename scalar_t>
std::int64_t walk_lines(std::int64_t stride) {
  return near_lines<scalar_t>(stride, sizeof(scalar_t) < sizeof(float) ? 8192 : 4096, 1, 32);
}

// While its lines are summed: as many as are summed before their sum is added to the block's.
template <typename scalar_t>
std::int64_t sum_group_lines(std::int64_t stride) {
  return near_lines<scalar_t>(stride, 8192, kMinGroupLines, kGroupLines);
}

// What is fetched while a strip is read: an element with its first, and one `stride` elements
// further with each line.
struct Fetch {
  std::int64_t at = -1;  // negative: nothing
  std::int64_t stride = 0;
};

enum class FetchInto { kL1, kL1ToWrite, kL2 };

// K adjacent packs of `lines` lines; only a strip of one pack may have fewer than all lanes.
struct Strip {
  std::int64_t at;  // of its first element in the slab
  std::int64_t lines;
  std::int64_t stride;
  std::int64_t lanes;
  Fetch fetch;
};

template <int K>
using Packs = std::integral_constant<int, K>;

// The constants of a strip: those of its columns, or those of the one channel it belongs to. And
// where to fetch what comes from memory or as several streams: measured, not derived
// (docs/diary.md, "next lines of rows"); in runs it is far ahead.
struct PerColumn {
  template <typename scalar_t>
  static constexpr FetchInto kFetchFar =
      sizeof(scalar_t) < sizeof(float) ? FetchInto::kL1 : FetchInto::kL2;

  std::int64_t column;
  std::int64_t lanes;

  template <typename P>
  BNEXT_INLINE P get(const typename P::acc_t* values, int k) const {
    return P::load_acc(values + column + k * P::kSize, lanes);
  }
};
struct PerChannel {
  template <typename scalar_t>
  static constexpr FetchInto kFetchFar = FetchInto::kL2;

  std::int64_t channel;

  template <typename P>
  BNEXT_INLINE P get(const typename P::acc_t* values, int) const {
    return P(values[channel]);
  }
};

// Calls f(packs, column, lanes, fresh) for strips of K packs that cover `columns` columns, and of
// one pack for the rest. The last pack overlaps the one before it: only its last `fresh` lanes are
// not in another strip.
template <typename scalar_t, int K, typename F>
BNEXT_INLINE void for_each_column_strip(std::int64_t columns, F&& f) {
  constexpr std::int64_t kSize = Pack<scalar_t>::kSize;
  std::int64_t column = 0;
  if constexpr (K > 1) {
    for (; column + K * kSize <= columns; column += K * kSize) {
      f(Packs<K>{}, column, kSize, kSize);
    }
  }
  for (; column < columns; column += kSize) {
    const std::int64_t lanes = std::min(kSize, columns);
    f(Packs<1>{}, std::min(column, columns - lanes), lanes, std::min(kSize, columns - column));
  }
}

// While some lines of a wide matrix are walked strip by strip, the next ones are fetched in the
// order of memory: the strips alone would be many streams for the prefetchers of the hardware.
// The share of a strip of K packs at `column`; nothing where one strip is a line, and so in order.
template <typename scalar_t, int K>
Fetch fetch_next_lines(
    const Slab& slab, std::int64_t line, std::int64_t lines, std::int64_t column) {
  constexpr std::int64_t kSize = Pack<scalar_t>::kSize;
  const bool wanted = slab.stride == slab.length && slab.length > kStripPacks<scalar_t> * kSize;
  return wanted ? Fetch{(line + lines) * slab.stride + column * lines, K * kSize} : Fetch{};
}

// What the strip fetches with pack k of a line.
template <FetchInto kInto, typename scalar_t>
BNEXT_INLINE void fetch(const scalar_t* p, const Strip& strip, std::int64_t line, int k) {
  if (strip.fetch.at >= 0) {
    p += strip.fetch.at + line * strip.fetch.stride + k * Pack<scalar_t>::kSize;
    // The arguments must be constants.
    if constexpr (kInto == FetchInto::kL2) {
      __builtin_prefetch(p, 0, 2);
    } else {
      __builtin_prefetch(p, kInto == FetchInto::kL1ToWrite ? 1 : 0, 3);
    }
  }
}

// Calls f(packs, strip) for strips that cover a run of adjacent elements, read as lines of K packs,
// and f_rest(strip, rest) for its last pack if only `rest` lanes of it are not in the strips. The
// strips fetch what lies `ahead` elements further on, or, if that is 0, nothing.
template <typename scalar_t, int K, typename F, typename Rest>
BNEXT_INLINE void for_each_run_strip(
    std::int64_t at, std::int64_t size, std::int64_t ahead, F&& f, Rest&& f_rest) {
  constexpr std::int64_t kSize = Pack<scalar_t>::kSize;
  const auto fetch = [&](std::int64_t from, std::int64_t stride) {
    return ahead != 0 ? Fetch{from + ahead, stride} : Fetch{};
  };
  const std::int64_t lines = size / (K * kSize);
  if (lines != 0) {
    f(Packs<K>{}, Strip{at, lines, K * kSize, kSize, fetch(at, K * kSize)});
  }
  const std::int64_t packs = size / kSize - lines * K;
  if (K > 1 && packs != 0) {
    const std::int64_t rest = at + lines * K * kSize;
    f(Packs<1>{}, Strip{rest, packs, kSize, kSize, fetch(rest, kSize)});
  }
  if (size % kSize != 0) {
    f_rest(Strip{at + size - kSize, 1, kSize, kSize, {}}, size % kSize);
  }
}

// Runs of one channel in adjacent lines that are summed together if they are short: what is done
// per sum, and not per element, would take as long.
constexpr std::int64_t kMaxRunsAtOnce = 4;
constexpr std::int64_t kShortRunLines = 16;  // of a strip

// Calls f(at, size, runs, ahead) for the blocks of the first channel's runs: stretches of about
// `block` elements of a long run, or `runs` short ones in adjacent lines. Those to fetch meanwhile,
// where lines are not long, lie `ahead` elements further on; 0: none.
template <typename scalar_t, typename F>
BNEXT_INLINE void for_each_run_block(const Slab& slab, std::int64_t block, F&& f) {
  constexpr std::int64_t kWidth = kStripPacks<scalar_t> * Pack<scalar_t>::kSize;
  const std::int64_t at_once = slab.inner <= kShortRunLines * kWidth ? kMaxRunsAtOnce : 1;
  const std::int64_t blocks = num_blocks(slab.inner, block);
  for (std::int64_t line = 0; line < slab.lines; line += at_once) {
    for (std::int64_t i = 0; i < blocks; ++i) {
      const Range range = split_range(slab.inner, blocks, i);
      const bool wanted = slab.length < kLongLine && line + at_once < slab.lines;
      const std::int64_t ahead = wanted ? at_once * slab.stride : 0;
      f(line * slab.stride + range.begin, range.size(), std::min(at_once, slab.lines - line),
        ahead);
    }
  }
}

// Calls f(packs, strip, constants) for strips that cover the slab, some elements of it twice: of a
// wide matrix, or of one run after the other. They fetch what lies `ahead` elements further on, or,
// if that is 0, the next lines of a wide matrix.
template <typename scalar_t, int K, typename F>
BNEXT_INLINE void for_each_strip(const Slab slab, std::int64_t ahead, F&& f) {
  if (slab.inner > kShortRun) {
    const std::int64_t channels = slab.channels();
    for (std::int64_t line = 0; line < slab.lines; ++line) {
      for (std::int64_t channel = 0; channel < channels; ++channel) {
        const PerChannel constants{channel};
        for_each_run_strip<scalar_t, K>(
            line * slab.stride + channel * slab.inner, slab.inner, ahead,
            [&](auto packs, const Strip& strip) { f(packs, strip, constants); },
            [&](const Strip& strip, std::int64_t) { f(Packs<1>{}, strip, constants); });
      }
    }
    return;
  }
  const std::int64_t walk = walk_lines<scalar_t>(slab.stride);
  for (std::int64_t line = 0; line < slab.lines; line += walk) {
    const std::int64_t lines = std::min(walk, slab.lines - line);
    for_each_column_strip<scalar_t, K>(
        slab.length, [&](auto packs, std::int64_t column, std::int64_t lanes, std::int64_t) {
      const std::int64_t at = line * slab.stride + column;
      const Strip strip{
          at, lines, slab.stride, lanes,
          ahead != 0 ? Fetch{at + ahead, slab.stride}
                     : fetch_next_lines<scalar_t, packs()>(slab, line, lines, column)};
      f(packs, strip, PerColumn{column, lanes});
    });
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

// Adds the sums of a strip to those of its columns, or sets them.
template <typename P>
BNEXT_INLINE void add_to(
    typename P::acc_t* sums, P sum, std::int64_t lanes, std::int64_t fresh, bool first) {
  if (!first) {
    if (fresh != lanes) {
      sum = sum.last(fresh);
    }
    sum = P::load_acc(sums, lanes) + sum;
  }
  sum.store_acc(sums, lanes);
}

// Narrow lines that follow each other in memory are read as wide ones of `repeat` lines each: calls
// f(part, offset, repeat) for these, and for the lines that are left.
template <typename scalar_t, typename F>
void for_each_part(const Slab& slab, F&& f) {
  constexpr std::int64_t kWidth = kStripPacks<scalar_t> * Pack<scalar_t>::kSize;
  std::int64_t repeat = 1;
  if (slab.inner <= kShortRun && slab.length < kWidth && slab.stride == slab.length) {
    // Whole strips if possible.
    repeat = std::min(std::lcm(slab.length, kWidth), kTileColumns) / slab.length;
    if (slab.lines < kBlockLines * repeat) {
      repeat = 1;  // the constants of the columns would cost more than they save
    }
  }
  const std::int64_t wide = slab.lines / repeat;
  const std::int64_t rest = slab.lines % repeat;
  if (wide != 0) {
    f(Slab{wide, slab.length * repeat, slab.stride * repeat, slab.inner}, 0, repeat);
  }
  if (rest != 0) {
    f(Slab{rest, slab.length, slab.stride, slab.inner}, wide * repeat * slab.stride, 1);
  }
}

// Values per channel as values per column where a column of a wide matrix is not just a channel; no
// copy elsewhere. The channels come `repeat` times.
template <typename acc_t>
class Constants {
 public:
  const acc_t* expand(const acc_t* per_channel, const Slab& slab, std::int64_t repeat) {
    const bool as_they_are = repeat == 1 && (slab.inner == 1 || slab.inner > kShortRun);
    if (per_channel == nullptr || as_they_are) {
      return per_channel;
    }
    values_.resize(slab.length);
    const std::int64_t channels = slab.channels() / repeat;
    for (std::int64_t i = 0; i < slab.channels(); ++i) {
      std::fill_n(values_.data() + i * slab.inner, slab.inner, per_channel[i % channels]);
    }
    return values_.data();
  }

 private:
  std::vector<acc_t> values_;
};

}  // namespace CPU_CAPABILITY
}  // namespace bnext::cpu
