// What the blocks of one launch need between them, laid out in two buffers: doubles of any content
// and counters that are zero.
#pragma once

#include "kernel_args.h"
#include "launch_config.h"

namespace bnext::cuda {

struct WorkspaceSize {
  std::int64_t piece_sets;
  std::int64_t piece_stride;
  std::int64_t piece_counts;  // counts a set
  std::int64_t ghost_sets;
  std::int64_t counters;
  std::int64_t doubles;
};

// `merges_ghosts`: whether anything is asked of the whole batch (running statistics, parameters'
// gradients). For lone blocks and reductions without splits most of it is empty.
inline WorkspaceSize workspace_size(const Launch& launch, bool on_chip, bool merges_ghosts) {
  const Tiling& t = launch.tiling;
  WorkspaceSize size{};
  const std::int64_t pairs = on_chip ? launch.num_teams() : t.num_ghosts * t.tiles;
  size.piece_stride = on_chip ? t.tile_channels : t.n_channel;
  size.piece_counts = on_chip ? 1 : t.tiles;
  if (t.splits() > 1) {
    size.piece_sets =
        on_chip ? pairs * 2 * (t.splits() + std::int64_t(1)) : t.num_ghosts * t.splits();
    size.counters += pairs + (on_chip ? 2 * pairs : 0);
  }
  const std::int64_t ghosts = on_chip ? launch.ghost_teams : t.num_ghosts;
  if (merges_ghosts) {
    size.ghost_sets = ghosts > 1 ? ghosts : 0;
    size.counters += t.tiles + 1;
  }
  size.doubles = size.piece_sets * (size.piece_counts + 2 * size.piece_stride) +
                 size.ghost_sets * (t.tiles + 2 * t.n_channel);
  return size;
}

struct WorkspacePointers {
  double* doubles;
  unsigned* counters;

  double* take(std::int64_t n) { return (doubles += n) - n; }
  unsigned* take_counters(std::int64_t n) { return (counters += n) - n; }
};

inline void set_sets(
    TripleSets& sets,
    WorkspacePointers& memory,
    std::int64_t n,
    std::int64_t stride,
    std::int64_t counts) {
  sets.count = memory.take(n * counts);
  sets.mean = memory.take(n * stride);
  sets.m2 = memory.take(n * stride);
  sets.stride = stride;
  sets.count_stride = counts;
}

inline void set_sets(
    SumSets& sets, WorkspacePointers& memory, std::int64_t n, std::int64_t stride, std::int64_t) {
  sets.dy = memory.take(n * stride);
  sets.dy_xmu = memory.take(n * stride);
  sets.stride = stride;
}

// Lays the workspace out, and the barriers of an on-chip launch's teams.
template <typename Sets>
Workspace<Sets> make_workspace(
    const Launch& launch,
    const WorkspaceSize& size,
    bool on_chip,
    WorkspacePointers memory,
    unsigned** barriers = nullptr) {
  const Tiling& t = launch.tiling;
  Workspace<Sets> workspace{};
  set_sets(workspace.pieces, memory, size.piece_sets, size.piece_stride, size.piece_counts);
  set_sets(workspace.ghosts, memory, size.ghost_sets, t.n_channel, t.tiles);
  if (t.splits() > 1) {
    workspace.counters.pieces =
        memory.take_counters(on_chip ? launch.num_teams() : t.num_ghosts * t.tiles);
    if (on_chip) {
      *barriers = memory.take_counters(2 * launch.num_teams());
    }
  }
  workspace.counters.ghosts = memory.take_counters(t.tiles);
  workspace.counters.tiles = memory.take_counters(1);
  return workspace;
}

}  // namespace bnext::cuda
