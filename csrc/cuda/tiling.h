// How the blocks of a kernel share a tensor: plain numbers, made by launch_config.h on the host and
// read by every kernel. A *tile* is a set of adjacent channels that one block works on, a *piece*
// the part of a (ghost, tile) that one block reads; its *lines* are runs of adjacent elements.
//   planes: a tile is one channel, a line is a sample's plane of S elements (or a part of it)
//   rows:   a tile is a stretch of a row of C elements, a line is a row
#pragma once

#include <cstdint>

#include "../core/host_device.h"
#include "../core/layout.h"

namespace bnext::cuda {

// A range cut into near-equal pieces, the first `longer` of them longer by one, as in
// split_range; made on the host, since a division of 64 bits is a hundred instructions on a GPU.
struct Cuts {
  std::int64_t size;
  std::int64_t longer;

  BNEXT_HD Range piece(std::int64_t i) const {
    const std::int64_t begin = i * size + (i < longer ? i : longer);
    return {begin, begin + size + (i < longer ? 1 : 0)};
  }
};

inline Cuts make_cuts(std::int64_t total, std::int64_t pieces) {
  return {total / pieces, total % pieces};
}

// One piece, as a block sees it.
struct Piece {
  std::int64_t offset;  // of the first element of its first line in the tensor
  std::int64_t lines;
  std::int64_t length;   // elements of a line
  std::int64_t channel;  // its first channel
  std::int32_t n_channel;
  double count;  // values per channel
};

struct Tiling {
  std::int64_t n_batch;
  std::int64_t n_channel;
  std::int64_t spatial;
  std::int64_t num_ghosts;
  std::int64_t line_stride;       // elements from a line to the next
  std::int64_t lines_per_sample;  // 1 for planes, S for rows; 0 where a ghost is one line (C = 1)
  std::int64_t inner_unit;        // elements in which lines are cut
  Cuts ghosts;                    // of samples
  // Of a shorter and of a longer ghost: its lines, and the units of each line.
  Cuts lines[2];
  Cuts units[2];
  std::int64_t line_length[2];
  std::int32_t tiles;
  std::int32_t tile_channels;
  std::int32_t line_cuts;
  std::int32_t inner_cuts;
  std::int32_t phase;         // elements of the tensor's first element past a multiple of 16 bytes
  std::int32_t cache_stride;  // elements of a line in shared memory
  bool lines_inner;           // planes: a thread walks down the lines, not along them

  BNEXT_HD std::int32_t splits() const { return line_cuts * inner_cuts; }

  // Values per channel of the batch, and of a ghost.
  BNEXT_HD double batch_count() const { return static_cast<double>(n_batch * spatial); }
  double one_over_batch_count;  // made on the host, as Cuts
  BNEXT_HD double ghost_count(std::int64_t ghost) const {
    return static_cast<double>(ghosts.piece(ghost).size() * spatial);
  }

  BNEXT_HD Piece piece(bool rows, std::int64_t ghost, std::int32_t tile, std::int32_t split) const {
    const Range samples = ghosts.piece(ghost);
    const int kind = ghost < ghosts.longer ? 1 : 0;
    Piece piece;
    piece.channel = static_cast<std::int64_t>(tile) * tile_channels;
    const std::int64_t rest = n_channel - piece.channel;
    piece.n_channel = rest < tile_channels ? static_cast<std::int32_t>(rest) : tile_channels;
    if (rows) {  // whose lines are not cut
      const Range cut = lines[kind].piece(split);
      piece.lines = cut.size();
      piece.length = piece.n_channel;
      piece.offset = (samples.begin * lines_per_sample + cut.begin) * line_stride + piece.channel;
      piece.count = static_cast<double>(piece.lines);
    } else {
      const Range cut = lines[kind].piece(split / inner_cuts);
      const Range unit = units[kind].piece(split % inner_cuts);
      const std::int64_t begin = unit.begin * inner_unit;
      const std::int64_t last = unit.end * inner_unit;
      const std::int64_t end = last < line_length[kind] ? last : line_length[kind];
      piece.lines = cut.size();
      piece.length = end - begin;
      const std::int64_t first_line =
          lines_per_sample == 0 ? samples.begin : samples.begin + cut.begin;
      piece.offset = first_line * line_stride + piece.channel * spatial + begin;
      piece.count = static_cast<double>(piece.lines * piece.length);
    }
    return piece;
  }
};

}  // namespace bnext::cuda
