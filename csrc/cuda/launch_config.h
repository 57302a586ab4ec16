// From a tensor's shape and the device's properties to kernels, grids and what fits on chip. Plain
// C++, tested on the host for every architecture (tests/cpp/launch_cases.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tiling.h"

namespace bnext::cuda {

constexpr int kWarp = 32;

// Threads of every block, and the blocks of it that every kernel leaves room for on a
// multiprocessor: at most 128 registers a thread on all architectures. Two blocks of 256 threads
// with kUnroll loads of 16 bytes each have 32 KiB in flight; an H100 needs about 15 KiB a
// multiprocessor to keep its memory busy (3.35 TB/s * 600 ns / 132, Little's law).
constexpr int kThreads = 256;
constexpr int kMinBlocksPerSm = 2;
constexpr int kMaxRegisters = 65536 / (kMinBlocksPerSm * kThreads);

// Bytes of the widest load and store, and what their addresses are multiples of.
constexpr int kVectorAlignment = 16;

// Vectors that a thread loads at once.
constexpr int kUnroll = 4;

// Channels of a tile of rows: a row's stretch of 256 to 512 bytes, whole cache lines, and scratch
// for their sums of at most 17 KiB.
constexpr int kMaxTileChannels = 128;

// Shared memory of a block, one part after the other: a flag; constants of each channel of the
// tile; its pivot and the sums of each warp; on chip also what was seen of the channel, and the
// cache.
constexpr int kFlagBytes = 16;
constexpr int kConstants = 5;
constexpr int kSeenBytes = 32;

BNEXT_HD constexpr int constants_end(int tile_channels, int acc_bytes) {
  return kFlagBytes + (kConstants * tile_channels * acc_bytes + 15) / 16 * 16;
}
BNEXT_HD constexpr int scratch_end(int tile_channels, int acc_bytes) {
  const int doubles = (1 + 2 * (kThreads / kWarp)) * tile_channels;
  return constants_end(tile_channels, acc_bytes) + (doubles * 8 + 15) / 16 * 16;
}
BNEXT_HD constexpr int seen_end(int tile_channels, int acc_bytes) {
  return scratch_end(tile_channels, acc_bytes) + kSeenBytes * tile_channels;
}

struct DeviceProperties {
  int num_sms;
  int max_threads_per_sm;
  int max_blocks_per_sm;
  int shared_per_sm;
  int shared_per_block;  // the most that a kernel can opt in to
  // Offsets within a piece stay below this many elements for 32-bit indices: half of what an int
  // holds, since the walk steps beyond the end before it stops. The same for every device; tests
  // lower it, so that small tensors take the kernels with 64-bit offsets.
  std::int64_t narrow_elements = std::int64_t(1) << 30;
};

// A tensor, or several of one shape and layout that a kernel walks over together.
struct Operands {
  Layout layout;
  std::int64_t num_ghosts;
  int element_bytes;
  int acc_bytes;
  // Bytes of the first elements past a multiple of 16: the same for all of them, or -1.
  int phase_bytes;
};

// What a kernel does with its pieces.
enum class Pass { kReduce, kApply };

struct Launch {
  Tiling tiling;
  bool rows;
  bool vector;      // 16 bytes at a time, else one element
  bool wide_index;  // 64-bit offsets within a piece
  int threads_x;
  int threads_y;
  std::int64_t blocks;
  int shared_bytes;

