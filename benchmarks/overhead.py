"""``python -m benchmarks.overhead``: where the microseconds of a small layer's step go.

Every layer of the call is timed on its own, bnext's beside eager's: each contains the one above it.
*hot*: many calls of one layer in a row; *cold*: calls of all layers one by one in random order, so
that each finds the caches as a model with other layers leaves them. Medians.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bnext
from bnext import ops
from bnext.autograd import BatchNormFunction

Calls = dict[str, Callable[[], Any]]


def below_autograd(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return call()

    return run


class _Floor(torch.autograd.Function):
    """Does nothing: the price of a Python Function of three parameters, and of the engine."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, ready: Any) -> Tensor:
        ctx.ready = ready
        return ready[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.ready, None


def op_args(layer: Any, input: Tensor) -> tuple[Any, ...]:
    size = input.shape[1]
    parameters = [p[:size] for p in (layer.weight, layer.bias)]
    buffers = [b[:size] for b in (layer.running_mean, layer.running_var)]
    return (input, *parameters, *buffers, layer.num_batches_tracked, None, True, 0.1, 1e-5)


def our_calls(shape: tuple[int, int]) -> Calls:
    layer: Any = bnext.BatchNormAct1d(shape[1])
    input, grad = torch.randn(shape), torch.randn(shape)
    leaf = input.clone().requires_grad_()
    full, tiny = (
        (*(t.detach() if isinstance(t, Tensor) else t for t in op_args(layer, x)), "relu", None)
        for x in (input, torch.randn(2, 1))
    )

    def backward_args(forward: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
        stats = ops.batch_norm_below_autograd(*forward)[1:]
        return (grad, *forward[:3], None, None, *stats, True, "relu", [True, False])

    back, tiny_back = backward_args(full, grad), backward_args(tiny, torch.randn(2, 1))
    function_args = (
        *(leaf, layer.weight, layer.bias, None),
        ops.ForwardCall._make(full),
    )
    functional_args = (layer.running_mean, layer.running_var, layer.weight, layer.bias, True)
    ready = torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])
    floor_args = leaf, layer.weight, layer.bias, ready
    return {
        "op, input of (2, 1)": lambda: ops.batch_norm_below_autograd(*tiny),
        "op": lambda: ops.batch_norm_below_autograd(*full),
        "op by torch.ops": below_autograd(lambda: torch.ops.bnext.batch_norm(*full)),
        "Function.apply": lambda: BatchNormFunction.apply(*function_args),
        "functional": lambda: bnext.batch_norm(leaf, *functional_args, activation="relu"),
        "module": lambda: layer(leaf),
        "backward op, (2, 1)": lambda: ops.batch_norm_backward_below_autograd(*tiny_back),
        "backward op": lambda: ops.batch_norm_backward_below_autograd(*back),
        "backward op by torch.ops": below_autograd(
            lambda: torch.ops.bnext.batch_norm_backward(*back)
        ),
        "step": lambda: layer(leaf).backward(grad),
        "step of a Function that does nothing": lambda: _Floor.apply(*floor_args).backward(grad),
    }


def eager_calls(shape: tuple[int, int]) -> Calls:
    norm: Any = nn.BatchNorm1d(shape[1])
    layer = nn.Sequential(norm, nn.ReLU())
    input, grad = torch.randn(shape), torch.randn(shape)
    leaf = input.clone().requires_grad_()
    weight, bias = norm.weight.detach(), norm.bias.detach()
    running = norm.running_mean, norm.running_var
    aten = torch.ops.aten
    output, mean, invstd = aten.native_batch_norm(input, weight, bias, *running, True, 0.1, 1e-5)
    relu = torch.relu(output)
    mask = [True, True, True]

    def forward() -> Tensor:
        return torch.relu(
            torch.native_batch_norm(input, weight, bias, *running, True, 0.1, 1e-5)[0]
        )

    def backward() -> Any:
        dy = aten.threshold_backward(grad, relu, 0)
        return aten.native_batch_norm_backward(
            dy, input, weight, *running, mean, invstd, True, 1e-5, mask
        )

    def functional() -> Tensor:
        y = nn.functional.batch_norm(leaf, *running, norm.weight, norm.bias, True)
        return nn.functional.relu(y)

    return {
        "op": below_autograd(forward),
        "functional": functional,
        "module": lambda: layer(leaf),
        "backward op": below_autograd(backward),
        "step": lambda: layer(leaf).backward(grad),
    }


def _times(calls: list[Callable[[], Any]], rounds: int, repeat: int) -> list[float]:
    """Median microseconds of a call of each, in random order within each round."""
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for call in calls:
        for _ in range(50):
            call()
    for _ in range(rounds):
        random.shuffle(order)
        for i in order:
            start = time.perf_counter()
            for _ in range(repeat):
                calls[i]()
            times[i].append((time.perf_counter() - start) / repeat)
    return [statistics.median(t) * 1e6 for t in times]


def main(
    threads: Annotated[int, typer.Option(help="Intra-op threads.")] = 1,
    rows: Annotated[int, typer.Option(help="Samples of the input.")] = 32,
    columns: Annotated[int, typer.Option(help="Channels of the input.")] = 50,
    rounds: Annotated[int, typer.Option(help="Of all layers.")] = 1000,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    random.seed(0)
    ours, eager = our_calls((rows, columns)), eager_calls((rows, columns))
    calls = [*ours.values(), *eager.values()]
    cold = _times(calls, rounds, 1)
    hot = _times(calls, max(1, rounds // 10), 20)
    table = Table(title=f"({rows}, {columns}) float32, {threads} thread(s), us a call")
    for column in ("layer", "bnext hot", "cold", "eager hot", "cold"):
        table.add_column(column)
    names = list(eager)
    for i, name in enumerate(ours):
        cells = [f"{hot[i]:.1f}", f"{cold[i]:.1f}", "", ""]
        if name in eager:
            j = len(ours) + names.index(name)
            cells[2:] = f"{hot[j]:.1f}", f"{cold[j]:.1f}"
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
