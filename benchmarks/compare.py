"""What got slower between two runs, beyond their noise.

Two runs may be of two days: times are compared through the peers, which did not change. The change
of a measurement is the median, over the peers, of the growth of bnext's ratio to each of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.peers import OURS
from benchmarks.results import Measurement, Results
from bnext.measure.timing import Spread

# Medians move by about a tenth from run to run, through where memory lies and what else runs
# (docs/performance.md, 2026-11-23): less is no news, however narrow the quartiles.
RUN_TO_RUN = 0.10


@dataclass(frozen=True)
class Change:
    """``growth`` 1.2: slower by a fifth; ``noise`` 0.1: within a tenth is no news."""

    measurement: Measurement
    name: str
    growth: float
    noise: float

    @property
    def slower(self) -> bool:
        return self.growth > 1 + self.noise

    def __str__(self) -> str:
        m = self.measurement
        return (
            f"{self.name}, {m.cell}, {m.run} {m.mode}: {self.growth:.2f} times the time "
            f"(noise {self.noise:.0%})"
        )


def _error(value: Spread, rounds: int) -> float:
    """Relative half-width of a median's notch: 1.57 IQR / sqrt(n) (McGill, Tukey, Larsen 1978)."""
    return 1.57 * (value.high - value.low) / value.median / math.sqrt(rounds)


def changes(old: Results, new: Results) -> Iterator[Change]:
    """Of every measurement that both runs hold."""
    before = {m.key: m for m in old.measurements}
    for m in new.measurements:
        was = before.get(m.key)
        if was is None:
            continue
        for name in OURS:
            mine, theirs = was.ratios.get(name, {}), m.ratios.get(name, {})
            peers = [peer for peer in mine if peer in theirs and peer not in OURS]
            if not peers:
                continue
            growths = [theirs[peer].median / mine[peer].median for peer in peers]
            noises = [
                math.hypot(_error(mine[peer], was.rounds), _error(theirs[peer], m.rounds))
                for peer in peers
            ]
            yield Change(m, name, statistics.median(growths), max(RUN_TO_RUN, max(noises)))


def report(old: Results, new: Results) -> list[str]:
    """One line for each measurement that got slower, the worst first, after a summary."""
    found = list(changes(old, new))
    slower = sorted((c for c in found if c.slower), key=lambda c: -c.growth)
    lines = [f"{len(found)} measurements compared, {len(slower)} slower beyond the noise"]
    for key in ("processor", "isa", "torch"):
        if old.machine.get(key) != new.machine.get(key):
            lines.append(f"note: {key} {old.machine.get(key)} then, {new.machine.get(key)} now")
    return lines + [f"slower: {change}" for change in slower]
