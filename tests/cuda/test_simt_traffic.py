"""Bytes that the CUDA kernels load and store, counted by the executor: the plan, as a test.

In units of the input's size (PyTorch's eager kernels move 5 forward and 8 backward):
  two passes   forward 2 reads + 1 write     backward 4 + 1
  on chip      forward 1 + 1                 backward 2 + 1
and one read more with a residual (and one write in backward), twice in two-pass backward.
"""

from __future__ import annotations

from typing import NamedTuple

import executor
import pytest
import simt_build
import torch
from cases import Case
from executor import GPUS, Gpu

pytestmark = pytest.mark.skipif(
    simt_build.cuda_include() is None, reason="no cuda_fp16.h: install the CUDA headers' wheel"
)

# What the merges of statistics may add.
MERGES = 0.05
# Next to no shared memory: nothing fits on chip.
TWO_PASSES = Gpu(4, 40 << 10, 1 << 10)


class Counters(NamedTuple):
    launches: int
    loaded: int
    stored: int
    wide: int
    narrow: int


def traffic(gpu: Gpu, case: Case, residual: bool = False, ghost: int | None = None, *,
            training: bool = True, backward: bool = True) -> list[Counters]:  # fmt: skip
    """Counters of one forward and one backward pass with relu."""
    x, added = case.input(), case.residual() if residual else None
    weight, bias, *running = case.parameters().values()
    counted = []
    with executor.running_on(gpu) as ops:
        ops.reset_counters()
        output, *saved = ops.batch_norm(
            x, weight, bias, *running, torch.tensor(0), added, training, 0.1, 1e-5, "relu", ghost
        )
        counted.append(Counters(*ops.counters()))
        if backward:
            ops.reset_counters()
            ops.batch_norm_backward(
                case.grad_output(), x, weight, bias, output if residual else None, None, *saved,
                training, "relu", [True, residual],
            )  # fmt: skip
            counted.append(Counters(*ops.counters()))
    return counted


def assert_moves(case: Case, counters: Counters, reads: int, writes: int, launches: int) -> None:
    size = case.input().numel() * case.dtype.itemsize
    assert counters.launches == launches
    assert reads <= counters.loaded / size <= reads + MERGES * max(1, reads)
    assert writes <= counters.stored / size <= writes + MERGES


LARGE = [
    Case((32, 64, 28, 28)),
    Case((64, 64, 28, 28), "channels_last"),
    Case((64, 256, 7, 7)),  # lines that begin at any alignment
    Case((256, 256, 7, 7), "channels_last"),
    Case((8192, 256)),
    Case((1, 3, 300, 301)),
    Case((6, 1, 20000)),
    Case((131072, 13)),  # single elements
]
HALVES = [
    Case((32, 64, 28, 28), dtype=torch.bfloat16),
    Case((128, 64, 28, 28), "channels_last", torch.float16),
    Case((64, 256, 7, 7), dtype=torch.float16),
    Case((32768, 256), dtype=torch.bfloat16),
]


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("case", [*LARGE, *HALVES], ids=str)
def test_two_passes(case: Case, residual: bool) -> None:
    forward, backward = traffic(TWO_PASSES, case, residual)
    assert_moves(case, forward, 2 + residual, 1, launches=2)
    assert_moves(case, backward, 4 + 2 * residual, 1 + residual, launches=2)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("case", [*LARGE, *HALVES], ids=str)
def test_on_chip(case: Case, residual: bool) -> None:
    forward, backward = traffic(GPUS["h100"], case, residual)
    assert_moves(case, forward, 1 + residual, 1, launches=1)
    assert_moves(case, backward, 2 + residual, 1 + residual, launches=1)


@pytest.mark.parametrize(
    ("case", "ghost"), [(Case((8192, 256)), 256), (Case((64, 64, 28, 28)), 16),
                        (Case((64, 64, 28, 28), "channels_last"), 8)], ids=str)  # fmt: skip
@pytest.mark.parametrize("gpu", ["h100", "a100_quarter"])
def test_ghosts_on_chip(case: Case, ghost: int, gpu: str) -> None:
    """Each ghost is read once and written once."""
    forward, backward = traffic(GPUS[gpu], case, ghost=ghost)
    assert_moves(case, forward, 1, 1, launches=1)
    assert_moves(case, backward, 2, 1, launches=1)


@pytest.mark.parametrize("case", [LARGE[0], LARGE[1], Case((32768, 256))], ids=str)
def test_eval_is_one_launch(case: Case) -> None:
    (forward,) = traffic(GPUS["h100"], case, training=False, backward=False)
    assert_moves(case, forward, 1, 1, launches=1)


@pytest.mark.parametrize("case", [c for c in [*LARGE, *HALVES] if c.shape[1] != 13], ids=str)
def test_16_bytes_at_a_time(case: Case) -> None:
    """All but the ends of misaligned lines, and what the size of C is."""
    size = case.input().numel() * case.dtype.itemsize
    channels = 64 * case.channels * sum(case.shape[0] > 1 for _ in range(4))
    ends = 2 * 16 * case.shape[0] * case.channels if case.shape[-1] in (7, 301) else 0
    for gpu, passes in ((TWO_PASSES, 3), (GPUS["h100"], 2)):
        (forward,) = traffic(gpu, case, backward=False)
        assert forward.wide * 16 >= passes * (size - ends)
        assert forward.narrow * case.dtype.itemsize <= passes * ends + MERGES * size + channels


SMALL = ((2, 1), (33, 13), (40, 6, 3), (12, 5, 9, 9), (2000, 40))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("ghost", [None, 4])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_at_most_two_launches(gpu: str, ghost: int | None, shape: tuple[int, ...]) -> None:
    ghost = ghost if shape[0] > 4 else None
    for counters in traffic(GPUS[gpu], Case(shape), ghost=ghost):
        assert 1 <= counters.launches <= 2
