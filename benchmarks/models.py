"""``python -m benchmarks.models``: a training step of whole networks, and batch norm's share of it.

Each network runs as it is (eager), as bnext.convert makes it, compiled, and *bare*: without its
norms and the activations that bnext fuses with them. What a variant takes beyond the bare network
is the price of batch norm and activation in it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torchvision
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from torch import nn
from torch.nn import functional as F

import bnext
from benchmarks import results
from benchmarks.environment import CALM, restart_with
from benchmarks.report import machine_line, table
from bnext.conversion.calls import module_activation
from bnext.measure.timing import Clock, Loop, Rounds, interleave, ratio, repeat

CLASSES = 10


def tabular_mlp(features: int = 64, width: int = 256, layers: int = 4) -> nn.Module:
    sizes = [features] + [width] * layers
    blocks: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        blocks += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Linear(width, CLASSES))


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


NETWORKS = {
    "resnet18": Network(
        lambda: torchvision.models.resnet18(num_classes=CLASSES), (16, 3, 112, 112)
    ),
    "mobilenet_v2": Network(
        lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES), (16, 3, 112, 112)
    ),
    "tabular mlp": Network(tabular_mlp, (1024, 64)),
}


def bare(model: nn.Module) -> nn.Module:
    """Without its batch norms, and the modules of activations that bnext fuses with them."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if bnext.is_batch_norm(module) or module_activation(module) is not None:
            model.set_submodule(name, nn.Identity())
    return model


def training_step(model: nn.Module, shape: tuple[int, ...]) -> Loop:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    labels = torch.randint(CLASSES, (shape[0],), generator=generator)
    # No learning: without normalisation the bare network would soon compute with infinities.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return repeat(step)


def variants(network: Network, compiled: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model = network.build()
    # As networks without batch norm are started, so that the bare one neither grows nor fades.
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    found: dict[str, nn.Module] = {
        "eager": model, "bnext": bnext.convert(model), "bare": bare(model)
    }  # fmt: skip
    if compiled:
        torch._dynamo.reset()
        found |= {f"{name} compiled": torch.compile(found[name]) for name in ("eager", "bnext")}  # type: ignore[misc]
    return found


def row(name: str, rounds: Rounds) -> list[str]:
    times = rounds.seconds

    def share(of: str) -> str:
        return f"{1 - ratio(times['bare'], times[of]).median:.0%}"

    cells = [name, f"{1e3 * sorted(times['eager'])[len(times['eager']) // 2]:.1f}"]
    cells += [str(ratio(times["bnext"], times["eager"])), share("eager"), share("bnext")]
    if "eager compiled" in times:
        cells.append(str(ratio(times["eager compiled"], times["eager"])))
        cells.append(str(ratio(times["bnext compiled"], times["eager compiled"])))
    return cells


HEADING = (
    *("network", "eager, ms a step", "bnext over eager", "norm's share, eager", "with bnext"),
    *("compiled over eager", "bnext compiled over compiled"),
)


def main(
    output: Annotated[Path, typer.Option(help="Folder for models.json and models.md.")] = Path(
        "docs/bench"
    ),
    threads: Annotated[int, typer.Option(help="Intra-op threads.")] = 2,
    seconds: Annotated[float, typer.Option(help="For each network, less what compiles.")] = 40,
    compiled: Annotated[bool, typer.Option(help="Also by torch.compile.")] = True,
) -> None:
    """Measure, print the table and write it down."""
    restart_with(CALM, "benchmarks.models")
    torch.set_num_threads(threads)
    rows, raw = [], {}
    for name, network in track(NETWORKS.items(), console=Console(stderr=True)):
        loops = {
            variant: training_step(model, network.shape)
            for variant, model in variants(network, compiled).items()
        }
        rounds = interleave(loops, seconds, Clock())
        raw[name] = asdict(rounds) | {"shape": network.shape}
        rows.append(row(f"{name} {network.shape}", rounds))
    machine = results.machine() | results.thread_settings() | {"threads": threads}
    output.mkdir(parents=True, exist_ok=True)
    (output / "models.json").write_text(json.dumps({"machine": machine, "models": raw}))
    lines = ["# Training steps of networks", "", machine_line(machine), ""]
    lines += table(list(HEADING[: len(rows[0])]), rows)
    lines += ["", "Written by `python -m benchmarks.models`; quartiles in brackets."]
    text = "\n".join(lines) + "\n"
    (output / "models.md").write_text(text, encoding="utf-8")
    Console(width=160).print(Markdown(text))


if __name__ == "__main__":
    typer.run(main)
