// How the work of one call is cut into pieces. Pieces are cut by size, never by the number
// of threads, and are merged in a fixed order: results are the same bits for any thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/layout.h"
#include "kernels.h"
#include "memory_cpu.h"

namespace bnext::cpu {

// Elements below which a piece is not cut further: work for some ten microseconds.
constexpr std::int64_t kGrainElements = 32768;
// Pieces of one ghost at most: bounds the merges, and still feeds that many threads.
constexpr std::int64_t kMaxPieces = 64;
// A ghost of this many elements stays in a core's cache from reduce to apply.
constexpr std::int64_t kCacheElements = 262144;
// Lines of short runs that a piece keeps, so that its per-column accumulators pay off.
constexpr std::int64_t kMinLines = 128;
// Adjacent elements that a piece of planes keeps.
constexpr std::int64_t kMinRun = kLongLine;
// And of rows, which are cut between channels only where their lines are too few.
constexpr std::int64_t kMinRowRun = 512;
// Beyond the last-level cache, planes of this many elements, of at least so many channels, are cut
// between channels alone, into pieces that a core's cache holds from reduce to apply: in backward,
// two tensors in float. Not where there is no reduce: apply alone is faster in longer runs.
constexpr std::int64_t kMinWholePlane = 512;
constexpr std::int64_t kMinWholeChannels = 16;
constexpr std::int64_t kWholeElements = 98304;

// Which of the two passes over the elements an op makes.
struct Phases {
  bool reduce;
  bool apply;
};

// In which order the steps of a call are run (steps.h).
enum class RunMode {
  kGhostByGhost,  // small ghosts: all steps of one while it is in a core's cache
  kPieceByPiece,  // pieces of whole channels: likewise
  kStepByStep,    // each step over the pieces of all ghosts before the next one
};

// One piece of one ghost.
struct Piece {
  Slab slab;
  std::int64_t offset;     // of its first element in the tensor
  std::int64_t channel;    // its first channel
  std::int64_t partial;    // which of the ghost's partial results it contributes to
  std::int64_t ahead = 0;  // from its elements to those that are reduced next, if that is known
};

class Schedule {
 public:
  Schedule(const Layout& layout, std::int64_t element_size, std::int64_t num_ghosts, Phases phases)
      : layout_(layout),
        element_size_(element_size),
        num_ghosts_(num_ghosts),
        phases_(phases),
        exceeds_cache_(4 * layout.numel() * element_size > last_level_cache_bytes()) {
    const bool rows = layout.order == Order::kRows;
    lines_per_sample_ = rows ? layout.spatial : 1;
    inner_ = rows ? 1 : layout.spatial;
    samples_per_ghost_ = layout.n_batch / num_ghosts;
    longer_ghosts_ = layout.n_batch % num_ghosts;
    // The smallest ghost decides: every ghost is cut into the same number of pieces.
    const std::int64_t lines = samples_per_ghost_ * lines_per_sample_;
    ghost_elements_ = lines * line_length();
    const std::int64_t wanted =
        std::clamp<std::int64_t>(ghost_elements_ / kGrainElements, 1, kMaxPieces);
    const std::int64_t per_channel = lines * inner_;
    if (exceeds_cache_ && phases.reduce && inner_ >= kMinWholePlane &&
        layout.n_channel >= kMinWholeChannels && per_channel <= kCacheElements) {
      cut_between_channels(std::max<std::int64_t>(1, kWholeElements / per_channel));
    } else {
      cut_by_size(rows, lines, wanted);
    }
    const bool small = ghost_elements_ <= kGrainElements ||
                       (ghost_elements_ <= kCacheElements && num_ghosts_ >= 8);
    run_mode_ = small                 ? RunMode::kGhostByGhost
                : num_partials() == 1 ? RunMode::kPieceByPiece
                                      : RunMode::kStepByStep;
  }

  Phases phases() const { return phases_; }
  std::int64_t num_ghosts() const { return num_ghosts_; }
  std::int64_t n_channel() const { return layout_.n_channel; }
  std::int64_t num_pieces() const { return line_cuts_ * plane_cuts_ * channel_cuts_; }
  std::int64_t num_partials() const { return line_cuts_ * plane_cuts_; }

  // Where a ghost's first element lies in the tensor, and how far apart its channels' first are.
  std::int64_t first_offset(std::int64_t ghost) const {
    return samples(ghost).begin * lines_per_sample_ * line_length();
  }
  std::int64_t channel_stride() const { return inner_; }

  // Values per channel of a ghost.
  double count(std::int64_t ghost) const {
    return static_cast<double>(samples(ghost).size() * layout_.spatial);
  }

  // Values per channel of the ghosts of [begin, end).
  double count(std::int64_t begin, std::int64_t end) const {
    const std::int64_t samples_before = samples(begin).begin;
    return static_cast<double>((samples(end - 1).end - samples_before) * layout_.spatial);
  }

  // Values per channel that contribute to a partial result of a ghost.
  double partial_count(std::int64_t ghost, std::int64_t partial) const {
    if (num_partials() == 1) {
      return count(ghost);
    }
    const Slab slab = piece(ghost, partial * channel_cuts_).slab;
    return static_cast<double>(slab.lines * slab.inner);
  }

