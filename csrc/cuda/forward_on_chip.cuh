// Forward in one launch: a team of blocks holds a (ghost, tile) in shared memory from reduce to
// apply, so that the input is read once.
#pragma once

#include "forward_kernels.cuh"
#include "teams.cuh"

namespace bnext::cuda {

// What a team has seen of a channel, ghost after ghost, in shared memory: registers are scarce.
struct SeenMoments {
  double pivot;
  double count;
  ShiftedSums<double> sums;

  __device__ __forceinline__ void add(const Welford<double>& ghost, bool first) {
    if (first) {
      *this = {finite_pivot(ghost.mean), 0, {}};
    }
    sums.add_shifted(ghost.mean - pivot, ghost.count, 0.0, ghost.m2);
    count += ghost.count;
  }
};

template <typename scalar_t, bool kRows, int kVec, Fusion kFusion>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<kFusion, kRows, kVec>))
    forward_on_chip_kernel(const __grid_constant__ ForwardOnChipArgs<scalar_t> args) {
  using At = Position<kRows, kVec>;
  const Tiling& tiling = args.tiling;
  const Teams& teams = args.teams;
  const Member member(tiling);
  const ForwardElements<scalar_t>& elements = args.elements;
  const Counters& counters = args.workspace.counters;
  const int thread = At::thread();
  const Shared<scalar_t> shared{At::tile_channels()};
  double* scratch = shared.scratch();
  const auto constants = shared.constants();
  scalar_t* cache = shared.cache();
  auto* seen = shared.template seen<SeenMoments>();
  int round = 0;
  for (int tile = member.team % teams.tile_teams; tile < tiling.tiles; tile += teams.tile_teams) {
    const int first_ghost = member.team / teams.tile_teams;
    const double batch_base = base_of<kRows>(elements.input, tiling, 0, tile, thread);
    for (int ghost = first_ghost; ghost < tiling.num_ghosts; ghost += teams.ghost_teams) {
      const Piece piece = tiling.piece(kRows, ghost, tile, member.split);
      const double base = base_of<kRows>(elements.input, tiling, ghost, tile, thread);
      Welford<double> welford;
      {
        ReduceVisitor<scalar_t, kRows, kVec, int, true> visitor(
            elements.input + piece.offset, cache);
        walk<kRows, kVec, int>(tiling, piece, visitor);
        welford = visitor.moments.template over_block<kRows, kVec>(piece.count, base, scratch);
      }
      if (tiling.splits() > 1) {
        const TripleSets sets = args.workspace.pieces.at(0, 0, member.buffer(tiling, round));
        store_triples(sets, member.split, piece, thread, welford);
        // The last to arrive merges for all.
        const TripleSets merged = sets.at(0, 0, tiling.splits());
        if (member.arrive_last(tiling, teams, round, shared.flag())) {
          welford = merge_triples<kRows, kVec>(
              sets, tiling.splits(), piece, tiling.ghost_count(ghost),
              1 / tiling.ghost_count(ghost), scratch);
          store_triples(merged, 0, piece, thread, welford);
          member.release(teams, round);
        } else {
          member.wait(teams, round);
          welford = load_triple(merged, piece, thread, tiling.ghost_count(ghost));
        }
        ++round;
      }
      if (thread < piece.n_channel) {
        const std::int64_t channel = piece.channel + thread;
        StatsOutputs<scalar_t> outputs = args.outputs;
        if (member.split != 0) {
          outputs.saved = {};
        }
        const auto stats =
            finish_ghost(outputs, std::int64_t(ghost) * tiling.n_channel + channel, welford, base);
        constants.set(
            thread, constants_of<scalar_t>(stats, elements.weight, elements.bias, channel));
        seen[thread].add(rebase<scalar_t>(welford, base - batch_base), ghost == first_ghost);
      }
      __syncthreads();
      ApplyVisitor<scalar_t, kRows, kVec, int, kFusion, true> visitor(elements, piece, cache);
      constants.get(At::channel(), visitor.constants);
      walk<kRows, kVec, int>(tiling, piece, visitor);
      __syncthreads();  // before the next ghost takes the shared memory
    }
    const RunningStats& running = args.outputs.running;
    if (!running.given() || member.split != 0) {
      continue;
    }
    const Piece piece = tiling.piece(kRows, first_ghost, tile, 0);  // for its channels
    Welford<double> welford;
    if (thread < piece.n_channel) {
      welford =
          seen[thread].sums.moments(seen[thread].pivot, seen[thread].count, 1 / seen[thread].count);
    }
    if (teams.ghost_teams > 1) {
      const TripleSets seats = args.workspace.ghosts.at(tile, piece.channel, 0);
      store_triples(seats, first_ghost, piece, thread, welford);
      if (!arrive_last(counters.ghosts + tile, teams.ghost_teams, shared.flag())) {
        continue;
      }
      welford = merge_triples<kRows, kVec>(
          seats, teams.ghost_teams, piece, tiling.batch_count(), tiling.one_over_batch_count,
          scratch);
    }
    if (thread < piece.n_channel) {
      update_running<scalar_t>(running, piece.channel + thread, welford, batch_base);
    }
    count_batch(running, counters.tiles, tiling.tiles, shared.flag());
  }
  member.leave(tiling, teams, counters, shared.flag());
}

}  // namespace bnext::cuda
