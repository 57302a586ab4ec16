"""``python -m benchmarks.models``: a training step of whole networks, and batch norm's share of it.

Each network runs as it is (eager), with every BatchNorm + ReLU pair (+ residual) replaced by one
layer of bnext, compiled, and *bare*: without its norms and the ReLUs of these pairs. What
a variant takes beyond the bare network is the price of batch norm and activation in it.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bnext
from benchmarks import results
from benchmarks.environment import CALM, restart_with
from benchmarks.report import machine_line, table
from bnext.timing import Clock, Loop, Rounds, interleave, ratio, repeat

CLASSES = 10
ADDITIONS = (operator.add, operator.iadd, torch.add)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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


@dataclass(frozen=True)
class Pair:
    """The nodes of a graph that one fused layer computes."""

    norm: fx.Node
    add: fx.Node | None
    relu: fx.Node | None  # None: no ReLU follows

    @property
    def residual(self) -> fx.Node | None:
        if self.add is None:
            return None
        (other,) = (node for node in self.add.all_input_nodes if node is not self.norm)
        return other

    @property
    def last(self) -> fx.Node:
        return self.relu or self.norm


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(graph: fx.GraphModule, node: fx.Node | None) -> bool:
    if node is None:
        return False
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))) is nn.ReLU
    return node.target in (F.relu, torch.relu)


def pairs(graph: fx.GraphModule) -> list[Pair]:
    """Every batch norm, with the addition and the ReLU that nothing but it leads to."""
    found: list[Pair] = []
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        if not isinstance(graph.get_submodule(str(node.target)), NORMS):
            continue
        after = _only_user(node)
        is_sum = after is not None and after.target in ADDITIONS and len(after.all_input_nodes) == 2
        relu = _only_user(after) if is_sum and after is not None else after
        taken = any(pair.relu is relu for pair in found)  # both operands of a sum may be norms
        if _is_relu(graph, relu) and not taken:
            found.append(Pair(node, after if is_sum else None, relu))
        else:
            found.append(Pair(node, None, None))
    return found


def _rewrite(model: nn.Module, layer: Callable[[nn.Module, Pair], nn.Module]) -> fx.GraphModule:
    """Every pair replaced by ``layer``, at the end of it: a residual is computed by then."""
    graph = fx.symbolic_trace(model)
    for pair in pairs(graph):
        name = str(pair.norm.target)
        graph.set_submodule(name, layer(graph.get_submodule(name), pair))
        with graph.graph.inserting_after(pair.last):
            inputs = [pair.norm.all_input_nodes[0], *([pair.residual] if pair.residual else [])]
            call = graph.graph.call_module(name, tuple(inputs))
        pair.last.replace_all_uses_with(call)
        for node in (pair.relu, pair.add, pair.norm):
            if node is not None:
                graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def fused(model: nn.Module) -> fx.GraphModule:
    def layer(norm: Any, pair: Pair) -> nn.Module:
        rank = type(norm).__name__.removeprefix("BatchNorm")
        act = getattr(bnext, f"BatchNorm{'Act' if pair.relu else ''}{rank}")
        new: nn.Module = act(norm.num_features, norm.eps, norm.momentum)
        new.load_state_dict(norm.state_dict())
        return new.to(norm.weight)

    return _rewrite(model, layer)


class _Bare(nn.Module):
    """The input, or its sum with the residual."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return input if residual is None else input + residual


def bare(model: nn.Module) -> fx.GraphModule:
    return _rewrite(model, lambda norm, pair: _Bare())


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
        "eager": model, "bnext": fused(model), "bare": bare(model)
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
