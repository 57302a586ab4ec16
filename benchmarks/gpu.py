"""``python -m benchmarks.gpu``: BatchNorm + ReLU of bnext on a GPU beside the peers that import.

Times are of CUDA events, with the L2 cache flushed before each call; variants are interleaved, and
medians of a round's ratios are what is compared. GB/s are declared bytes (eager's outputs included
only once) over the time, next to those of a copy of the same tensor. With ``--device cpu`` the same
code runs by the clock, so that it can be tried where there is no GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import bnext
from benchmarks.speed import SHAPES

# ResNet-50's layers at batch 32, beside the shapes of the CPU's table.
RESNET: list[tuple[tuple[int, ...], str]] = [
    ((32, channels, size, size), layout)
    for channels, size in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
    for layout in ("contiguous", "channels_last")
]
QUICK: list[tuple[tuple[int, ...], str]] = [((32, 50), "rows"), ((4, 8, 7, 7), "channels_last")]
FLUSH_BYTES = 256 << 20  # more than any L2 cache of 2026
# Tensors of the input's size that must be read and written: on chip, the least there is.
PASSES = {"forward": 2, "forward_backward": 5, "eval": 2}

Step = Callable[[], Any]


class Clock:
    """Seconds of one call: by CUDA events on a GPU, else by the clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 1, dtype=torch.uint8, device=device)

    def __call__(self, step: Step) -> float:
        self.flush.zero_()
        if not self.cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def peers(shape: tuple[int, ...], device: str, compiled: bool) -> dict[str, nn.Module]:
    """Layers of BatchNorm + ReLU by name, eager first; apex and InPlace-ABN where they import."""
    dims = max(1, len(shape) - 2)
    channels = shape[1]
    norm = getattr(nn, f"BatchNorm{dims}d")
    layers: dict[str, nn.Module] = {
        "eager": nn.Sequential(norm(channels), nn.ReLU()),
        "eager in-place": nn.Sequential(norm(channels), nn.ReLU(inplace=True)),
        "bnext": getattr(bnext, f"BatchNormAct{dims}d")(channels),
    }
    if shape[0] >= 64:
        ghost = getattr(bnext, f"BatchNormAct{dims}d")(channels, ghost_batch_size=32)
        layers["bnext, ghosts of 32"] = ghost
    if compiled:
        layers["compiled"] = torch.compile(nn.Sequential(norm(channels), nn.ReLU()))  # type: ignore[assignment]
    if device == "cuda" and dims == 2:
        # An extension that does not load is a peer that is not there.
        with contextlib.suppress(Exception):
            layers["InPlace-ABN"] = importlib.import_module("inplace_abn").InPlaceABN(channels)
        with contextlib.suppress(Exception):
            group = importlib.import_module("apex.contrib.groupbn").BatchNorm2d_NHWC
            layers["apex NHWC"] = group(channels, fuse_relu=True)
    return {name: layer.to(device) for name, layer in layers.items()}


def steps(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Step]:
    def forward() -> Any:
        with torch.no_grad():
            return layer.train()(x)

    def evaluate() -> Any:
        with torch.no_grad():
            return layer.eval()(x)

    def forward_backward() -> Any:
        return torch.autograd.grad(layer.train()(x), x, grad)

    return {"forward": forward, "forward_backward": forward_backward, "eval": evaluate}


def measure(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    device: str,
    rounds: int,
    compiled: bool,
) -> list[dict[str, Any]]:
    """One row for each variant and mode: median microseconds, ratio to eager, GB/s."""
    x = torch.randn(shape, device=device, dtype=dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    grad, copy = torch.randn_like(x), torch.empty_like(x)
    clock = Clock(device)
    variants = {
        name: steps(layer, x, grad) for name, layer in peers(shape, device, compiled).items()
    }
    size = x.numel() * x.element_size()
    rows = []
    for mode, passes in PASSES.items():
        runs: dict[str, list[float]] = {"copy": [], **{name: [] for name in variants}}
        for name in [*variants]:  # warm up, and drop what does not take this input
            try:
                for _ in range(3):
                    variants[name][mode]()
            except Exception as error:
                print(f"{name} does not take {shape} {layout} {dtype}: {error}")
                del variants[name], runs[name]
        for _ in range(rounds):
            runs["copy"].append(clock(lambda: copy.copy_(x.detach())))
            for name, step in variants.items():
                runs[name].append(clock(step[mode]))
        for name, seconds in runs.items():
            ratios = [s / e for s, e in zip(seconds, runs["eager"], strict=True)]
            moved = size * (2 if name == "copy" else passes)
            rows.append({
                "shape": list(shape), "layout": layout, "dtype": str(dtype).removeprefix("torch."),
                "mode": mode, "variant": name, "us": statistics.median(seconds) * 1e6,
                "ratio_to_eager": statistics.median(ratios),
                "gb_per_s": moved / statistics.median(seconds) / 1e9,
            })  # fmt: skip
    return rows


def machine(device: str) -> dict[str, Any]:
    info = {"date": datetime.date.today().isoformat(), "torch": torch.__version__,
            "bnext": bnext.__version__, "device": device}  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
        }
    return info


def markdown(info: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in info.items()), "",
             "| shape | layout | dtype | mode | variant | us | / eager | GB/s |",
             "|---|---|---|---|---|---:|---:|---:|"]  # fmt: skip
    lines += [
        f"| {tuple(r['shape'])} | {r['layout']} | {r['dtype']} | {r['mode']} | {r['variant']} "
        f"| {r['us']:.1f} | {r['ratio_to_eager']:.2f} | {r['gb_per_s']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main(
    output: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md.")],
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the benchmark itself.")] = "cuda",
    rounds: Annotated[int, typer.Option(min=3, help="Calls of each variant.")] = 50,
    quick: Annotated[bool, typer.Option("--quick", help="Two small shapes, no compile.")] = False,
) -> None:
    """Measure and write the results."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here")
    torch.manual_seed(0)
    rows = []
    for shape, layout in QUICK if quick else [*SHAPES, *RESNET]:
        for dtype in (torch.float32, torch.bfloat16):
            rows += measure(shape, layout, dtype, device, rounds, compiled=not quick)
    info = machine(device)
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps({"machine": info, "rows": rows}, indent=1) + "\n")
    (output / "gpu.md").write_text(markdown(info, rows))
    print(markdown(info, rows))


if __name__ == "__main__":
    typer.run(main)