  // On-chip launches.
  bool cooperative;
  std::int32_t tile_teams;
  std::int32_t ghost_teams;
  int cache_elements;
  std::int32_t num_teams() const { return tile_teams * ghost_teams; }
};

namespace detail {

inline int power_of_two_from(std::int64_t value, int least, int most) {
  int power = least;
  while (power < value && power < most) {
    power *= 2;
  }
  return power;
}

// Bytes of a row that a tile takes: as wide as threads allow, a cache line, or two sectors of DRAM.
constexpr int kWideRow = 512;
constexpr int kCacheLine = 128;
constexpr int kNarrowRow = 64;

// Elements in which a line of a plane is cut: no cut is worth less.
constexpr std::int64_t kInnerUnit = 512;

// The tile (of rows: at most `row_bytes` of each) and the threads of a block, before the work is
// cut into pieces.
inline Launch base_launch(const Operands& operands, int row_bytes, const DeviceProperties& device) {
  Launch launch{};
  Tiling& t = launch.tiling;
  const Layout& layout = operands.layout;
  // A plane of one element is an element of a row.
  launch.rows = layout.n_channel > 1 && (layout.order == Order::kRows || layout.spatial == 1);
  const int width = kVectorAlignment / operands.element_bytes;
  const bool whole_rows = layout.n_channel % width == 0 && operands.phase_bytes == 0;
  launch.vector = launch.rows ? whole_rows : operands.phase_bytes >= 0;
  const int vec = launch.vector ? width : 1;
  t.n_batch = layout.n_batch;
  t.n_channel = layout.n_channel;
  t.spatial = layout.spatial;
  t.num_ghosts = operands.num_ghosts;
  t.one_over_batch_count = 1 / t.batch_count();
  t.ghosts = make_cuts(layout.n_batch, operands.num_ghosts);
  t.phase = launch.vector ? operands.phase_bytes / operands.element_bytes : 0;
  if (launch.rows) {
    launch.threads_x = power_of_two_from(
        ceil_div(layout.n_channel, vec), 1,
        std::clamp(
            row_bytes / (vec * operands.element_bytes), 1,
            std::min(kWarp, kMaxTileChannels / vec)));
    t.tile_channels = launch.threads_x * vec;
    t.line_stride = layout.n_channel;
    t.lines_per_sample = layout.spatial;
  } else {
    t.tile_channels = 1;
    const bool one_line = layout.n_channel == 1;
    t.line_stride = one_line ? layout.spatial : layout.n_channel * layout.spatial;
    t.lines_per_sample = one_line ? 0 : 1;
  }
  t.tiles = static_cast<std::int32_t>(ceil_div(layout.n_channel, t.tile_channels));
  for (int kind = 0; kind < 2; ++kind) {
    const std::int64_t samples = t.ghosts.size + kind;
    t.line_length[kind] = launch.rows               ? t.tile_channels
                          : t.lines_per_sample == 0 ? samples * layout.spatial
                                                    : layout.spatial;
  }
  if (!launch.rows) {
    const std::int64_t vectors = std::max<std::int64_t>(1, t.line_length[0] / vec);
    // Along a line there is something to unroll if every thread has 8 vectors; else a thread takes
    // its place in line after line, which must then all start on a vector's boundary.
    const bool aligned = t.phase == 0 && layout.spatial % vec == 0 && t.lines_per_sample != 0;
    const bool long_lines = vectors >= 2 * kUnroll * kWarp;
    t.lines_inner = aligned && !long_lines;
    // 8 to 16 vectors; and 8 threads at least: each of the elements at the ends of a line has one.
    launch.threads_x = t.lines_inner ? power_of_two_from(vectors, 1, kThreads)
                                     : power_of_two_from(vectors / (4 * kUnroll) + 1, 8, kThreads);
  }
  launch.threads_y = kThreads / launch.threads_x;
  // A thread's first offset is that of its place, and so is its step, also where there is no such
  // line.
  launch.wide_index = layout.numel() > device.narrow_elements ||
                      t.line_stride > device.narrow_elements / launch.threads_y;
  return launch;
}

// Lines of the smallest ghost.
inline std::int64_t ghost_lines(const Launch& launch) {
  const Tiling& t = launch.tiling;
  return t.lines_per_sample == 0 ? 1 : t.ghosts.size * t.lines_per_sample;
}

// Cuts every (ghost, tile) into `wanted` pieces, or fewer where they would get too short; every
// piece of every ghost has at least one line and one element.
inline void cut(Launch& launch, std::int64_t wanted) {
  Tiling& t = launch.tiling;
  const std::int64_t lines = ghost_lines(launch);
  // Down the lines a thread shall have kUnroll of them.
  const std::int64_t least =
      launch.rows || t.lines_inner ? launch.threads_y * static_cast<std::int64_t>(kUnroll) : 1;
  const std::int64_t line_cuts =
      std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(1, lines / least));
  std::int64_t inner_cuts = 1;
  if (!launch.rows) {
    inner_cuts = std::clamp<std::int64_t>(
        wanted / line_cuts, 1, std::max<std::int64_t>(1, t.line_length[0] / kInnerUnit));
  }
  t.line_cuts = static_cast<std::int32_t>(line_cuts);
  t.inner_cuts = static_cast<std::int32_t>(inner_cuts);
  // Uncut lines are one unit of any length.
  t.inner_unit = inner_cuts > 1 ? kInnerUnit : std::max(t.line_length[0], t.line_length[1]);
  for (int kind = 0; kind < 2; ++kind) {
    const std::int64_t samples = t.ghosts.size + kind;
    const std::int64_t all = t.lines_per_sample == 0 ? 1 : samples * t.lines_per_sample;
    t.lines[kind] = make_cuts(all, line_cuts);
    t.units[kind] = make_cuts(ceil_div(t.line_length[kind], t.inner_unit), inner_cuts);
  }
  // Along fewer lines than there are threads for: more threads along each.
  const std::int64_t most_lines = t.lines[t.ghosts.longer > 0 ? 1 : 0].piece(0).size();
  while (!launch.rows && !t.lines_inner && launch.threads_y > most_lines) {
    launch.threads_x *= 2;
    launch.threads_y /= 2;
  }
}

// Into how many pieces each of `pairs` is cut for about `waves` waves of resident blocks, at most
// into `most`: a few more, or one wave less, where the last wave would leave many places empty.
inline std::int64_t even_splits(
    std::int64_t pairs, std::int64_t resident, int waves, std::int64_t most) {
  const auto fill = [&](std::int64_t splits) {
    const std::int64_t blocks = pairs * splits;
    return static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, resident) * resident);
  };
  constexpr double kWorthwhile = 0.05;  // each piece costs something
  const std::int64_t first = std::clamp<std::int64_t>(waves * resident / pairs, 1, most);
  const std::int64_t full_waves = first * pairs / resident;
  std::int64_t best = first;
  const auto consider = [&](std::int64_t splits) {
    if (splits >= 1 && splits <= most && fill(splits) > fill(best) + kWorthwhile) {
      best = splits;
    }
  };
  for (std::int64_t splits = first + 1; splits <= first + 3; ++splits) {
    consider(splits);
  }
  consider(full_waves * resident / pairs);
  return best;
}