  Piece piece(std::int64_t ghost, std::int64_t i) const {
    const Range ghost_samples = samples(ghost);
    Range channels{0, layout_.n_channel};
    Range plane{0, inner_};
    Range lines{0, ghost_samples.size() * lines_per_sample_};
    std::int64_t partial = 0;
    if (num_pieces() > 1) {  // else, for small ghosts, no time is spent on divisions
      partial = i / channel_cuts_;
      channels = split_range(channels.end, channel_cuts_, i % channel_cuts_);
      plane = split_range(plane.end, plane_cuts_, partial % plane_cuts_);
      lines = split_range(lines.end, line_cuts_, partial / plane_cuts_);
    }
    Piece piece;
    piece.slab = {lines.size(), channels.size() * plane.size(), line_length(), plane.size()};
    piece.offset = (ghost_samples.begin * lines_per_sample_ + lines.begin) * line_length() +
                   channels.begin * inner_ + plane.begin;
    piece.channel = channels.begin;
    piece.partial = partial;
    return piece;
  }

  // Whether a piece of an output is better stored past the caches: they do not hold all, and no
  // cache line is shared with another run.
  bool stream(const Piece& piece) const {
    const Slab& slab = piece.slab;
    const std::int64_t run = slab.inner <= kShortRun ? slab.length : slab.inner;
    const auto aligned = [&](std::int64_t elements) {
      return elements * element_size_ % kStreamAlign == 0;
    };
    return exceeds_cache_ && aligned(run) && aligned(slab.stride) && aligned(piece.offset);
  }

  // From the elements of a small ghost to those of the next, which fit into a core's cache beside
  // its own; else 0.
  std::int64_t distance_to_next(std::int64_t ghost) const {
    const bool near = ghost_elements_ <= kGrainElements && ghost + 1 < num_ghosts_;
    return near ? samples(ghost).size() * lines_per_sample_ * line_length() : 0;
  }

  RunMode run_mode() const { return run_mode_; }

  // Groups of consecutive small ghosts, each for one thread; else each ghost is a group.
  std::int64_t first_ghost(std::int64_t group) const { return group * ghosts_per_group(); }
  std::int64_t first_of_next(std::int64_t group) const {
    return std::min(first_ghost(group + 1), num_ghosts_);
  }
  std::int64_t num_groups() const { return ceil_div(num_ghosts_, ghosts_per_group()); }
  std::int64_t ghosts_per_group() const {
    return run_mode_ == RunMode::kGhostByGhost
               ? std::max<std::int64_t>(
                     1, kGrainElements / std::max<std::int64_t>(1, ghost_elements_))
               : 1;
  }

 private:
  void cut_between_channels(std::int64_t channels_a_piece) {
    channel_cuts_ = ceil_div(layout_.n_channel, channels_a_piece);
    line_cuts_ = plane_cuts_ = 1;
  }

  // Planes are cut between channels, whose pieces need no merge; rows, which would be cut into
  // short runs, between lines. What is left of the wanted number goes the other way.
  void cut_by_size(bool rows, std::int64_t lines, std::int64_t wanted) {
    const std::int64_t most_lines =
        std::max<std::int64_t>(1, inner_ <= kShortRun ? lines / kMinLines : lines);
    const std::int64_t first_lines = rows ? std::min(wanted, most_lines) : 1;
    const std::int64_t min_run = rows ? kMinRowRun : kMinRun;
    const std::int64_t channels =
        std::max(ceil_div(layout_.n_channel, wanted / first_lines), ceil_div(min_run, inner_));
    channel_cuts_ = ceil_div(layout_.n_channel, channels);
    line_cuts_ =
        rows ? first_lines : std::clamp<std::int64_t>(wanted / channel_cuts_, 1, most_lines);
    // Few, large planes are cut as well.
    const std::int64_t uncut = wanted / (line_cuts_ * channel_cuts_);
    plane_cuts_ = channel_cuts_ == layout_.n_channel && inner_ >= kGrainElements
                      ? std::clamp<std::int64_t>(uncut, 1, inner_ / kGrainElements)
                      : 1;
  }

  std::int64_t line_length() const { return layout_.n_channel * inner_; }
  Range samples(std::int64_t ghost) const {
    // As split_range.
    const std::int64_t begin = ghost * samples_per_ghost_ + std::min(ghost, longer_ghosts_);
    return {begin, begin + samples_per_ghost_ + (ghost < longer_ghosts_ ? 1 : 0)};
  }

  Layout layout_;
  std::int64_t element_size_;
  std::int64_t num_ghosts_;
  Phases phases_;
  bool exceeds_cache_;  // the last-level one: by the four tensors of a training step
  std::int64_t lines_per_sample_;
  std::int64_t inner_;
  std::int64_t samples_per_ghost_;
  std::int64_t longer_ghosts_;  // by one sample
  std::int64_t ghost_elements_;
  std::int64_t line_cuts_;
  std::int64_t channel_cuts_;
  std::int64_t plane_cuts_;
  RunMode run_mode_;
};

}  // namespace bnext::cpu
