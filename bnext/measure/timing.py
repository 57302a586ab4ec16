"""Paired timing: variants of one computation, interleaved, compared round by round.

A noisy machine slows all variants of a round alike. So the ratio of two variants is taken within a
round, and what is reported is the median of the rounds' ratios, with their quartiles. Where Linux
tells that threads waited for a core that other programs had, a short sample is taken again.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Clock", "Loop", "Rounds", "Spread", "interleave", "ratio", "repeat", "spread"]

Loop = Callable[[int], object]
"""Runs its computation this many times."""

_SAMPLE_SECONDS = 200e-6  # shorter calls are timed several at once: the clock itself costs 0.1 us
_MAX_CALLS = 200
_WAITING = 0.2  # of a sample, over all threads: then other programs disturbed it
_RETRIES, _RETRY_SECONDS = 3, 5e-3  # on a busy machine every longer sample is disturbed
_HIDING_CYCLES = 1_000_000  # of the GPU's clock: half a millisecond
_FLUSH_BYTES = 256 << 20  # more than any L2 cache of a GPU of 2026


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of ``ours / theirs``, where the two lists are of the same rounds."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def repeat(step: Callable[[], object]) -> Loop:
    """A loop in Python."""

    def loop(times: int) -> None:
        for _ in range(times):
            step()

    return loop


class Clock:
    """Seconds per call. On CUDA by events, after flushing the L2 cache, one call at a time."""

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, loop: Loop, calls: int = 1) -> float:
        if not self.cuda:
            start = time.perf_counter()
            loop(calls)
            return (time.perf_counter() - start) / calls
        self._flush.zero_()
        # The device waits while the host prepares the call: its time is not the device's.
        torch.cuda._sleep(_HIDING_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        loop(1)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of each variant in each round, and the share of disturbed samples."""

    seconds: dict[str, list[float]]
    disturbed: float


def _waited() -> float:
    """Seconds that threads of this process were ready to run but had no core (not Linux: 0)."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or another format
            continue
    return total * 1e-9


def _sample(clock: Clock, loop: Loop, calls: int) -> tuple[float, bool]:
    """Seconds per call, and whether other programs disturbed the last attempt too."""
    for _ in range(1 + _RETRIES):
        before = _waited()
        seconds = clock(loop, calls)
        disturbed = _waited() - before > _WAITING * seconds * calls
        if not disturbed or seconds * calls > _RETRY_SECONDS:
            break
    return seconds, disturbed


def _calls_per_sample(seconds: float) -> int:
    return max(1, min(_MAX_CALLS, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-9))))


def interleave(
    loops: Mapping[str, Loop],
    seconds: float,
    clock: Clock,
    *,
    min_rounds: int = 5,
    max_rounds: int = 100,
) -> Rounds:
    """Every round runs every variant once, in an order drawn anew.

    Rounds end after ``seconds``, but not before ``min_rounds``.
    """
    calls = {}
    for name, loop in loops.items():
        loop(1)  # allocates, tunes, compiles
        calls[name] = _calls_per_sample(min(clock(loop), clock(loop)))
    order, draw = list(loops), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in loops}
    disturbed = 0
    end = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > end:
            break
        draw.shuffle(order)
        for name in order:
            taken, noisy = _sample(clock, loops[name], calls[name])
            samples[name].append(taken)
            disturbed += noisy
    return Rounds(samples, disturbed / sum(map(len, samples.values())))