// Elements of the largest piece in shared memory, each line on a vector's boundary.
inline std::int64_t cache_size(Launch& launch, int element_bytes) {
  Tiling& t = launch.tiling;
  const int kind = t.ghosts.longer > 0 ? 1 : 0;
  const int width = kVectorAlignment / element_bytes;
  const int vec = launch.vector ? width : 1;
  std::int64_t length = t.tile_channels;
  if (!launch.rows) {
    length = t.units[kind].piece(0).size() * t.inner_unit;
    length = std::min(length, t.line_length[kind]);
    length += t.lines_inner ? 0 : vec - 1;
  }
  length = ceil_div(length, vec) * vec;
  const std::int64_t lines = t.lines[kind].piece(0).size();
  if (length > (std::int64_t(1) << 24) || lines > (std::int64_t(1) << 24)) {
    return std::int64_t(1) << 48;
  }
  t.cache_stride = static_cast<std::int32_t>(length);
  // Every tensor's copy starts on a vector's boundary.
  return ceil_div(lines * length, width) * width;
}

inline std::int64_t resident_blocks(const DeviceProperties& device) {
  const int by_threads = device.max_threads_per_sm / kThreads;
  return static_cast<std::int64_t>(device.num_sms) *
         std::max(1, std::min({kMinBlocksPerSm, by_threads, device.max_blocks_per_sm}));
}

}  // namespace detail

// A kernel that reads its piece from memory. Reduce: about two waves of resident blocks, since each
// piece costs a merge; apply: four, for an even end. No piece is below 48 KiB, 12 vectors a thread:
// what a block reads besides, the constants of up to 128 channels, is small beside it. Down to 8
// KiB where multiprocessors would have no block else.
inline Launch two_pass_launch(const Operands& operands, Pass pass, const DeviceProperties& device) {
  Launch launch = detail::base_launch(operands, detail::kWideRow, device);
  const bool reduce = pass == Pass::kReduce;
  const std::int64_t pairs = operands.num_ghosts * launch.tiling.tiles;
  const std::int64_t bytes = operands.layout.numel() / pairs * operands.element_bytes;
  const std::int64_t resident = detail::resident_blocks(device);
  const std::int64_t most =
      std::max(ceil_div(bytes, 48 * 1024), std::min(ceil_div(bytes, 8 * 1024), resident / pairs));
  detail::cut(launch, detail::even_splits(pairs, resident, reduce ? 2 : 4, most));
  launch.blocks = pairs * launch.tiling.splits();
  launch.shared_bytes = reduce ? scratch_end(launch.tiling.tile_channels, operands.acc_bytes)
                               : constants_end(launch.tiling.tile_channels, operands.acc_bytes);
  return launch;
}

