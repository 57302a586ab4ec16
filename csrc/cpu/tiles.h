// A slab as a sequence of tiles: small row-major matrices whose columns each belong to one channel.
// Every kernel is a loop over the packs of a tile's columns, whatever the layout of the tensor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pack.h"

namespace bnext {
namespace CPU_CAPABILITY {

// Columns of a tile at most: its per-column accumulators stay in the first-level cache.
constexpr std::int64_t kTileColumns = 512;

struct Tile {
  std::int64_t offset;  // of its first element in the slab
  std::int64_t lines;
  std::int64_t columns;  // <= kTileColumns
  std::int64_t stride;
  std::int64_t channel;  // of its first column
  std::int64_t inner;    // columns per channel
};

// Calls f(tile) for the tiles of the slab: a fixed order, lines within a tile in memory order.
template <typename scalar_t, typename F>
void for_each_tile(const Slab& slab, F&& f) {
  if (slab.inner <= kShortRun) {
    const std::int64_t columns = kTileColumns / slab.inner * slab.inner;
    for (std::int64_t begin = 0; begin < slab.length; begin += columns) {
      f(Tile{
          begin, slab.lines, std::min(columns, slab.length - begin), slab.stride,
          begin / slab.inner, slab.inner});
    }
    return;
  }
  // A long run is read as a matrix of one or four packs a line, and a rest of less than one line.
  constexpr std::int64_t kSize = Pack<scalar_t>::kSize;
  const std::int64_t columns = slab.inner >= 64 * kSize ? 4 * kSize : kSize;
  const std::int64_t lines = slab.inner / columns;
  const std::int64_t rest = slab.inner % columns;
  for (std::int64_t line = 0; line < slab.lines; ++line) {
    for (std::int64_t channel = 0; channel < slab.channels(); ++channel) {
      const std::int64_t offset = line * slab.stride + channel * slab.inner;
      f(Tile{offset, lines, columns, columns, channel, columns});
      if (rest != 0) {
        f(Tile{offset + lines * columns, 1, rest, rest, channel, rest});
      }
    }
  }
}

// Calls f(line, lines, column, slot, lanes) for packs that cover the lines [begin, end) of a tile,
// up to `group` lines of one column at a time, so that what belongs to the column is loaded once
// for all of them. The last pack of a line overlaps the one before it (its columns are then
// computed twice, alike), so that only lines shorter than a pack have fewer lanes than a full one.
// slot is the pack's place in an array of accumulators.
template <typename scalar_t, typename F>
BNEXT_INLINE void for_each_pack(
    const Tile& tile, std::int64_t begin, std::int64_t end, std::int64_t group, F&& f) {
  constexpr std::int64_t kSize = Pack<scalar_t>::kSize;
  const std::int64_t lanes = std::min(kSize, tile.columns);
  const std::int64_t last = tile.columns - lanes;
  for (std::int64_t line = begin; line < end; line += group) {
    const std::int64_t lines = std::min(group, end - line);
    for (std::int64_t slot = 0; slot < tile.columns; slot += kSize) {
      f(line, lines, std::min(slot, last), slot, lanes);
    }
  }
}

template <typename scalar_t>
inline std::int64_t num_slots(std::int64_t length) {
  constexpr std::int64_t kSize = Pack<scalar_t>::kSize;
  return (length + kSize - 1) / kSize * kSize;
}

// Moves the values of the overlapping last pack from their slots to their columns.
template <typename scalar_t, typename T>
inline void slots_to_columns(T* values, std::int64_t length) {
  constexpr std::int64_t kSize = Pack<scalar_t>::kSize;
  const std::int64_t rest = length % kSize;
  if (length > kSize && rest != 0) {
    std::copy_n(values + length - rest + kSize - rest, rest, values + length - rest);
  }
}

// Lines of one column read together, so that what belongs to the column is loaded once for all of
// them: only as many as lie close together, since the prefetchers follow one stream a page.
constexpr std::int64_t kMaxLinesAtOnce = 8;
constexpr std::int64_t kNearElements = 256;

inline std::int64_t lines_at_once(const Tile& tile) {
  return std::clamp<std::int64_t>(kNearElements / tile.stride, 1, kMaxLinesAtOnce);
}

// One value per column of a tile from one per channel; no copy where they are the same.
template <typename acc_t>
class ColumnConstants {
 public:
  const acc_t* expand(const acc_t* per_channel, const Tile& tile) {
    if (tile.inner == 1) {
      return per_channel + tile.channel;
    }
    for (std::int64_t i = 0, c = tile.channel; i < tile.columns; i += tile.inner, ++c) {
      std::fill_n(values_ + i, tile.inner, per_channel[c]);
    }
    return values_;
  }

 private:
  alignas(64) acc_t values_[kTileColumns];
};

}  // namespace CPU_CAPABILITY
}  // namespace bnext
