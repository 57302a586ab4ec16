"""``python -m benchmarks.gpu.modules``: layers as users run them, at ResNet-50's shapes, beside
eager (cuDNN's kernels where torch takes them), torch.compile, other extensions, and a copy."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks.gpu.shapes import BF16, F32
from bnext.measure import bench
from bnext.measure.bench import Inputs
from bnext.measure.timing import Clock, Loop, interleave, ratio, spread
from tools.gpu_run.records import record

Shape = tuple[tuple[int, ...], str, torch.dtype]
# ResNet-50's layers at batch 32, those of most time first.
SHAPES: list[Shape] = [
    ((32, channels, size, size), layout, dtype)
    for channels, size in ((256, 56), (64, 112), (512, 28), (2048, 7), (1024, 14))
    for dtype in (BF16, F32)
    for layout in ("channels_last", "planes")
]
QUICK: list[Shape] = [((32, 50), "rows", F32), ((4, 8, 7, 7), "channels_last", F32)]
COMPILED = 6  # of the shapes: three sizes in channels_last, which compiled networks use
MODES = ("forward_backward", "forward", "eval")
WARMERS = 8


def compiles(shape: Shape, index: int) -> bool:
    return shape[1] == "channels_last" and index < 2 * COMPILED


def extensions(inputs: Inputs) -> Iterator[tuple[str, nn.Module]]:
    """Peers for CUDA, where they import: an extension that does not load is not there."""
    if inputs.x.device.type != "cuda" or inputs.x.dim() != 4:
        return
    with contextlib.suppress(Exception):
        yield "InPlace-ABN", importlib.import_module("inplace_abn").InPlaceABN(inputs.channels)
    with contextlib.suppress(Exception):
        group = importlib.import_module("apex.contrib.groupbn").BatchNorm2d_NHWC
        yield "apex NHWC", group(inputs.channels, fuse_relu=True)


def without_cudnn(loop: Loop) -> Loop:
    """torch's own kernels, where it would take cuDNN's."""

    def run(times: int) -> None:
        with torch.backends.cudnn.flags(enabled=False):
            loop(times)

    return run


def loops(inputs: Inputs, compiled: bool) -> dict[str, Loop]:
    """Every variant that takes this input."""
    found = bench.loops(inputs, compiled)
    found.pop("bnext ghosts", None)
    for name, layer in extensions(inputs):
        found[name] = bench.module_loop(layer.to(inputs.x.device), inputs)
    if inputs.x.device.type == "cuda":
        found["eager, no cuDNN"] = without_cudnn(found["eager"])
    for name, loop in list(found.items()):
        try:
            loop(1)
        except Exception as error:
            print(f"{name} does not take {inputs.x.shape} {inputs.x.dtype}: {error}")
            del found[name]
    return found


def measure(shape: Shape, device: str, rounds: int, compiled: bool) -> None:
    clock = Clock(device)
    sizes, layout, dtype = shape
    for mode in MODES:
        inputs = bench.make_inputs(sizes, layout, dtype, mode, device)
        runs = interleave(
            loops(inputs, compiled), 0.0, clock, min_rounds=rounds, max_rounds=rounds
        ).seconds
        for name, seconds in runs.items():
            record(
                "module", shape=list(sizes), layout=layout,
                dtype=str(dtype).removeprefix("torch."), mode=mode, variant=name,
                us=spread(seconds).median * 1e6,
                ratio_to_eager=ratio(seconds, runs["eager"]).median,
            )  # fmt: skip


def warm(index: int, device: str) -> None:
    """Compiles what one cell needs into Inductor's cache, which the measuring process reads."""
    sizes, layout, dtype = SHAPES[index]
    for mode in MODES:
        inputs = bench.make_inputs(sizes, layout, dtype, mode, device)
        layer = bench.LAYERS["compiled"](inputs)
        assert layer is not None
        bench.module_loop(layer, inputs)(1)


def warm_all(device: str, seconds: float) -> None:
    """In several processes at once: compiling is the host's work, 5 to 10 seconds a cell."""
    this = [sys.executable, "-m", "benchmarks.gpu.modules", "--device", device, "--warm"]
    wanted = [i for i, shape in enumerate(SHAPES) if compiles(shape, i)][:WARMERS]
    started = [subprocess.Popen([*this, str(i)]) for i in wanted]
    end = time.monotonic() + seconds
    for process in started:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the benchmark itself.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="Begin no cell after so many.")] = 85,
    rounds: Annotated[int, typer.Option(min=3, help="Calls of each variant.")] = 30,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two small shapes, none compiled.")
    ] = False,
    warm_one: Annotated[int | None, typer.Option("--warm", help="Compile this cell only.")] = None,
) -> None:
    """Time the layers, shape by shape."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here")
    if warm_one is not None:
        warm(warm_one, device)
        return
    end = time.monotonic() + seconds
    if not quick:
        warm_all(device, seconds / 2)
    left_out = []
    for index, shape in enumerate(QUICK if quick else SHAPES):
        if time.monotonic() > end:
            left_out.append(f"{shape[0]} {shape[1]} {shape[2]}")
            continue
        measure(shape, device, 3 if quick else rounds, not quick and compiles(shape, index))
    if left_out:
        record("left out", what=left_out)


if __name__ == "__main__":
    typer.run(main)
