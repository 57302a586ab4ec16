// Backward in one launch: a team of blocks holds grad_output and input of a (ghost, tile) in shared
// memory from grad_reduce to grad_apply, so that each is read once.
#pragma once

#include "backward_kernels.cuh"
#include "teams.cuh"

namespace bnext::cuda {

template <typename scalar_t, bool kRows, int kVec, Fusion kFusion>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm)
    backward_on_chip_kernel(const __grid_constant__ BackwardOnChipArgs<scalar_t> args) {
  using At = Position<kRows, kVec>;
  using acc_t = AccType<scalar_t>;
  const Tiling& tiling = args.tiling;
  const Teams& teams = args.teams;
  const Member member(tiling);
  const BackwardElements<scalar_t>& elements = args.elements;
  const Counters& counters = args.workspace.counters;
  const int thread = At::thread();
  const int channels = At::tile_channels();
  double* scratch = shared_scratch();
  acc_t* constants = shared_constants<acc_t>(channels);
  scalar_t* cache = shared_cache<scalar_t>(channels, kBackwardConstants);
  auto* seen = shared_seen<PairOfSums>(channels);  // dy * xhat in b
  int round = 0;
  for (int tile = member.team % teams.tile_teams; tile < tiling.tiles; tile += teams.tile_teams) {
    const std::int64_t first_ghost = member.team / teams.tile_teams;
    for (std::int64_t ghost = first_ghost; ghost < tiling.num_ghosts; ghost += teams.ghost_teams) {
      const Piece piece = tiling.piece(kRows, ghost, tile, member.split);
      const std::int64_t channel = piece.channel + thread;
      const std::int64_t at = ghost * tiling.n_channel + channel;
      if (thread < piece.n_channel) {
        const auto folded = constants_of<scalar_t>(
            saved_stats(elements, at), elements.weight, elements.bias, channel);
        constants[thread] = folded.mean;
        constants[channels + thread] = folded.scale;
        constants[2 * channels + thread] = folded.shift;
      }
      __syncthreads();
      GradPiece<scalar_t, At::kLanes, int, kFusion> grad_piece(elements, piece);
      grad_piece.cache = cache;
      grad_piece.cache_elements = teams.cache_elements;
      BNEXT_UNROLL
      for (int k = 0; k < At::kLanes; ++k) {
        const int c = At::channel() + k;
        grad_piece.constants.set(
            k, {constants[c], constants[channels + c], constants[2 * channels + c]});
      }
      PairOfSums sums;
      {
        GradReduceVisitor<scalar_t, kRows, kVec, int, kFusion, Cache::kFill> visitor{grad_piece};
        walk<kRows, kVec, int>(tiling, piece, visitor);
        sums = sum_over_block<kRows, kVec>(visitor.sums, scratch);
      }
      if (tiling.splits() > 1) {
        const SumSets sets = args.workspace.pieces.at(0, 0, member.buffer(tiling, round));
        store_sums(sets, member.split, piece, thread, sums);
        member.meet(tiling, teams, round);
        sums = add_sets<kRows, kVec>(sets, tiling.splits(), piece, scratch);
      }
      if (thread < piece.n_channel) {
        const auto stats = saved_stats(elements, at);
        const auto folded = finish_grad_ghost(
            args.outputs, elements, stats, channel, at, tiling.ghost_count(ghost), sums,
            /*writes=*/false);
        constants[3 * channels + thread] = folded.coef_x;
        constants[4 * channels + thread] = folded.coef_0;
        if (ghost == first_ghost) {
          seen[thread] = {};
        }
        seen[thread].a += sums.a;
        seen[thread].b += sums.b * static_cast<double>(stats.invstd);
      }
      __syncthreads();
      BNEXT_UNROLL
      for (int k = 0; k < At::kLanes; ++k) {
        const int c = At::channel() + k;
        grad_piece.constants.coef_x[k] = constants[3 * channels + c];
        grad_piece.constants.coef_0[k] = constants[4 * channels + c];
      }
      GradApplyVisitor<scalar_t, kRows, kVec, int, kFusion, Cache::kRead> visitor(
          grad_piece, elements, piece);
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
      if (!arrive_last(counters.ghosts + tile, teams.ghost_teams, shared_flag())) {
        continue;
      }
      total = add_sets<kRows, kVec>(seats, teams.ghost_teams, piece, scratch);
    }
    if (thread < piece.n_channel) {
      store_parameter_grads(args.outputs, piece.channel + thread, total);
    }
  }
  member.leave(tiling, teams, counters, shared_flag());
}

}  // namespace bnext::cuda
