// The problems that forward and backward are both checked on. What one of them has no use for it
// leaves alone.
#pragma once

#include "checks.h"

namespace kernel_checks {

constexpr auto kRows = Order::kRows;
constexpr auto kPlanes = Order::kPlanes;

// One for each way through the kernels.
inline std::vector<Problem> problems() {
  using enum Activation;
  return {
      // Two passes. Tiles of 16 channels, the last with 4.
      {.name = "rows", .order = kRows, .batch = 130, .channels = 20, .spatial = 2, .ghosts = 1},
      {.name = "rows_splits",
       .order = kRows,
       .batch = 1100,
       .channels = 20,
       .spatial = 1,
       .ghosts = 2,
       .splits = 2,
       .activation = kSilu,
       .residual = true,
       .cumulative = true},
      {.name = "rows_ghosts",
       .order = kRows,
       .batch = 200,
       .channels = 36,
       .spatial = 1,
       .ghosts = 3,
       .activation = kRelu,
       .cumulative = true},
      {.name = "planes",
       .order = kPlanes,
       .batch = 8,
       .channels = 3,
       .spatial = 64,
       .ghosts = 1,
       .activation = kLeakyRelu},
      {.name = "planes_49",
       .order = kPlanes,
       .batch = 7,
       .channels = 3,
       .spatial = 49,
       .ghosts = 2,
       .splits = 3,
       .activation = kSilu,
       .residual = true,
       .offset = 1},
      {.name = "planes_cut",
       .order = kPlanes,
       .batch = 4,
       .channels = 2,
       .spatial = 1101,
       .ghosts = 2,
       .splits = 4,
       .activation = kRelu,
       .residual = true,
       .cumulative = true,
       .from_output = true},
      {.name = "frozen",
       .order = kRows,
       .batch = 600,
       .channels = 20,
       .spatial = 1,
       .ghosts = 1,
       .splits = 2,
       .activation = kRelu,
       .constant = true},
      // On chip: lone blocks and teams, more ghosts and tiles than teams.
      {.name = "chip_rows",
       .order = kRows,
       .batch = 200,
       .channels = 20,
       .spatial = 1,
       .ghosts = 3,
       .tile_teams = 2,
       .ghost_teams = 2,
       .cumulative = true},
      {.name = "chip_planes",
       .order = kPlanes,
       .batch = 8,
       .channels = 3,
       .spatial = 64,
       .ghosts = 2,
       .tile_teams = 2,
       .activation = kSilu,
       .residual = true},
      {.name = "team_rows",
       .order = kRows,
       .batch = 1040,
       .channels = 20,
       .spatial = 2,
       .ghosts = 4,
       .splits = 2,
       .tile_teams = 1,
       .activation = kLeakyRelu,
       .residual = true},
      {.name = "team_planes",
       .order = kPlanes,
       .batch = 16,
       .channels = 3,
       .spatial = 49,
       .ghosts = 5,
       .splits = 3,
       .tile_teams = 2,
       .ghost_teams = 2,
       .offset = 3,
       .cumulative = true},
  };
}

// Every combination of what selects an instance of a kernel, cut by hand, and the cut that
// launch_config.h plans.
inline std::vector<Problem> combinations() {
  std::vector<Problem> all;
  for (Problem p :
       {Problem{
            .name = "all_rows",
            .order = kRows,
            .batch = 1100,
            .channels = 24,
            .spatial = 1,
            .ghosts = 2},
        Problem{
            .name = "all_planes",
            .order = kPlanes,
            .batch = 12,
            .channels = 5,
            .spatial = 49,
            .ghosts = 2}}) {
    for (const int teams : {0, 2}) {
      p.tile_teams = teams;
      for (const bool apart : {false, true}) {
        for (const bool residual : {false, true}) {
          for (const Activation activation :
               {Activation::kNone, Activation::kRelu, Activation::kSilu}) {
            p.apart = apart;
            p.splits = apart && p.order == kPlanes ? 1 : 2;  // too few lines, one below another
            p.residual = residual;
            p.activation = activation;
            p.from_output = residual && activation == Activation::kRelu;
            p.affine = activation != Activation::kNone;
            all.push_back(p);
          }
        }
      }
      p.splits = 0;
      p.apart = false;
      all.push_back(p);
    }
  }
  return all;
}

// Cases of check<scalar_t>(problem) for all of these; single elements as float once only.
template <typename Check>
std::vector<Case> cases_of(Check float_check, Check half_check, std::vector<Problem> more) {
  std::vector<Case> cases;
  for (const auto& list : {problems(), more}) {
    for (const Problem& p : list) {
      cases.push_back({p.name, float_check, p});
    }
  }
#ifndef BNEXT_FEW_KERNELS
  for (const Problem& p : combinations()) {
    const std::string name = p.name + std::to_string(cases.size());
    cases.push_back({name + "_half", half_check, p});
    if (!p.apart || p.activation == Activation::kRelu) {
      cases.push_back({name, float_check, p});
    }
  }
#endif
  return cases;
}

}  // namespace kernel_checks
