"""``python -m benchmarks.gpu.training``: a training step of ResNet-50 (batch 64, bfloat16 autocast,
channels_last), plain and converted by bnext, eager and compiled."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional as F

import bnext
from bnext.measure.timing import Clock, interleave, ratio, repeat, spread
from tools.gpu_run.records import record

NETWORK, BATCH, SIZE, CLASSES = "resnet50", 64, 224, 1000
ROUNDS = 15


def training_step(model: nn.Module, batch: int, size: int, device: str) -> Callable[[], None]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return step


def peak_mb(step: Callable[[], None], device: str) -> float:
    if device != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def measure(
    models: dict[str, nn.Module], compiled: bool, network: str, batch: int, size: int, device: str,
    rounds: int,
) -> None:  # fmt: skip
    steps = {name: training_step(model, batch, size, device) for name, model in models.items()}
    for step in steps.values():
        step()  # compiles, tunes
    taken = interleave(
        {name: repeat(step) for name, step in steps.items()}, 0.0, Clock(device),
        min_rounds=rounds, max_rounds=rounds,
    ).seconds  # fmt: skip
    for name, seconds in taken.items():
        record(
            "training", network=network, variant=name, compiled=compiled,
            ms=spread(seconds).median * 1e3,
            ratio=round(ratio(seconds, taken["plain"]).median, 3),
            peak_mb=round(peak_mb(steps[name], device)),
        )  # fmt: skip


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the benchmark itself.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="Compile only if half of it is left.")] = 70,
    quick: Annotated[bool, typer.Option("--quick", help="ResNet-18 on a few pixels.")] = False,
) -> None:
    """Time training steps, eager first."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here")
    try:
        models: Any = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # PyPI's beside a CPU build of torch
        record("check", name="torchvision", outcome="left out", message=str(error))
        return
    start = time.monotonic()
    network, batch, size, rounds = (
        ("resnet18", 2, 64, 3) if quick else (NETWORK, BATCH, SIZE, ROUNDS)
    )
    torch.manual_seed(0)
    plain = getattr(models, network)(num_classes=CLASSES).to(device)
    plain = plain.to(memory_format=torch.channels_last)
    found = {"plain": plain, "bnext": bnext.convert(plain)}
    measure(found, False, network, batch, size, device, rounds)
    if quick:
        return
    if time.monotonic() - start > seconds / 2:
        record("left out", what=["compiled training steps"])
        return
    compiled: dict[str, nn.Module] = {
        name: torch.compile(model)  # type: ignore[misc]
        for name, model in found.items()
    }
    measure(compiled, True, network, batch, size, device, rounds)


if __name__ == "__main__":
    typer.run(main)
