"""``python -m benchmarks.kernel_times``: the CPU kernels alone, in units of ``y.copy_(x)``.

Raw ops in a process whose allocator keeps freed memory, so that outputs are reused and no page
fault is timed; each phase beside the whole op. The lower quintile of interleaved calls: on a shared
machine most of the others were interrupted. Threads are bound to cores, else two may share one.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer

import bnext
from benchmarks.environment import CALM, KEEP_MEMORY, restart_with
from benchmarks.grid import SHAPES
from bnext.measure.bench import make_inputs


def times(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, ghost: int | None, seconds: float
) -> dict[str, float]:
    """Seconds of a copy, of forward and backward, and of their phases."""
    ops = torch.ops.bnext
    inputs = make_inputs(shape, layout, dtype, "forward")
    x, grad = inputs.x, inputs.grad
    copied = torch.empty_like(x)
    channels = shape[1]
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    running = torch.zeros(channels), torch.ones(channels), torch.tensor(0)

    def forward() -> list[torch.Tensor]:
        options = None, True, 0.1, 1e-5, "relu", ghost
        return ops.batch_norm(x, weight, bias, *running, *options)

    stats = forward()[1:]
    count = torch.full((stats[0].shape[0],), x.numel() // channels // stats[0].shape[0])
    sums = torch.randn(2, *stats[0].shape, dtype=torch.double)
    grads = grad, x, weight, bias, None, None, *stats
    calls = {
        "copy": lambda: copied.copy_(x),
        "forward": forward,
        "reduce": lambda: ops.batch_norm_reduce(x, ghost),
        "apply": lambda: ops.batch_norm_apply(x, weight, bias, None, *stats, "relu"),
        "backward": lambda: ops.batch_norm_backward(*grads, True, "relu", [True, False]),
        "grad_reduce": lambda: ops.batch_norm_grad_reduce(*grads, "relu"),
        "grad_apply": lambda: ops.batch_norm_grad_apply(
            *grads, count, *sums, "relu", [True, False]
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found["copy"]) < 7:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 5] for name, values in found.items()}


def main(
    threads: Annotated[int, typer.Option(help="Intra-op threads.")] = 2,
    dtype: Annotated[str, typer.Option(help="Of the input; parameters stay float32.")] = "float32",
    ghost: Annotated[int | None, typer.Option(help="Ghost batch size.")] = None,
    seconds: Annotated[float, typer.Option(help="Per shape.")] = 1.0,
) -> None:
    """Print microseconds, and in brackets multiples of a copy."""
    restart_with(CALM | KEEP_MEMORY, "benchmarks.kernel_times")
    torch.set_num_threads(threads)
    print(f"{dtype}, {threads} thread(s), {bnext.config.build_info()['isa']}")
    with torch.no_grad():
        for shape, layout in SHAPES:
            found = times(shape, layout, getattr(torch, dtype), ghost, seconds)
            cells = (
                f"{name} {value * 1e6:.1f} ({value / found['copy']:.2f})"
                for name, value in found.items()
            )
            print(f"{shape!s:17} {layout:13}", " | ".join(cells), flush=True)


if __name__ == "__main__":
    typer.run(main)
