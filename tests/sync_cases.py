"""A step of synchronised layers in a process of a group, for tests/layers/test_sync.py; run as a
script it is one of the processes: rank, world size, file to meet at, folder for results, what to
do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import bnext

CHANNELS = 5


@dataclass(frozen=True)
class Case:
    """Batches of all ranks, by their sizes, and the layer they go through.

    Attributes:
        how: "plain", "ddp" or "compiled".
    """

    name: str
    sizes: Callable[[int], list[int]] = lambda world: [4] * world
    shape: tuple[int, ...] = (3, 4)
    activation: str | None = "relu"
    residual: bool = False
    offset: float = 0.0
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    how: str = "plain"
    subgroups: bool = False  # of even and of odd ranks
    options: dict[str, object] = field(default_factory=dict)


CASES = [
    Case("planes"),
    Case("rows", shape=()),
    Case("channels_last", channels_last=True),
    Case("float32", dtype=torch.float32),
    Case("offset", offset=1e4, dtype=torch.float32),
    Case("silu and residual", activation="silu", residual=True),
    Case("relu and residual", residual=True),
    Case("no activation, residual", activation=None, residual=True),
    Case("uneven", sizes=lambda world: [2 * rank + 1 for rank in range(world)]),
    Case("empty", sizes=lambda world: [0, *[3] * (world - 1)]),
    Case("one value a rank", sizes=lambda world: [1] * world, shape=()),
    Case("cumulative", options={"momentum": None}),
    Case("ghosts", sizes=lambda world: [5] * world, options={"ghost_batch_size": 2}),
    Case(
        "ghosts, one a rank",
        sizes=lambda world: [2, *[5] * (world - 1)],
        options={"ghost_batch_size": 3},
    ),
    Case("subgroups", subgroups=True),
    Case("ddp", how="ddp"),
    Case("ddp without buffers", how="ddp without buffers"),
    Case("compiled", how="compiled"),
    Case("accumulated", how="accumulated"),
]


def make_layer(case: Case) -> nn.Module:
    kind = bnext.BatchNormAct2d if case.shape else bnext.BatchNormAct1d
    layer = kind(CHANNELS, activation=case.activation, dtype=case.dtype, **case.options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5, generator=generator)
        layer.bias.normal_(generator=generator)
    return layer


def make_batch(case: Case, rank: int, world: int, step: int) -> list[Tensor]:
    """Input, residual and grad_output."""
    found = []
    for which in range(3):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + which)
        shape = (case.sizes(world)[rank], CHANNELS, *case.shape)
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + rank)
        values = (values + (case.offset if which == 0 else 0)).to(case.dtype)
        if case.channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        found.append(values)
    return found


def run(model: nn.Module, batch: list[Tensor], residual: bool) -> list[Tensor]:
    """Output and gradients of the inputs."""
    x, r, grad = batch
    inputs = [x.requires_grad_()] + ([r.requires_grad_()] if residual else [])
    output = model(*inputs)
    grads = torch.autograd.grad(output, [*inputs, *model.parameters()], grad)
    for parameter, value in zip(model.parameters(), grads[len(inputs) :], strict=True):
        parameter.grad = value
    return [output.detach(), *grads[: len(inputs)]]


def step_of(case: Case, model: nn.Module, batch: list[Tensor]) -> list[Tensor]:
    if not case.how.startswith("ddp"):
        return run(model, batch, case.residual)
    x, _, grad = batch
    x.requires_grad_()
    output = model(x)
    output.backward(grad)
    return [output.detach(), x.grad]


def ghosts(case: Case) -> dict[str, object]:
    return {k: v for k, v in case.options.items() if k == "ghost_batch_size"}


def ranks_together(case: Case, rank: int, world: int) -> list[int]:
    return list(range(rank % 2, world, 2)) if case.subgroups else list(range(world))


def result(case: Case, rank: int, world: int) -> dict[str, list[Tensor]]:
    groups = [dist.new_group(list(range(p, world, 2))) for p in range(2)] if case.subgroups else []
    group = groups[rank % 2] if groups else None
    layer = bnext.convert_sync(make_layer(case), group, inplace=True, **ghosts(case))
    model: nn.Module = layer
    if case.how.startswith("ddp"):
        model = DistributedDataParallel(layer, broadcast_buffers=case.how == "ddp")
    elif case.how == "compiled":
        model = torch.compile(layer, fullgraph=True, backend="aot_eager")
    elif case.how == "accumulated":
        bnext.accumulate(layer, 2)
    found = []
    for step in range(2):
        layer.zero_grad()
        found += step_of(case, model, make_batch(case, rank, world, step))
    return {
        "tensors": found,
        "grads": [p.grad for p in layer.parameters()],
        "buffers": [b.clone() for b in layer.buffers()],
        "eval": [layer.eval()(make_batch(case, rank, world, 9)[0]).detach()],
    }


def main(rank: int, world: int, meeting: str, folder: str, what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    if what == "cases":
        results = {case.name: result(case, rank, world) for case in CASES}
        torch.save(results, Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()
        return
    channels = 5 if what == "other channels" and rank == world - 1 else 4
    layer = bnext.convert_sync(bnext.BatchNorm1d(channels))
    if what != "other channels":
        layer(torch.randn(3, 4))
    if what == "dies" and rank == world - 1:
        os._exit(3)
    if what == "another layer" and rank == world - 1:
        layer = bnext.convert_sync(bnext.BatchNorm1d(5))
    try:
        layer(torch.randn(3, layer.num_features))
    except RuntimeError as error:
        print(f"RuntimeError: {error}", flush=True)
        os._exit(0)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
