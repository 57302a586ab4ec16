"""Device time: CUDA graphs of many calls, replayed in turns, each call on tensors that have left
the L2 cache. On the CPU the clock of the host, so that the same code can be tried there."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

_CACHE_BYTES = 256 << 20  # that the calls of a graph move: four times the largest L2 cache of 2026
_MOST_CALLS = 64
_REPLAYS = 20


def copies(nbytes: int, device: str) -> int:
    """How many sets of inputs make a graph: so many that each has left the cache when it comes
    again. Small tensors would need thousands: they stay in the cache, as in a network."""
    if device != "cuda":
        return 2
    return max(3, min(_MOST_CALLS, math.ceil(_CACHE_BYTES / max(1, nbytes))))


@dataclass
class Timer:
    """Runs a sequence of calls, and tells the seconds of one."""

    calls: Sequence[Call]
    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> float:
        if self.graph is None:
            start = time.perf_counter()
            for call in self.calls:
                call()
            return (time.perf_counter() - start) / len(self.calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / len(self.calls)


def timer(calls: Sequence[Call], device: str) -> Timer:
    """On CUDA a graph, captured after a warm-up on a side stream, as torch asks for. Outputs are
    freed within the capture, so that later calls of the graph write where earlier ones did."""
    if device != "cuda":
        for call in calls:
            call()
        return Timer(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Timer(calls, graph)


def interleaved(
    timers: Mapping[str, Timer], device: str, replays: int | None = None
) -> dict[str, float]:
    """The median seconds of a call of each, all of them timed in every round."""
    rounds = replays or (_REPLAYS if device == "cuda" else 3)
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for one in timers.values():
        one()
    for _ in range(rounds):
        for name, one in timers.items():
            samples[name].append(one())
    return {name: statistics.median(taken) for name, taken in samples.items()}
