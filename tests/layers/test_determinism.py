"""Bitwise the same results from run to run and for any number of threads; every ISA is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assertions import assert_same
from cases import Case
from layers import step
from op_samples import ops

import bnext

# Large enough to be cut into pieces for threads (a piece is about 32k elements), and one that is
# not: many rows, many channels, large planes, many small planes, one long plane, ragged ends.
CASES = (
    Case((32, 50)),
    Case((20_000, 13)),
    Case((300, 1000), "transposed"),
    Case((8, 16, 56, 56)),
    Case((8, 16, 56, 56), "channels_last"),
    Case((64, 257, 5, 5)),
    Case((64, 257, 5, 5), "channels_last"),
    Case((1, 3, 300, 301)),
    Case((3, 7, 10, 31, 33), "channels_last"),
    Case((16, 16, 40, 40), dtype=torch.bfloat16),
    Case((16, 16, 40, 40), "channels_last", torch.float16),
    Case((2000, 64), dtype=torch.float64, param_dtype=torch.float64),
)


def ghost_counts(case: Case) -> tuple[int, ...]:
    return (1,) if case.shape[0] < 8 else (1, 4)


@pytest.mark.parametrize(
    ("training", "activation"), [(True, "relu"), (True, "silu"), (False, None)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bitwise_the_same_for_any_number_of_threads_and_run(
    case: Case, training: bool, activation: str | None, set_threads, device: str
) -> None:
    for ghosts in ghost_counts(case) if training else (1,):
        set_threads(1)
        first = step(case, training, activation, ghosts, device)
        # The CUDA kernels know no threads of the host: two runs will do.
        for threads in (1, 2, 3, 8) if ops.on_cpu_kernels else (1,):
            set_threads(threads)
            again = step(case, training, activation, ghosts, device)
            for name, value in again.items():
                assert_same(value, first[name], f"{name}, {threads} threads, {ghosts} ghosts")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_called_from_several_python_threads(training: bool) -> None:
    """Two callers at once do not share scratch memory."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [Case((20_000, 13), seed=s) for s in range(4)]
    alone = [step(c, training, "relu", 4) for c in cases]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda c: step(c, training, "relu", 4), cases * 4))
    for i, results in enumerate(together):
        for name, value in results.items():
            assert_same(value, alone[i % len(cases)][name], name)


def isa_missing(isa: str) -> str | None:
    """Why this processor (or this build) cannot run the kernels of an ISA, or None."""
    info = bnext.config.build_info()
    if isa not in [name.lower() for name in info["isas"]]:
        return f"{isa} is not compiled in: {info['isas']}"
    if isa == "default":
        return None
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    # The flags that torch asks for before it takes ATEN_CPU_CAPABILITY at its word.
    needed = {"avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512vl", "avx512bw", "avx512dq")}
    lacking = [flag for flag in needed[isa] if flag not in flags]
    return f"this processor has no {', '.join(lacking)}" if lacking else None


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_isa(isa: str) -> None:
    """The cases of isa_check.py in a process that is held to one ISA."""
    if missing := isa_missing(isa):
        pytest.skip(missing)
    script = Path(__file__).parents[1] / "isa_check.py"
    result = subprocess.run(
        [sys.executable, str(script), isa],
        env={**os.environ, "ATEN_CPU_CAPABILITY": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"checked with {isa}" in result.stdout
