"""What bnext is to reach, as data, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.grid import Cell
from benchmarks.peers import TORCH
from benchmarks.results import Measurement, Results
from bnext.measure.timing import Spread

THREADS = 2
FLOAT32_BYTES = 4

Where = Callable[[Cell, int], bool]
"""Of a cell and the bytes of the last-level cache."""


@dataclass(frozen=True)
class Target:
    """``ours`` over the fastest of ``others`` is to be at most ``limit``, ``where`` it applies."""

    name: str
    limit: float
    run: str
    modes: tuple[str, ...]
    others: tuple[str, ...]
    ours: str = "bnext"
    where: Where = lambda cell, cache: True


@dataclass(frozen=True)
class Verdict:
    """A target in one cell and mode."""

    target: Target
    measurement: Measurement
    value: Spread
    other: str

    @property
    def met(self) -> bool:
        return self.value.median <= self.target.limit


def _rows(*sizes: int) -> Where:
    return lambda cell, cache: cell.layout == "rows" and cell.shape[0] in sizes


def _layouts(*layouts: str) -> Where:
    return lambda cell, cache: cell.layout in layouts


def _above(cell: Cell, cache: int) -> bool:
    return cell.exceeds(cache)


STEP, KERNELS = ("forward_backward",), ("forward", "backward")
ALL = ("forward", "forward_backward", "eval")
GHOSTS = "bnext ghosts"

TARGETS: tuple[Target, ...] = (
    Target("step at (32, 50) float32, against eager", 0.55, "whole", STEP, ("eager",),
           where=lambda cell, cache: cell.shape == (32, 50) and cell.dtype == "float32"),
    Target("step at (128..4096, 256), against eager", 0.45, "whole", STEP, ("eager",),
           where=_rows(128, 1024, 4096)),
    Target("step of planes and channels_last, against eager", 0.50, "whole", STEP, ("eager",),
           where=_layouts("planes", "channels_last")),
    Target("every cell, against the best of torch", 0.80, "whole", ALL, TORCH),
    Target("every cell, against the best of torch: never slower", 1.0, "whole", ALL, TORCH),
    Target("kernels of rows and channels_last, against oneDNN", 0.95, "kernel", KERNELS,
           ("onednn",), where=_layouts("rows", "channels_last")),
    Target("kernels of planes, against oneDNN", 0.40, "kernel", KERNELS, ("onednn",),
           where=_layouts("planes")),
    Target("forward kernel above the cache, in copies (floor 1.5)", 1.75, "kernel", ("forward",),
           ("copy",), where=_above),
    Target("backward kernel above the cache, in copies (floor 2.5)", 2.9, "kernel", ("backward",),
           ("copy",), where=_above),
    Target("ghost step, against plain bnext", 1.05, "whole", STEP, ("bnext",), GHOSTS),
    Target("ghost kernels, against plain bnext", 1.05, "kernel", KERNELS, ("bnext",), GHOSTS),
    Target("ghost kernels above the cache, against plain bnext", 0.85, "kernel", KERNELS,
           ("bnext",), GHOSTS, where=_above),
    Target("ghost step, against a loop over nn.BatchNorm", 0.15, "whole", STEP, ("ghost loop",),
           GHOSTS),
    Target("eval, against eager", 0.55, "whole", ("eval",), ("eager",)),
)  # fmt: skip

# Floats per channel, and per ghost, that may be kept for backward beyond the input and the output:
# weight, bias, and the mean (in two parts) and invstd of every ghost.
KEPT_PER_CHANNEL, KEPT_PER_GHOST = 2, 3


def verdict(target: Target, measurement: Measurement, cache_bytes: int) -> Verdict | None:
    """None where the target does not speak of this measurement."""
    m = measurement
    paired = m.ratios.get(target.ours, {})
    others = [other for other in target.others if other in paired]
    if (
        m.run != target.run
        or m.mode not in target.modes
        or m.cell.threads != THREADS
        or not others
        or not target.where(m.cell, cache_bytes)
    ):
        return None
    fastest = max(others, key=lambda other: paired[other].median)
    return Verdict(target, m, paired[fastest], fastest)


def verdicts(results: Results, targets: Sequence[Target] = TARGETS) -> dict[Target, list[Verdict]]:
    """Every target, with the cells and modes in which it was measured."""
    found = {
        target: [verdict(target, m, results.cache_bytes) for m in results.measurements]
        for target in targets
    }
    return {target: [v for v in values if v is not None] for target, values in found.items()}


def kept_floats_per_channel(measurement: Measurement) -> dict[str, tuple[float, int]]:
    """Of each layer of ours: floats per channel kept for backward, and how many it may keep."""
    shape = measurement.cell.shape
    ghosts = {"bnext": 1, GHOSTS: -(-shape[0] // 32)}
    return {
        name: (
            kept / FLOAT32_BYTES / shape[1],
            KEPT_PER_CHANNEL + KEPT_PER_GHOST * ghosts[name],
        )
        for name, kept in measurement.kept_bytes.items()
    }
