"""The grid for pytest-benchmark: ``pytest benchmarks --benchmark-only``, narrowed by ``-k``
(there are 1632 cases, and torch.compile takes seconds for each of its own).

For its tables, histograms and saved runs. Variants run here one after the other: for ratios that a
noisy machine leaves right, and for kernels with outputs reused, ``python -m benchmarks.suite``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.grid import RUNS, Cell, cells


def _name(cell: Cell) -> str:
    shape = "x".join(map(str, cell.shape))
    return f"{shape}-{cell.layout}-{cell.dtype}-{cell.threads}threads"


@pytest.fixture(autouse=True)
def _threads_are_left_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", peers.WHOLE)
@pytest.mark.parametrize("mode", RUNS["whole"])
@pytest.mark.parametrize("cell", cells(), ids=_name)
def test_speed(benchmark: Any, cell: Cell, mode: str, variant: str) -> None:
    torch.set_num_threads(cell.threads)
    loop = peers.WHOLE[variant](peers.inputs_for(cell, mode))
    if loop is None:
        pytest.skip(f"{variant} does not apply")
    benchmark.group = f"{cell} {mode}"
    benchmark.pedantic(loop, args=(1,), rounds=10, warmup_rounds=2)
