"""``python -m benchmarks.gpu.kernels``: the raw ops, by graph replay, beside eager's and a copy.

Each cell is checked once against float64 before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

import bnext  # noqa: F401  (registers the ops)
from benchmarks.gpu import timing
from benchmarks.gpu.shapes import LEAST, Cell, cells
from bnext.measure.accuracy import to_layout
from tools.gpu_run.records import record

ops = torch.ops.bnext
EPS = 1e-5
GHOSTS = 8  # the size of a ghost in the cells that are timed with ghosts
# Of the output, in units of the dtype's rounding, and of float32's: the statistics are of thousands
# of values, and a value may be eight standard deviations from the mean.
_TOLERANCE = 16
_CHECKED = 3  # channels


class Tensors:
    """One set of inputs, with the statistics that backward needs."""

    def __init__(self, cell: Cell, device: str, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw() -> Tensor:
            values = torch.randn(
                cell.shape, generator=generator, device=device, dtype=torch.float32
            )
            layout = cell.layout if cell.layout == "channels_last" else "contiguous"
            return to_layout(values.to(cell.dtype), layout)

        channels = cell.shape[1]
        self.x, self.grad = draw(), draw()
        self.weight = torch.rand(channels, generator=generator, device=device) + 0.5
        self.bias = torch.rand(channels, generator=generator, device=device) - 0.5
        self.running_mean = torch.zeros(channels, device=device)
        self.running_var = torch.ones(channels, device=device)
        self.target = torch.empty_like(self.x)
        _, *self.saved = self.forward()
        # Of eager's forward, which takes cuDNN's kernel or torch's own.
        normalised, *self.eager_saved, self.backend = torch.ops.aten._batch_norm_impl_index(
            self.x, self.weight, self.bias, None, None, True, 0.1, EPS, True
        )
        self.rectified = F.relu(normalised)

    def forward(self, ghost: int | None = None) -> Any:
        return ops.batch_norm(
            self.x, self.weight, self.bias, self.running_mean, self.running_var, None, None,
            True, 0.1, EPS, "relu", ghost,
        )  # fmt: skip

    def backward(self) -> Any:
        return ops.batch_norm_backward(
            self.grad, self.x, self.weight, self.bias, None, None, *self.saved, True, "relu",
            [True, False],
        )  # fmt: skip

    def eager_forward(self) -> Tensor:
        return F.relu(F.batch_norm(
            self.x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, EPS
        ))  # fmt: skip

    def eager_backward(self) -> Any:
        """In two calls, as autograd makes them."""
        through = torch.ops.aten.threshold_backward(self.grad, self.rectified, 0)
        mean, invstd, reserved = self.eager_saved
        return torch.ops.aten._batch_norm_impl_index_backward(
            self.backend, self.x, through, self.weight, None, None, mean, invstd, True, EPS,
            [True, True, True], reserved,
        )  # fmt: skip

    def reduce(self) -> Any:
        return ops.batch_norm_reduce(self.x, None)

    def grad_reduce(self) -> Any:
        return ops.batch_norm_grad_reduce(
            self.grad, self.x, self.weight, self.bias, None, None, *self.saved, "relu"
        )

    def copy(self) -> Tensor:
        return self.target.copy_(self.x)


Variants = dict[str, Callable[[Tensors], object]]


def variants(cell: Cell, quick: bool) -> Iterator[tuple[str, Variants]]:
    """Each op, and who does it."""
    yield (
        "forward",
        {"bnext": Tensors.forward, "eager": Tensors.eager_forward, "copy": Tensors.copy},
    )
    yield "backward", {"bnext": Tensors.backward, "eager": Tensors.eager_backward}
    if cell.shape[1:] in ((256, 56, 56), (64, 112, 112)) or quick:
        yield "reduce", {"bnext": Tensors.reduce}
        yield "grad_reduce", {"bnext": Tensors.grad_reduce}
    if cell.shape in ((32768, 256), (32, 256, 56, 56)) or quick:
        yield "forward", {f"ghosts of {GHOSTS}": lambda tensors: tensors.forward(GHOSTS)}


def expected(tensors: Tensors, channels: list[int]) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input, of some channels, in float64 on the CPU."""
    x, grad = (t[:, channels].cpu().double() for t in (tensors.x, tensors.grad))
    weight, bias = (t[channels].cpu().double() for t in (tensors.weight, tensors.bias))
    with torch.enable_grad():
        x.requires_grad_()
        y = F.relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS))
        return y.detach(), torch.autograd.grad(y, x, grad)[0]


def check(cell: Cell, tensors: Tensors) -> None:
    """Records whether forward and backward are right in the first, a middle and the last channel.
    At ReLU's kink the last bit decides on a gradient: elements there are left out."""
    n = cell.shape[1]
    channels = sorted({0, n // 2, n - 1})[:_CHECKED]
    want = expected(tensors, channels)
    have = tensors.forward()[0], tensors.backward()[0]
    eps = torch.finfo(cell.dtype).eps + torch.finfo(torch.float32).eps
    certain = (want[0] == 0) == (have[0][:, channels].cpu() == 0)
    for name, a, b in zip(("forward", "backward"), have, want, strict=True):
        error = (a[:, channels].cpu().double() - b).abs() / (1 + b.abs())
        if name == "backward":
            error = torch.where(certain, error, 0.0)
        worst = float(error.max()) if bool(error.isfinite().all()) else float("inf")
        right = worst <= _TOLERANCE * eps
        record(
            "check", name=f"{name} {cell.shape} {cell.layout} {cell.dtype}",
            outcome="passed" if right else "failed", message=f"largest error {worst:.2g}",
        )  # fmt: skip


def measure(cell: Cell, device: str, quick: bool) -> None:
    """Records every op of a cell as soon as it is timed."""
    sets = [Tensors(cell, device, seed) for seed in range(timing.copies(cell.nbytes, device))]
    check(cell, sets[0])
    plans: dict[str, str] = {}
    if device == "cuda":
        record("fact", name=f"eager's kernel, {cell.shape} {cell.layout} {cell.dtype}",
               value=("torch's own", "cuDNN's", "MIOpen's")[sets[0].backend])  # fmt: skip
        plans = {op: ops.cuda_plan(sets[0].x, None, n) for op, n in
                 (("forward", 1), ("backward", 2))}  # fmt: skip
    for op, found in variants(cell, quick):
        timers = {
            name: timing.timer([partial(call, one) for one in sets], device)
            for name, call in found.items()
        }
        for name, seconds in timing.interleaved(timers, device).items():
            record(
                "kernel", shape=list(cell.shape), layout=cell.layout,
                dtype=str(cell.dtype).removeprefix("torch."), op=op, variant=name,
                us=seconds * 1e6,
                gb_per_s=LEAST["copy" if name == "copy" else op] * cell.nbytes / seconds / 1e9,
                floor_us=cell.floor_us(op), predicted_us=cell.predicted_us(op),
                plan=plans.get(op, ""),
            )  # fmt: skip


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the benchmark itself.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="Begin no cell after so many.")] = 60,
    quick: Annotated[bool, typer.Option("--quick", help="Two small shapes.")] = False,
) -> None:
    """Time the raw ops, the shapes whose prediction is most in doubt first."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here")
    end = time.monotonic() + seconds
    left_out = []
    with torch.no_grad():
        for cell in cells(quick):
            if time.monotonic() > end:
                left_out.append(f"{cell.shape} {cell.layout} {cell.dtype}")
                continue
            measure(cell, device, quick)
    if left_out:
        record("left out", what=left_out)


if __name__ == "__main__":
    typer.run(main)
