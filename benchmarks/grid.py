"""What is measured: the cells, and the two ways to run each."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

SHAPES: list[tuple[tuple[int, ...], str]] = [
    ((32, 50), "rows"),
    ((128, 256), "rows"),
    ((1024, 256), "rows"),
    ((4096, 256), "rows"),
    ((16384, 256), "rows"),
    ((32768, 256), "rows"),
    ((131072, 64), "rows"),
    *(
        (shape, layout)
        for shape in (
            (32, 64, 56, 56),
            (64, 256, 14, 14),
            (16, 512, 7, 7),
            (8, 64, 112, 112),
            (4, 32, 16, 56, 56),
        )
        for layout in ("planes", "channels_last")
    ),
]
QUICK = [
    ((32, 50), "rows"),
    ((1024, 256), "rows"),
    ((16, 512, 7, 7), "planes"),
    ((16, 512, 7, 7), "channels_last"),
]
DTYPES = ("float32", "bfloat16")
THREADS = (1, 2)

# Whole: fresh outputs, through the layer, as users run it. Kernel: the ops alone, outputs reused.
RUNS = {"whole": ("forward", "forward_backward", "eval"), "kernel": ("forward", "backward")}


@dataclass(frozen=True)
class Cell:
    shape: tuple[int, ...]
    layout: str  # rows, planes or channels_last
    dtype: str
    threads: int

    def __str__(self) -> str:
        plural = "s" if self.threads > 1 else ""
        return f"{self.shape} {self.layout} {self.dtype} {self.threads} thread{plural}"

    @property
    def nbytes(self) -> int:
        """Of the input."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return math.prod(self.shape) * itemsize

    def exceeds(self, cache_bytes: int) -> bool:
        """Whether input and output together do not fit a cache of this size."""
        return 2 * self.nbytes > cache_bytes


def cells(quick: bool = False) -> list[Cell]:
    """The grid, small inputs first: time that they leave is for the large ones."""
    found = [
        Cell(shape, layout, dtype, threads)
        for (shape, layout), dtype, threads in itertools.product(
            QUICK if quick else SHAPES, DTYPES, THREADS
        )
    ]
    return sorted(found, key=lambda cell: cell.nbytes)


def last_level_cache_bytes() -> int:
    """Of the first core, as Linux tells; 32 MiB where it does not."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=32 << 20)
