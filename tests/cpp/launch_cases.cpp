// Cases of csrc/cuda/launch_config.h, tiling.h and workspace.h: what a launch may not exceed, that
// its pieces are the tensor, how its threads walk over them, and what lies between its blocks.
#include "launch_model.h"

namespace core_cases {
namespace {

using bnext::cuda::kMaxRegisters;
using bnext::cuda::kMinBlocksPerSm;

void launches_keep_the_limits() {
  check(kMaxRegisters * kThreads * kMinBlocksPerSm <= 65536, "registers for the resident blocks");
  for_launches(
      all_shapes(),
      [](const Launch& l, const Operands& of, const DeviceProperties& device, int tensors) {
    const Tiling& t = l.tiling;
    check_equal(l.threads_x * l.threads_y, kThreads, "threads");
    check(l.threads_x >= 1 && l.threads_x <= kThreads, "a power of two of columns");
    check_equal(kThreads % l.threads_x, 0, "what a column's threads leave over");
    if (l.rows) {
      // The sums of a column are exchanged within a warp, and thread t has channel t.
      check(l.threads_x <= bnext::cuda::kWarp, "a column within a warp");
      check(t.tile_channels <= kThreads, "a thread for each channel");
      check_equal(t.tile_channels, l.threads_x * vector_width(l, of), "channels of a tile");
    }
    check(l.shared_bytes <= device.shared_per_block, "shared memory of a block");
    check(
        kMinBlocksPerSm * (l.shared_bytes + 1024) <= device.shared_per_sm,
        "two blocks on a multiprocessor");
    const int64_t pairs = of.num_ghosts * t.tiles;
    check(l.blocks >= 1, "a block");
    // A grid has 2^31 - 1 blocks at most: pieces are no smaller than a (ghost, tile), and launchers
    // refuse what has more of those.
    check(l.blocks <= std::max<int64_t>(pairs, INT32_MAX), "a grid");
    check_equal(l.cooperative, tensors > 0 && t.splits() > 1, "cooperative");
    if (l.cooperative) {
      check(l.blocks <= bnext::cuda::detail::resident_blocks(device), "all blocks resident");
    }
  });
}

void ghosts_are_those_of_tensor_split() {
  for_operands(all_shapes(), [](const Operands& of) {
    const Tiling t = two_pass_launch(of, Pass::kReduce, kH100.properties).tiling;
    int64_t last = -1;
    for (int64_t ghost : {int64_t(0), t.ghosts.longer - 1, t.ghosts.longer, of.num_ghosts - 1}) {
      if (ghost < 0 || ghost >= of.num_ghosts || ghost <= last) {
        continue;
      }
      last = ghost;
      const auto expected = bnext::split_range(of.layout.n_batch, of.num_ghosts, ghost);
      const auto samples = t.ghosts.piece(ghost);
      check_equal(samples.begin, expected.begin, "the first sample");
      check_equal(samples.end, expected.end, "the end of the samples");
      const auto count = static_cast<double>(expected.size() * of.layout.spatial);
      check_equal(t.ghost_count(ghost), count, "the ghost's values per channel");
    }
    check_equal(
        t.batch_count(), static_cast<double>(of.layout.n_batch * of.layout.spatial),
        "the batch's values per channel");
  });
}

// Counts how often each element is in a piece.
void pieces_are_the_tensor() {
  std::vector<int> seen;
  for_launches(
      small_shapes(), [&](const Launch& l, const Operands& of, const DeviceProperties&, int) {
    const Tiling& t = l.tiling;
    seen.assign(of.layout.numel(), 0);
    double batch = 0;
    for (int64_t ghost = 0; ghost < of.num_ghosts; ++ghost) {
      for (std::int32_t tile = 0; tile < t.tiles; ++tile) {
        double count = 0;
        for (std::int32_t split = 0; split < t.splits(); ++split) {
          const Piece piece = t.piece(l.rows, ghost, tile, split);
          check(piece.lines >= 1 && piece.length >= 1 && piece.n_channel >= 1, "an element");
          count += piece.count;
          for (int64_t line = 0; line < piece.lines; ++line) {
            for (int64_t i = 0; i < piece.length; ++i) {
              ++seen.at(piece.offset + line * t.line_stride + i);
            }
          }
        }
        check_equal(count, t.ghost_count(ghost), "values of a ghost's pieces");
        batch += tile == 0 ? count : 0;
      }
    }
    check_equal(batch, t.batch_count(), "values of all ghosts");
    check(seen == std::vector<int>(seen.size(), 1), "each element in one piece");
  });
}

// Of tensors that are too large for that: pieces of a few (ghost, tile)s meet, and end with them.
void large_pieces_meet() {
  for_launches(
      large_shapes(), [](const Launch& l, const Operands& of, const DeviceProperties&, int) {
    const Tiling& t = l.tiling;
    for (int64_t ghost : {int64_t(0), t.ghosts.longer - 1, t.ghosts.longer, of.num_ghosts - 1}) {
      if (ghost < 0 || ghost >= of.num_ghosts) {
        continue;
      }
      const auto samples = t.ghosts.piece(ghost);
      for (std::int32_t tile : {0, t.tiles - 1}) {
        const int64_t channel = int64_t(tile) * t.tile_channels;
        const int64_t all_lines = t.lines_per_sample == 0 ? 1 : samples.size() * t.lines_per_sample;
        int64_t lines = 0;
        double count = 0;
        for (int cut = 0; cut < t.line_cuts; ++cut) {
          int64_t along = 0;
          Piece piece{};
          for (int inner = 0; inner < t.inner_cuts; ++inner) {
            piece = t.piece(l.rows, ghost, tile, cut * t.inner_cuts + inner);
            check(piece.lines >= 1 && piece.length >= 1, "an element");
            check_equal(piece.channel, channel, "the first channel");
            const int64_t start = samples.begin * of.layout.n_channel * of.layout.spatial +
                                  (l.rows ? channel : channel * of.layout.spatial);
            check_equal(piece.offset, start + lines * t.line_stride + along, "offset");
            along += piece.length;
            count += piece.count;
          }
          check_equal(
              along,
              l.rows                    ? piece.n_channel
              : t.lines_per_sample == 0 ? samples.size() * of.layout.spatial
                                        : of.layout.spatial,
              "the lengths of a line's pieces");
          lines += piece.lines;
        }
        check_equal(lines, all_lines, "lines");
        check_equal(count, t.ghost_count(ghost), "values");
      }
    }
    const int64_t last = (t.tiles - int64_t(1)) * t.tile_channels;
    check(last < of.layout.n_channel, "a channel in the last tile");
    check(last + t.tile_channels >= of.layout.n_channel, "all channels in a tile");
  });
}

// All threads of a block visit each element of a piece once, in vectors that are aligned in global
// and in shared memory; what they keep of a piece does not overlap, and has room.
void threads_walk_over_a_piece() {
  std::vector<int> visited, kept;
  for_launches(
      small_shapes(),
      [&](const Launch& l, const Operands& of, const DeviceProperties& device, int tensors) {
    // The others' blocks walk alike.
    if (device.num_sms != kT4.properties.num_sms && device.num_sms != kTiny.properties.num_sms) {
      return;
    }
    const Tiling& t = l.tiling;
    const int vec = vector_width(l, of);
    for (int64_t ghost : {int64_t(0), of.num_ghosts - 1}) {
      for (std::int32_t tile : {0, t.tiles - 1}) {
        for (std::int32_t split : {0, t.splits() / 2, t.splits() - 1}) {
          const Piece piece = t.piece(l.rows, ghost, tile, split);
          const int64_t span = (piece.lines - 1) * t.line_stride + piece.length;
          visited.assign(span, 0);
          kept.assign(tensors > 0 ? l.cache_elements : 0, 0);
          for (int thread = 0; thread < kThreads; ++thread) {
            bool first = true, aligned = true;
            walk(
                l, piece, vec, thread % l.threads_x, thread / l.threads_x,
                [&](int64_t offset, int width, int64_t cache) {
              first = false;
              const int64_t place = piece.offset + offset + of.phase_bytes / of.element_bytes;
              aligned = aligned && (width == 1 || (place % vec == 0 && cache % vec == 0));
              for (int i = 0; i < width; ++i) {
                ++visited.at(offset + i);
                if (tensors > 0) {
                  ++kept.at(cache + i);
                }
              }
            });
            check(aligned, "vectors at multiples of 16 bytes in global and in shared memory");
            // The pivot of a channel is that of its first thread's values.
            const bool has_channel = l.rows ? thread * vec < piece.n_channel : thread == 0;
            check(!first || !has_channel || thread >= l.threads_x, "a value for the first thread");
          }
          bool once = true;
          for (int64_t at = 0; at < span; ++at) {
            once = once && visited[at] == (at % t.line_stride < piece.length ? 1 : 0);
          }
          check(once, "one visit of each element, and none beside the piece");
          once = std::all_of(kept.begin(), kept.end(), [](int uses) { return uses <= 1; });
          check(once, "one element in a place of the cache");
        }
      }
    }
    if (tensors > 0) {
      check_equal(l.cache_elements * of.element_bytes % kVectorAlignment, 0, "bytes of a copy");
      const int parts = bnext::cuda::seen_end(t.tile_channels, of.acc_bytes);
      check_equal(parts % kVectorAlignment, 0, "the beginning of the cache");
      check(
          parts + tensors * l.cache_elements * of.element_bytes <= l.shared_bytes,
          "room for a copy of each tensor");
    }
  });
}

// 32-bit indices hold all that the walk computes, also past the last line.
void indices_are_wide_enough() {
  for_launches(
      all_shapes(), [](const Launch& l, const Operands& of, const DeviceProperties&, int tensors) {
    const Tiling& t = l.tiling;
    const bool few_long_steps = l.threads_y * t.line_stride > (int64_t(1) << 30);
    if (of.layout.numel() > (int64_t(1) << 30)) {
      check(l.wide_index, "wide indices");
    } else if (!few_long_steps) {
      check(!l.wide_index, "narrow indices");
    }
    if (l.wide_index && tensors == 0) {
      return;
    }
    const int vec = vector_width(l, of);
    const auto nothing = [](int64_t, int, int64_t) {};
    Piece piece = t.piece(l.rows, 0, 0, 0);
    piece.lines = std::min<int64_t>(piece.lines, int64_t(1) << 14);  // for time
    for (int ty : {0, l.threads_y - 1}) {
      check(walk(l, piece, vec, 0, ty, nothing) <= INT32_MAX, "indices that an int holds");
    }
    const int64_t furthest = std::max<int64_t>(t.piece(l.rows, 0, 0, 0).lines, l.threads_y);
    check((furthest + l.threads_y) * t.line_stride <= INT32_MAX, "offsets that an int holds");
  });
}

// The largest indices of the kernels are within what is laid out, and the parts do not overlap.
void workspace_holds_all_sets() {
  for_launches(
      all_shapes(), [](const Launch& l, const Operands& of, const DeviceProperties&, int tensors) {
    const Tiling& t = l.tiling;
    const bool chip = tensors > 0;
    for (bool merges : {false, true}) {
      const auto size = bnext::cuda::workspace_size(l, chip, merges);
      // Addresses of nothing: only their distances count.
      double* const base = nullptr;
      unsigned* barriers = nullptr;
      const auto memory = bnext::cuda::make_workspace<bnext::cuda::TripleSets>(
          l, size, chip, {base, nullptr}, &barriers);
      const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
      const int64_t teams = chip ? l.num_teams() : 0;
      const int64_t pairs = of.num_ghosts * t.tiles;
      int64_t doubles = 0;
      if (t.splits() > 1) {
        // Of a team two buffers with a set for each block and one for the merge.
        const int64_t set =
            chip ? teams * 2 * (t.splits() + 1) - 1 : of.num_ghosts * t.splits() - 1;
        const auto sets = memory.pieces.at(chip ? 0 : t.tiles - 1, 0, set);
        const int64_t last = (chip ? t.tile_channels : of.layout.n_channel) - 1;
        check(at(sets.count) < at(memory.pieces.mean), "counts before means");
        check(at(sets.mean + last) < at(memory.pieces.m2), "means before M2");
        doubles = static_cast<int64_t>(at(sets.m2 + last) / sizeof(double)) + 1;
        check(doubles <= size.doubles, "pieces' sets");
        check(at(memory.ghosts.count) / sizeof(double) >= std::uintptr_t(doubles), "no overlap");
        const int64_t owners = chip ? teams : pairs;
        check(
            int64_t(at(memory.counters.ghosts) / sizeof(unsigned)) == owners * (chip ? 3 : 1),
            "counters of pieces, and two of each team");
        check(!chip || int64_t(at(barriers) / sizeof(unsigned)) == owners, "barriers of teams");
      }
      const int64_t ghosts = chip ? l.ghost_teams : of.num_ghosts;
      if (merges && ghosts > 1) {
        const auto sets = memory.ghosts.at(t.tiles - 1, of.layout.n_channel - 1, ghosts - 1);
        check(at(sets.count) < at(memory.ghosts.mean), "counts before means");
        check(at(sets.mean) < at(memory.ghosts.m2), "means before M2");
        doubles = static_cast<int64_t>(at(sets.m2) / sizeof(double)) + 1;
      }
      check_equal(size.doubles, doubles, "doubles");
      if (merges) {
        check_equal(
            static_cast<int64_t>(at(memory.counters.tiles + 1) / sizeof(unsigned)), size.counters,
            "counters");
      }
    }
  });
}

}  // namespace

std::vector<Case> launch_cases() {
  return {
      {"launches_keep_the_limits", launches_keep_the_limits},
      {"ghosts_are_those_of_tensor_split", ghosts_are_those_of_tensor_split},
      {"pieces_are_the_tensor", pieces_are_the_tensor},
      {"large_pieces_meet", large_pieces_meet},
      {"threads_walk_over_a_piece", threads_walk_over_a_piece},
      {"indices_are_wide_enough", indices_are_wide_enough},
      {"workspace_holds_all_sets", workspace_holds_all_sets},
  };
}

}  // namespace core_cases
