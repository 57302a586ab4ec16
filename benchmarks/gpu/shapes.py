"""The shapes that are timed on a GPU, and what was predicted for them before any run (2026-11-27,
for an H100): derived from the launches' plans and bytes, at 3.0 TB/s, not measured."""

from __future__ import annotations

from typing import NamedTuple

import torch

F32, BF16 = torch.float32, torch.bfloat16
COPY_GB_PER_S = 3000.0  # of a large copy on an H100, bytes read plus bytes written
# Tensors of the input's size that each op must read and write, at least.
LEAST = {"copy": 2, "forward": 2, "backward": 3, "reduce": 1, "grad_reduce": 2, "eval": 2}


class Cell(NamedTuple):
    """Predicted microseconds: bnext's, eager's and torch.compile's, forward and backward."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    bnext: tuple[float, float]
    eager: tuple[float, float]
    compiled: tuple[float, float]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def floor_us(self, op: str) -> float:
        return LEAST[op] * self.nbytes / COPY_GB_PER_S / 1e3

    def predicted_us(self, op: str) -> float | None:
        return dict(zip(("forward", "backward"), self.bnext, strict=True)).get(op)


def _cells() -> list[Cell]:
    planes, rows = "planes", "channels_last"
    large, half, quarter = (32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28)
    small, least = (32, 1024, 14, 14), (32, 2048, 7, 7)
    # In doubt first: predicted slower than compiled code, or on the edge of it.
    return [
        Cell(half, rows, F32, (109, 219), (222, 351), (113, 189)),
        Cell(half, planes, F32, (93, 144), (222, 351), (113, 189)),
        Cell(half, rows, BF16, (60, 147), (115, 179), (56, 94)),
        Cell(half, planes, BF16, (48, 74), (115, 179), (56, 94)),
        Cell(least, planes, F32, (45, 48), (35, 51), (14, 26)),
        Cell(least, rows, BF16, (16, 17), (21, 29), (11, 16)),
        Cell(least, planes, BF16, (42, 45), (21, 29), (10, 16)),
        Cell(least, rows, F32, (19, 23), (35, 51), (16, 26)),
        Cell(large, rows, F32, (125, 214), (222, 351), (113, 189)),
        Cell(large, rows, BF16, (76, 125), (115, 179), (56, 94)),
        Cell(small, planes, BF16, (32, 32), (35, 51), (16, 26)),
        Cell(small, rows, BF16, (21, 24), (35, 51), (16, 26)),
        Cell((32768, 256), "rows", F32, (42, 67), (78, 120), (36, 61)),
        Cell((32768, 256), "rows", BF16, (24, 39), (43, 64), (20, 32)),
        Cell((4096, 256), "rows", F32, (12, 13), (17, 22), (9, 13)),
        Cell((4096, 256), "rows", BF16, (12, 11), (12, 15), (8, 9)),
        Cell((128, 256), "rows", F32, (5, 5), (10, 14), (6, 7)),
        Cell((32, 50), "rows", F32, (5, 5), (10, 14), (6, 7)),
        Cell(large, planes, F32, (91, 141), (222, 351), (113, 189)),
        Cell(large, planes, BF16, (48, 72), (115, 179), (56, 94)),
        Cell(quarter, planes, F32, (44, 74), (115, 179), (56, 94)),
        Cell(quarter, planes, BF16, (25, 35), (62, 94), (27, 46)),
        Cell(quarter, rows, F32, (56, 84), (115, 179), (56, 94)),
        Cell(quarter, rows, BF16, (31, 46), (62, 94), (27, 46)),
        Cell(small, planes, F32, (25, 38), (62, 94), (27, 46)),
        Cell(small, rows, F32, (29, 45), (62, 94), (27, 46)),
    ]


CELLS = _cells()
# To try a stage on the CPU.
QUICK = [
    Cell((32, 50), "rows", F32, (5, 5), (10, 14), (6, 7)),
    Cell((4, 16, 7, 7), "channels_last", BF16, (5, 5), (10, 14), (6, 7)),
]


def cells(quick: bool) -> list[Cell]:
    return QUICK if quick else CELLS