// A kernel that keeps its piece of `tensors` tensors in shared memory; blocks == 0 where nothing
// fits, or only with so many places empty that two passes move less. `resident` is how many blocks
// of the kernel are resident at once on the device (the occupancy query's answer where there is a
// device to ask).
//
// Lone blocks with the widest tile that fits and leaves no multiprocessor without a block are taken
// at once. Else the cheapest of lone blocks with narrow tiles and of teams, where the cost is what
// one of the resident blocks reads, and a wait counts as so many bytes. Half of a
// multiprocessor's shared memory is the most that a block takes: two blocks take turns at reading
// and writing.
inline Launch on_chip_launch(
    const Operands& operands, int tensors, const DeviceProperties& device, std::int64_t resident) {
  const int reserved_by_cuda = 1024;  // of each block, since compute capability 8.0
  const std::int64_t limit =
      std::min(device.shared_per_block, device.shared_per_sm / kMinBlocksPerSm - reserved_by_cuda);
  // One of 264 blocks of an H100 reads and writes 16 KiB in the 2 us that a team's meeting takes.
  constexpr std::int64_t kWait = 16 * 1024;
  // Bytes a channel that a block reads and writes besides its piece: partial sums and constants.
  constexpr std::int64_t kBesides = 64;
  const auto fits = [&](Launch& launch) {
    const int own = seen_end(launch.tiling.tile_channels, operands.acc_bytes);
    const std::int64_t elements = detail::cache_size(launch, operands.element_bytes);
    const std::int64_t bytes = own + elements * tensors * operands.element_bytes;
    // Offsets within a piece are 32-bit.
    const Tiling& t = launch.tiling;
    const std::int64_t lines = std::max<std::int64_t>(t.lines[1].piece(0).size(), launch.threads_y);
    if (bytes > limit || lines > device.narrow_elements / t.line_stride) {
      return false;
    }
    launch.cache_elements = static_cast<int>(elements);
    launch.shared_bytes = static_cast<int>(bytes);
    return true;
  };
  const auto piece_bytes = [&](const Launch& launch) {
    return static_cast<std::int64_t>(launch.cache_elements) * tensors * operands.element_bytes;
  };

  Launch best{};
  const std::int64_t all_bytes = operands.layout.numel() * tensors * operands.element_bytes;
  std::int64_t best_cost = std::numeric_limits<std::int64_t>::max(), best_bytes = 0;
  for (int row_bytes = detail::kWideRow; row_bytes >= detail::kNarrowRow; row_bytes /= 2) {
    Launch launch = detail::base_launch(operands, row_bytes, device);
    detail::cut(launch, 1);
    if (fits(launch)) {
      const std::int64_t pairs = operands.num_ghosts * launch.tiling.tiles;
      launch.tile_teams = launch.tiling.tiles;
      // Four waves of blocks, for an even end.
      launch.ghost_teams = static_cast<std::int32_t>(std::clamp<std::int64_t>(
          ceil_div(4 * resident, launch.tiling.tiles), 1, operands.num_ghosts));
      launch.blocks = launch.num_teams();
      if (pairs >= device.num_sms) {
        return launch;
      }
      const std::int64_t cost = piece_bytes(launch);  // at most a block a multiprocessor
      if (cost < best_cost) {
        best = launch;
        best_cost = best_bytes = cost;
      }
    }
    if (!launch.rows) {
      break;
    }
  }
  // Narrow tiles: what the blocks of a team tell each other is small beside their pieces.
  for (int row_bytes : {detail::kCacheLine, detail::kNarrowRow}) {
    const Launch base = detail::base_launch(operands, row_bytes, device);
    const std::int64_t pairs = operands.num_ghosts * base.tiling.tiles;
    const std::int64_t fewest = std::max<std::int64_t>(2, ceil_div(all_bytes / pairs, limit));
    const std::int64_t most =
        std::min(resident, std::max(2 * fewest, ceil_div(2 * resident, pairs)));
    std::int64_t next = 0;
    for (std::int64_t splits = std::max(fewest, most / 4); splits <= most; splits = next) {
      next = splits + 1 + splits / 16;
      next = splits < most ? std::min(next, most) : next;
      Launch launch = base;
      detail::cut(launch, splits);
      const std::int64_t team = launch.tiling.splits();
      if (team < 2 || team > resident || !fits(launch)) {
        continue;
      }
      launch.cooperative = true;
      const std::int64_t teams = resident / team;
      launch.tile_teams =
          static_cast<std::int32_t>(std::min<std::int64_t>(teams, launch.tiling.tiles));
      launch.ghost_teams = static_cast<std::int32_t>(
          std::clamp<std::int64_t>(teams / launch.tile_teams, 1, operands.num_ghosts));
      launch.blocks = launch.num_teams() * team;
      const std::int64_t rounds = ceil_div(launch.tiling.tiles, launch.tile_teams) *
                                  ceil_div(operands.num_ghosts, launch.ghost_teams);
      const std::int64_t cost =
          rounds * (piece_bytes(launch) + kWait + kBesides * launch.tiling.tile_channels);
      if (cost < best_cost) {
        best = launch;
        best_cost = cost;
        best_bytes = rounds * piece_bytes(launch);
      }
    }
    if (!base.rows) {
      break;
    }
  }
  // In two passes all is read twice and written once. Of a small tensor the second launch costs
  // more.
  const std::int64_t two_passes =
      all_bytes / std::max<std::int64_t>(1, resident) * (2 * tensors + 1) / (tensors + 1);
  constexpr std::int64_t kSmall = 256 * 1024;
  return best_bytes <= std::max(two_passes, kSmall) ? best : Launch{};
}

}  // namespace bnext::cuda
