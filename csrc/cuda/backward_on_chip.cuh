// Backward in one launch: a team of blocks holds grad_output and input of a (ghost, tile) in shared
// memory from grad_reduce to grad_apply, so that each is read once.
#pragma once

#include "backward_kernels.cuh"
#include "teams.cuh"

namespace bnext::cuda {

template <typename scalar_t, bool kRows, int kVec, Fusion kFusion>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<kFusion, kRows, kVec>))
    backward_on_chip_kernel(const __grid_constant__ BackwardOnChipArgs<scalar_t> args) {
  using At = Position<kRows, kVec>;
  const Tiling& tiling = args.tiling;
  const Teams& teams = args.teams;
  const Member member(tiling);
  const BackwardElements<scalar_t>& elements = args.elements;
  const Counters& counters = args.workspace.counters;
  const int thread = At::thread();
  const Shared<scalar_t> shared{At::tile_channels()};
  double* scratch = shared.scratch();
  const auto constants = shared.constants();
  auto* seen = shared.template seen<PairOfSums>();  // dy * xhat in b
  int round = 0;
  for (int tile = member.team % teams.tile_teams; tile < tiling.tiles; tile += teams.tile_teams) {
    const int first_ghost = member.team / teams.tile_teams;
    for (int ghost = first_ghost; ghost < tiling.num_ghosts; ghost += teams.ghost_teams) {
      const Piece piece = tiling.piece(kRows, ghost, tile, member.split);
      const std::int64_t channel = piece.channel + thread;
      const std::int64_t at = std::int64_t(ghost) * tiling.n_channel + channel;
      if (thread < piece.n_channel) {
        constants.set(
            thread, constants_of<scalar_t>(
                        saved_stats(elements, at), elements.weight, elements.bias, channel));
      }
      __syncthreads();
      GradInputs<scalar_t, At::kLanes, int, kFusion> inputs(
          elements, piece, shared.cache(), teams.cache_elements);
      constants.get(At::channel(), inputs.constants);
      PairOfSums sums;
      {
        GradReduceVisitor<scalar_t, kRows, kVec, int, kFusion, Cache::kFill> visitor(inputs);
        walk<kRows, kVec, int>(tiling, piece, visitor);
        sums = visitor.sums.template over_block<kRows, kVec>(scratch);
      }
      if (tiling.splits() > 1) {
        const SumSets sets = args.workspace.pieces.at(0, 0, member.buffer(tiling, round));
        store_sums(sets, member.split, piece, thread, sums);
        // The last to arrive adds up for all.
        const SumSets merged = sets.at(0, 0, tiling.splits());
        if (member.arrive_last(tiling, teams, round, shared.flag())) {
          sums = add_sets<kRows, kVec>(sets, tiling.splits(), piece, scratch);
          store_sums(merged, 0, piece, thread, sums);
          member.release(teams, round);
        } else {
          member.wait(teams, round);
          sums = load_sums(merged, piece, thread);
        }
        ++round;
      }
      if (thread < piece.n_channel) {
        const auto stats = saved_stats(elements, at);
        constants.set(
            thread, finish_grad_ghost(
                        args.outputs, elements, stats, channel, at, tiling.ghost_count(ghost), sums,
                        /*writes=*/false));
        if (ghost == first_ghost) {
          seen[thread] = {};
        }
        seen[thread].a += sums.a;
        seen[thread].b += sums.b * static_cast<double>(stats.invstd);
      }
      __syncthreads();
      constants.get_coefficients(At::channel(), inputs.constants);
      GradApplyVisitor<scalar_t, kRows, kVec, int, kFusion, Cache::kRead> visitor(
          inputs, elements, piece);
      walk<kRows, kVec, int>(tiling, piece, visitor);
      __syncthreads();  // before the next ghost takes the shared memory
    }
    if (member.split != 0) {
      continue;
    }
    const Piece piece = tiling.piece(kRows, first_ghost, tile, 0);  // for its channels
    PairOfSums total;
    if (thread < piece.n_channel) {
      total = seen[thread];
    }
    if (teams.ghost_teams > 1) {
      const SumSets seats = args.workspace.ghosts.at(tile, piece.channel, 0);
      store_sums(seats, first_ghost, piece, thread, total);
      if (!arrive_last(counters.ghosts + tile, teams.ghost_teams, shared.flag())) {
        continue;
      }
      total = add_sets<kRows, kVec>(seats, teams.ghost_teams, piece, scratch);
    }
    if (thread < piece.n_channel) {
      store_parameter_grads(args.outputs, piece.channel + thread, total);
    }
  }
  member.leave(tiling, teams, counters, shared.flag());
}

}  // namespace bnext::cuda
