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
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import bnext
from benchmarks.grid import SHAPES
from bnext import bench
from bnext.bench import Inputs
from bnext.timing import Clock, Loop, interleave, ratio, spread

# ResNet-50's layers at batch 32, beside the shapes of the CPU's table.
RESNET: list[tuple[tuple[int, ...], str]] = [
    ((32, channels, size, size), layout)
    for channels, size in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
    for layout in ("planes", "channels_last")
]
QUICK: list[tuple[tuple[int, ...], str]] = [((32, 50), "rows"), ((4, 8, 7, 7), "channels_last")]
# Tensors of the input's size that must be read and written: on chip, the least there is.
PASSES = {"forward": 2, "forward_backward": 5, "eval": 2}


def extensions(inputs: Inputs) -> Iterator[tuple[str, nn.Module]]:
    """Peers for CUDA, where they import: an extension that does not load is not there."""
    if inputs.x.device.type != "cuda" or inputs.x.dim() != 4:
        return
    with contextlib.suppress(Exception):
        yield "InPlace-ABN", importlib.import_module("inplace_abn").InPlaceABN(inputs.channels)
    with contextlib.suppress(Exception):
        group = importlib.import_module("apex.contrib.groupbn").BatchNorm2d_NHWC
        yield "apex NHWC", group(inputs.channels, fuse_relu=True)


def loops(inputs: Inputs, compiled: bool) -> dict[str, Loop]:
    """Every variant that takes this input."""
    found = bench.loops(inputs, compiled)
    for name, layer in extensions(inputs):
        found[name] = bench.module_loop(layer.to(inputs.x.device), inputs)
    for name, loop in list(found.items()):
        try:
            loop(1)
        except Exception as error:
            print(f"{name} does not take {inputs.x.shape} {inputs.x.dtype}: {error}")
            del found[name]
    return found


def measure(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    device: str,
    rounds: int,
    compiled: bool,
) -> list[dict[str, Any]]:
    """One row for each variant and mode: median microseconds, ratio to eager, GB/s."""
    rows, clock = [], Clock(device)
    for mode, passes in PASSES.items():
        inputs = bench.make_inputs(shape, layout, dtype, mode, device)
        runs = interleave(
            loops(inputs, compiled), 0.0, clock, min_rounds=rounds, max_rounds=rounds
        ).seconds
        for name, seconds in runs.items():
            moved = inputs.nbytes * (bench.PASSES["copy"] if name == "copy" else passes)
            median = spread(seconds).median
            rows.append({
                "shape": list(shape), "layout": layout, "dtype": str(dtype).removeprefix("torch."),
                "mode": mode, "variant": name, "us": median * 1e6,
                "ratio_to_eager": ratio(seconds, runs["eager"]).median,
                "gb_per_s": moved / median / 1e9,
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
