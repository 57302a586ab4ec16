"""``python -m benchmarks.worker``: the child that measures. A plan comes in, JSON lines go out.

It is a process of its own for the sake of malloc's settings, which are read once, at the start.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.environment import CALM, KEEP_MEMORY
from benchmarks.grid import RUNS, Cell
from benchmarks.results import Measurement, from_json, summarize, to_json
from bnext.measure.timing import Clock, interleave

ROOT = Path(__file__).parents[1]


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(
    cell: Cell,
    run: str,
    mode: str,
    seconds: float,
    compiled: bool = False,
    variants: Sequence[str] | None = None,
) -> Measurement:
    """In this process, as its malloc is set. ``variants``: these alone, ``copy`` among them."""
    torch.set_num_threads(cell.threads)
    loops = peers.loops(cell, run, mode, compiled, variants)
    with torch.set_grad_enabled(run == "whole"):
        for loop in loops.values():
            loop(1)
        calls = 0

        def counted(loop: Any) -> Any:
            def run_loop(times: int) -> None:
                nonlocal calls
                calls += times
                loop(times)

            return run_loop

        before = _faults()
        counting = {name: counted(loop) for name, loop in loops.items()}
        rounds = interleave(counting, seconds, Clock())
    extra: dict[str, Any] = {"faults": round((_faults() - before) / calls, 2)}
    if mode == "forward_backward":
        kept = {name: peers.kept_bytes(cell, name) for name in peers.OURS}
        extra["kept_bytes"] = {name: n for name, n in kept.items() if n is not None}
    return summarize(cell, run, mode, rounds, **extra)


def spawn(
    run: str,
    cells: Sequence[Cell],
    seconds: float,
    compiled: str,
    prefix: Sequence[str] = (),
    variants: Sequence[str] | None = None,
) -> Iterator[Measurement]:
    """The measurements of a child process, as they come.

    ``seconds`` is for all of them together; ``prefix``: a command that runs the child.
    ``compiled``: ``none`` of them with torch.compile, ``some`` (float32 training steps on all
    cores) or ``all``.
    """
    environment = {**CALM, **os.environ}
    if run == "kernel":
        environment |= KEEP_MEMORY
    plan = {"run": run, "seconds": seconds, "compiled": compiled, "variants": variants,
            "cells": [vars(cell) for cell in cells]}  # fmt: skip
    child = subprocess.Popen(
        [*prefix, sys.executable, "-m", "benchmarks.worker"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin and child.stdout
    child.stdin.write(json.dumps(plan))
    child.stdin.close()
    with child:
        for line in child.stdout:
            yield from_json(json.loads(line))
    if child.returncode != 0:
        raise RuntimeError(f"the {run} measurements ended with status {child.returncode}")


def main() -> None:
    plan = json.load(sys.stdin)
    cells = [Cell(**{**cell, "shape": tuple(cell["shape"])}) for cell in plan["cells"]]
    jobs = [(cell, mode) for cell in cells for mode in RUNS[plan["run"]]]
    most_threads = max((cell.threads for cell in cells), default=1)
    end = time.perf_counter() + plan["seconds"]
    for done, (cell, mode) in enumerate(jobs):
        # An equal share of what is left: what small cells do not need is for the large ones. Half
        # of it, since building and warming up takes about as long as measuring.
        share = max(0.0, end - time.perf_counter()) / (len(jobs) - done) / 2
        compiled = plan["compiled"] == "all" or (
            plan["compiled"] == "some"
            and (mode, cell.threads, cell.dtype) == ("forward_backward", most_threads, "float32")
        )
        found = measure(cell, plan["run"], mode, share, compiled, plan["variants"])
        print(json.dumps(to_json(found)), flush=True)


if __name__ == "__main__":
    main()
