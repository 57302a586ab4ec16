// How the steps of one call are run over the pieces of its schedule.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <vector>

#include "schedule.h"
#include "team.h"

namespace bnext::cpu {

// What run_steps calls. Scratch: what the steps of one ghost hand to each other. Groups are sets of
// consecutive ghosts that one thread folds in order.
template <typename T>
concept StepsOfCall = requires(
    T steps, typename T::Scratch scratch, const Piece& piece, Range channels, std::int64_t ghost) {
  { steps.make_scratch() } -> std::same_as<typename T::Scratch>;
  steps.prepare(ghost, scratch);  // per-channel constants known before the reduction
  steps.reduce(piece, scratch);   // partial results of the piece
  steps.fold(ghost, /*group=*/ghost, channels, scratch);  // merges them; constants for apply
  steps.apply(piece, scratch);
};

// All steps of a ghost by one thread, before those of the next.
template <StepsOfCall Steps>
void run_ghost_by_ghost(const Schedule& schedule, Steps& steps) {
  const Phases phases = schedule.phases();
  const std::int64_t num_pieces = schedule.num_pieces();
  const std::int64_t workers = num_workers(schedule.num_groups());
  StepItems groups(schedule.num_groups(), workers);
  run_workers(workers, [&](std::int64_t worker) {
    auto scratch = steps.make_scratch();
    groups.run(worker, [&](std::int64_t group) {
      const std::int64_t last = schedule.first_of_next(group);
      for (std::int64_t ghost = schedule.first_ghost(group); ghost < last; ++ghost) {
        steps.prepare(ghost, scratch);
        if (phases.reduce) {
          for (std::int64_t i = 0; i < num_pieces; ++i) {
            steps.reduce(schedule.piece(ghost, i), scratch);
          }
          steps.fold(ghost, group, Range{0, schedule.n_channel()}, scratch);
        }
        for (std::int64_t i = num_pieces; phases.apply && i-- > 0;) {
          Piece piece = schedule.piece(ghost, i);
          piece.ahead = phases.reduce ? schedule.distance_to_next(ghost) : 0;
          steps.apply(piece, scratch);
        }
      }
    });
  });
}

// Of every ghost, prepared: for steps whose ghosts are under way at the same time.
template <StepsOfCall Steps>
auto scratch_of_ghosts(std::int64_t num_ghosts, const Steps& steps) {
  std::vector<decltype(steps.make_scratch())> scratch;
  scratch.reserve(num_ghosts);
  for (std::int64_t ghost = 0; ghost < num_ghosts; ++ghost) {
    scratch.push_back(steps.make_scratch());
    steps.prepare(ghost, scratch[ghost]);
  }
  return scratch;
}

// All steps of a piece, whose channels are in no other, by one thread: memory is read once, and the
// next piece's while this one is written.
template <StepsOfCall Steps>
void run_piece_by_piece(const Schedule& schedule, Steps& steps) {
  const Phases phases = schedule.phases();
  const std::int64_t num_pieces = schedule.num_pieces();
  const std::int64_t pieces = schedule.num_ghosts() * num_pieces;
  auto scratch = scratch_of_ghosts(schedule.num_ghosts(), steps);
  const std::int64_t workers = num_workers(pieces);
  StepItems items(pieces, workers);
  run_workers(workers, [&](std::int64_t worker) {
    items.run(worker, [&](std::int64_t i) {
      const std::int64_t ghost = i / num_pieces;
      Piece piece = schedule.piece(ghost, i % num_pieces);
      if (phases.reduce) {
        steps.reduce(piece, scratch[ghost]);
        const Range channels{piece.channel, piece.channel + piece.slab.channels()};
        steps.fold(ghost, ghost, channels, scratch[ghost]);
        piece.ahead = channels.end < schedule.n_channel() ? piece.slab.length : 0;
      }
      if (phases.apply) {
        steps.apply(piece, scratch[ghost]);
      }
    });
  });
}

// Each step of all ghosts before the next step.
template <StepsOfCall Steps>
void run_step_by_step(const Schedule& schedule, Steps& steps) {
  const Phases phases = schedule.phases();
  const std::int64_t num_pieces = schedule.num_pieces();
  const std::int64_t num_ghosts = schedule.num_ghosts();
  const std::int64_t pieces = num_ghosts * num_pieces;
  const std::int64_t fold_cuts = std::clamp<std::int64_t>(
      schedule.n_channel() * schedule.num_partials() / (kGrainElements / 8), 1,
      schedule.n_channel());

  auto scratch = scratch_of_ghosts(num_ghosts, steps);
  const std::int64_t workers = num_workers(pieces);
  StepItems reduce(pieces, workers);
  StepItems fold(num_ghosts * fold_cuts, workers);
  // Backwards: what a thread reduced last is what its cache still holds.
  StepItems apply(pieces, workers, Walk::kBackward);
  run_workers(workers, [&](std::int64_t worker) {
    if (phases.reduce) {
      reduce.run(worker, [&](std::int64_t i) {
        const std::int64_t ghost = i / num_pieces;
        steps.reduce(schedule.piece(ghost, i % num_pieces), scratch[ghost]);
      });
      fold.run(worker, [&](std::int64_t i) {
        const std::int64_t ghost = i / fold_cuts;
        const Range channels = split_range(schedule.n_channel(), fold_cuts, i % fold_cuts);
        steps.fold(ghost, ghost, channels, scratch[ghost]);
      });
    }
    if (phases.apply) {
      apply.run(worker, [&](std::int64_t i) {
        const std::int64_t ghost = i / num_pieces;
        steps.apply(schedule.piece(ghost, i % num_pieces), scratch[ghost]);
      });
    }
  });
}

template <StepsOfCall Steps>
void run_steps(const Schedule& schedule, Steps& steps) {
  switch (schedule.run_mode()) {
    case RunMode::kGhostByGhost:
      return run_ghost_by_ghost(schedule, steps);
    case RunMode::kPieceByPiece:
      return run_piece_by_piece(schedule, steps);
    case RunMode::kStepByStep:
      return run_step_by_step(schedule, steps);
  }
}

}  // namespace bnext::cpu
