"""Mistakes to make in a copy of csrc, and what is to find each: see test_simt_mutants.py."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # found once
    new: str
    program: str
    cases: str
    found_by: str  # as kernel_checks.verdict, or several: "wrong"
    variant: str = "plain"


BARRIER = "__syncthreads();"
FENCE = "__threadfence();"
REDUCE, TEAMS = "cuda/block_reduce.cuh", "cuda/teams.cuh"
FORWARD, BACKWARD = "cuda/forward_kernels.cuh", "cuda/backward_kernels.cuh"
FORWARD_CHIP, BACKWARD_CHIP = "cuda/forward_on_chip.cuh", "cuda/backward_on_chip.cuh"
MOMENTS, GRADS, WALK = "cuda/moments.cuh", "cuda/grad_sums.cuh", "cuda/walk.cuh"


def without(name: str, file: str, around: str, part: str, *rest: str) -> Mutant:
    return Mutant(name, file, around, around.replace(part, ""), *rest)


MUTANTS = [
    # Barriers, fences and counters.
    without("sum_barrier", REDUCE, "  __syncthreads();\n  PairOfSums total;", BARRIER,
            "forward", "rows", "wrong"),
    without("arrival_barrier", REDUCE, "int* flag) {\n  __syncthreads();", BARRIER,
            "forward", "rows_ghosts", "race", "thread"),
    without("flag_barrier", REDUCE, "*flag = last ? 1 : 0;\n  }\n  __syncthreads();", BARRIER,
            "forward", "rows_splits rows_ghosts", "error"),
    without("arrival_release", REDUCE, "__threadfence();  // the block's", FENCE,
            "forward", "rows_ghosts", "race", "thread"),
    without("arrival_acquire", REDUCE, "__threadfence();  // ... and", FENCE,
            "forward", "rows_ghosts", "race", "thread"),
    without("no_reset", REDUCE, "atomicExch(counter, 0u);", "atomicExch(counter, 0u);",
            "forward", "rows_splits", "counters"),
    without("team_arrival_barrier", TEAMS, "int* flag) const {\n    __syncthreads();", BARRIER,
            "forward", "team_rows", "race", "thread"),
    without("team_arrival_release", TEAMS, "__threadfence();  // the block's", FENCE,
            "forward", "team_rows", "race", "thread"),
    without("team_arrival_acquire", TEAMS, "__threadfence();  // ... and", FENCE,
            "forward", "team_rows", "race", "thread"),
    without("team_release_barrier", TEAMS, "int round) const {\n    __syncthreads();", BARRIER,
            "forward", "team_rows", "race", "thread"),
    without("team_release_fence", TEAMS, "__threadfence();\n      atomicExch(releases", FENCE,
            "forward", "team_rows", "race", "thread"),
    without("team_wait_fence", TEAMS, "__threadfence();\n    }\n    __syncthreads();\n  }", FENCE,
            "forward", "team_rows", "race", "thread"),
    without("team_wait_barrier", TEAMS, "__threadfence();\n    }\n    __syncthreads();\n  }",
            BARRIER, "forward", "team_rows", "race", "thread"),
    without("team_no_reset", TEAMS, "atomicExch(releases(teams), 0u);",
            "atomicExch(releases(teams), 0u);", "backward", "team_planes", "counters"),
    Mutant("team_early_release", FORWARD_CHIP,
           "store_triples(merged, 0, piece, thread, welford);\n          "
           "member.release(teams, round);",
           "member.release(teams, round);\n          "
           "store_triples(merged, 0, piece, thread, welford);",
           "forward", "team_rows", "race", "thread"),
    without("constants_barrier_chip", FORWARD_CHIP, "__syncthreads();\n      ApplyVisitor",
            BARRIER, "forward", "chip_rows", "wrong"),
    without("constants_barrier_apply", FORWARD,
            "__syncthreads();\n  constants.get(At::channel(), visitor.constants);", BARRIER,
            "forward", "rows", "wrong"),
    without("grad_constants_barrier", BACKWARD_CHIP, "__syncthreads();\n      GradInputs", BARRIER,
            "backward", "chip_rows", "wrong"),
    without("coefficients_barrier", BACKWARD_CHIP, "__syncthreads();\n      constants.get_coeff",
            BARRIER, "backward", "chip_rows", "wrong"),
    without("all_splits_write", FORWARD_CHIP, "outputs.saved = {};", "outputs.saved = {};",
            "forward", "team_rows", "race", "thread"),
    Mutant("all_splits_update", FORWARD_CHIP, "!running.given() || member.split != 0",
           "!running.given()", "forward", "team_rows", "wrong"),
    Mutant("counted_too_early", MOMENTS, "arrive_last(counter, tiles, flag) &&",
           "blockIdx.x % tiles == 0 &&", "forward", "rows_ghosts", "wrong"),
    # Shuffles and memory.
    Mutant("shuffle_offset", REDUCE, "offset >= At::columns()", "offset > At::columns()",
           "forward", "rows", "wrong"),
    Mutant("shuffle_mask", REDUCE, "kFullWarp = 0xffffffffu", "kFullWarp = 0x0fffffffu",
           "forward", "rows", "error"),
    Mutant("sums_of_one_half", REDUCE, "(2 * w + 1) * channels", "2 * w * channels",
           "backward", "rows", "wrong"),
    Mutant("scratch_too_small", "cuda/launch_config.h", "(1 + 2 * (kThreads / kWarp))",
           "(2 * (kThreads / kWarp))", "forward", "rows", "address", "address"),
    Mutant("misaligned_vectors", WALK, "head = (kVec - phase) % kVec;", "head = 0;",
           "forward", "planes_49", "error"),
    Mutant("short_tail", WALK, "if (tx < tail)", "if (tx + 1 < tail)",
           "forward", "planes_49", "wrong"),
    Mutant("tail_beyond_the_end", WALK, "end = length - tail + tx;",
           "end = length - tail + tx + 1;", "backward", "planes_49", "error"),
    Mutant("cache_stride", WALK, "outer * tiling.cache_stride + phase",
           "outer * (tiling.cache_stride - kVec) + phase", "forward", "team_planes", "wrong"),
    Mutant("one_cache_for_all", BACKWARD, "tensor * cache_elements_",
           "0 * cache_elements_ * tensor", "backward", "chip_rows", "wrong"),
    Mutant("seat_of_another", BACKWARD_CHIP, "store_sums(seats, first_ghost,",
           "store_sums(seats, first_ghost + 1,", "backward", "chip_rows", "error"),
    Mutant("fold_beyond_the_end", "cuda/fold_kernels.cuh", "channel < sets.n_channel",
           "channel <= sets.n_channel", "fold", "", "error"),
    # Arithmetic and indices.
    Mutant("wrong_ghost", "cuda/tiling.h", "ghost < ghosts.longer", "ghost <= ghosts.longer",
           "forward", "planes_49", "error"),
    Mutant("count_of_a_ghost", FORWARD, "tiling.batch_count()", "tiling.ghost_count(0)",
           "forward", "rows_ghosts", "wrong"),
    Mutant("seen_forgets", FORWARD_CHIP, "), ghost == first_ghost", "), true",
           "forward", "team_rows", "wrong"),
    Mutant("seen_pivot", FORWARD_CHIP, "finite_pivot(ghost.mean)", "ghost.mean",
           "forward", "team_infinite", "wrong"),
    Mutant("merge_pivot", MOMENTS, "finite_pivot(__ldcg(sets.mean + channel))",
           "__ldcg(sets.mean + channel)", "forward", "infinite", "wrong"),
    Mutant("biased_running_var", "core/running_stats.h", "welford.unbiased_variance(), factor",
           "welford.biased_variance(), factor", "forward", "rows", "wrong"),
    Mutant("no_mean_lo", "core/normalize.h", "Math<acc_t>::where_nan(rest, acc_t(0), rest)",
           "acc_t(0) * rest", "forward", "rows", "wrong"),
    without("no_mean_lo_in_sums", GRADS, "exact.subtract_mean_lo(stats.mean_lo);",
            "exact.subtract_mean_lo(stats.mean_lo);", "backward", "rows", "wrong"),
    without("no_invstd", BACKWARD, "sums.b *= static_cast<double>(stats.invstd);",
            "sums.b *= static_cast<double>(stats.invstd);", "backward", "rows", "wrong"),
    Mutant("no_seats_of_others", BACKWARD_CHIP,
           "total = add_sets<kRows, kVec>(seats, teams.ghost_teams, piece, scratch);", "",
           "backward", "chip_rows", "wrong"),
]  # fmt: skip

# Changes that must not be found fault with, under any variant.
HARMLESS = [
    Mutant("renamed", REDUCE, "const bool last = atomicAdd(counter, 1u) == expected - 1;\n"
           "    if (last) {",
           "const bool is_last = atomicAdd(counter, 1u) == expected - 1;\n"
           "    const bool last = is_last;\n    if (is_last) {", "forward", "", "clean"),
    Mutant("one_more_barrier", FORWARD_CHIP, "__syncthreads();  // before the next",
           "__syncthreads();\n      __syncthreads();  // before the next", "forward", "", "clean"),
]  # fmt: skip

# What the kernels could do without: there is no race either.
REDUNDANT = [
    # The last to arrive merges, when all the others have read what the round before has left.
    Mutant("one_buffer", TEAMS, "+ round % 2)", "+ 0 * round)", "backward", "", "clean"),
    # The barriers of an arrival come before.
    without("merge_barrier", GRADS, "__syncthreads();  // the scratch may", BARRIER,
            "backward", "", "clean"),
    # A thread reads from the cache what it has written; the rest is between other barriers.
    without("next_ghost_barrier", FORWARD_CHIP, "__syncthreads();  // before the next", BARRIER,
            "forward", "", "clean"),
    without("next_ghost_barrier_grad", BACKWARD_CHIP, "__syncthreads();  // before the next",
            BARRIER, "backward", "", "clean"),
]  # fmt: skip
