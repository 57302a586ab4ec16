"""``python -m benchmarks.speed``: time of BatchNorm + ReLU in bnext beside PyTorch eager, paired.

Each pair runs both, one after the other, and gives one ratio; the median of the ratios is what a
noisy machine leaves to trust. Times are of the whole call, with fresh outputs, as users run it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import bnext

SHAPES: list[tuple[tuple[int, ...], str]] = [
    ((32, 50), "rows"),
    ((128, 256), "rows"),
    ((1024, 256), "rows"),
    ((4096, 256), "rows"),
    ((32768, 256), "rows"),
    ((32, 64, 56, 56), "contiguous"),
    ((32, 64, 56, 56), "channels_last"),
    ((64, 256, 14, 14), "contiguous"),
    ((64, 256, 14, 14), "channels_last"),
    ((16, 512, 7, 7), "contiguous"),
]


def _time(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def paired(
    ours: Callable[[], None], theirs: Callable[[], None], seconds: float
) -> dict[str, float]:
    """Median time of each in microseconds, median and quartiles of the ratio ours / theirs."""
    ours()
    theirs()
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < 5:
        pairs.append((_time(ours), _time(theirs)))
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return {
        "ours": statistics.median(a for a, _ in pairs) * 1e6,
        "theirs": statistics.median(b for _, b in pairs) * 1e6,
        "ratio": middle,
        "low": low,
        "high": high,
    }


def steps(layer: nn.Module, input: torch.Tensor, grad: torch.Tensor | None) -> Callable[[], None]:
    """One forward (``grad`` None) or one forward and backward of the layer."""

    def forward() -> None:
        with torch.no_grad():
            layer(input)

    def forward_backward() -> None:
        layer(input).backward(grad)

    return forward if grad is None else forward_backward


def compare(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, ghost: int | None, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Forward, and forward + backward, of bnext against ``nn.BatchNorm`` + ``nn.ReLU``."""
    dims = max(1, len(shape) - 2)
    ours = getattr(bnext, f"BatchNormAct{dims}d")(shape[1], ghost_batch_size=ghost)
    theirs = nn.Sequential(getattr(nn, f"BatchNorm{dims}d")(shape[1]), nn.ReLU())
    input = torch.randn(shape, dtype=dtype)
    if layout == "channels_last":
        input = input.contiguous(memory_format=torch.channels_last)
    input.requires_grad_()
    grad = torch.randn_like(input)
    forward = paired(steps(ours, input, None), steps(theirs, input, None), seconds)
    return forward, paired(steps(ours, input, grad), steps(theirs, input, grad), seconds)


def main(
    threads: Annotated[int, typer.Option(help="Intra-op threads.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the input; parameters stay float32.")] = "float32",
    ghost: Annotated[int | None, typer.Option(help="Ghost batch size.")] = None,
    seconds: Annotated[float, typer.Option(help="Per measurement.")] = 1.0,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = bnext.config.build_info()
    table = Table(
        title=f"BatchNorm + ReLU, {dtype}, {threads} thread(s), {config['isa']}, "
        f"torch {torch.__version__}: bnext / eager, median of paired ratios (quartiles)"
    )
    for column in ("shape", "layout", "forward us", "ratio", "fwd + bwd us", "ratio"):
        table.add_column(column)
    for shape, layout in SHAPES:
        cells = [str(shape), layout]
        for result in compare(shape, layout, getattr(torch, dtype), ghost, seconds):
            cells.append(f"{result['ours']:.0f} / {result['theirs']:.0f}")
            cells.append(f"{result['ratio']:.2f} ({result['low']:.2f}-{result['high']:.2f})")
        table.add_row(*cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
