"""The variants of a measurement: bnext and everything it is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import native, onednn
from benchmarks.grid import Cell
from bnext.measure import bench
from bnext.measure.bench import GHOST, Inputs, make_inputs, module_loop
from bnext.measure.timing import Loop, repeat

OURS = ("bnext", "bnext ghosts")
TORCH = ("eager", "eager in-place", "compiled")
EPS = 1e-5
MAX_LOOPED = 512  # ghosts: 40 us each, so that thousands of them would take the others' time

Builder = Callable[[Inputs], Loop | None]
"""A loop for these inputs, or None where the peer does not apply."""


class _GhostLoop(nn.Module):
    """Ghost batches as others write them: ``nn.BatchNorm`` piece by piece."""

    def __init__(self, norm: nn.Module, ghosts: int) -> None:
        super().__init__()
        self.norm, self.ghosts = norm, ghosts

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([self.norm(part) for part in x.tensor_split(self.ghosts)]))


def _ghost_loop(inputs: Inputs) -> Loop | None:
    if not 1 < inputs.ghosts <= MAX_LOOPED or inputs.mode != "forward_backward":
        return None
    return module_loop(_GhostLoop(inputs.layer(nn), inputs.ghosts), inputs)


def _onednn_whole(inputs: Inputs) -> Loop | None:
    """Fresh outputs, but neither autograd nor running statistics: oneDNN has none."""
    if onednn.missing(inputs.x.dtype):
        return None
    x, grad = inputs.x, inputs.grad
    norm = onednn.BatchNormRelu(x, inputs.mode != "eval", EPS)

    def step() -> None:
        output, workspace = norm.outputs(x)
        norm.forward(x, output, workspace)(1)
        if inputs.mode == "forward_backward":
            norm.backward(grad, x, workspace, torch.empty_like(x))(1)

    return repeat(step)


def _layer(name: str) -> Builder:
    def build(inputs: Inputs) -> Loop | None:
        layer = bench.LAYERS[name](inputs)
        return None if layer is None else module_loop(layer, inputs)

    return build


WHOLE: dict[str, Builder] = {
    "copy": bench.copy_loop,
    **{name: _layer(name) for name in bench.LAYERS},
    "ghost loop": _ghost_loop,
    "onednn": _onednn_whole,
}


@functools.cache
def kernels() -> Any:
    """The loops of kernels.cpp."""
    libraries = Path(torch.__file__).parent / "lib"
    includes = [Path(torch.__file__).parent / "include"]
    torch.ops.load_library(native.build("kernels", includes, libraries, ["c10", "torch_cpu"]))
    return torch.ops.bnext_bench


def _affine(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return torch.ones(inputs.channels), torch.zeros(inputs.channels)


def _copy_kernel(inputs: Inputs) -> Loop:
    x, y, loop = inputs.x, torch.empty_like(inputs.x), kernels().copy
    return lambda times: loop(x, y, times)


def _bnext_kernel(ghost: int | None) -> Builder:
    def build(inputs: Inputs) -> Loop | None:
        if ghost is not None and inputs.ghosts == 1:
            return None
        x, grad, (w, b) = inputs.x, inputs.grad, _affine(inputs)
        loops = kernels()
        if inputs.mode == "forward":
            return lambda times: loops.forward(x, w, b, ghost, EPS, times)
        _, *saved = torch.ops.bnext.batch_norm(
            x, w, b, None, None, None, None, True, 0.1, EPS, "relu", ghost
        )
        return lambda times: loops.backward(grad, x, w, b, *saved, times)

    return build


def _eager_kernel(inputs: Inputs) -> Loop:
    aten: Any = torch.ops.aten
    x, grad, (w, b) = inputs.x, inputs.grad, _affine(inputs)
    if inputs.mode == "forward":
        return repeat(
            lambda: torch.relu(aten.native_batch_norm(x, w, b, None, None, True, 0.1, EPS)[0])
        )
    output, mean, invstd = aten.native_batch_norm(x, w, b, None, None, True, 0.1, EPS)
    output = torch.relu(output)

    def backward() -> None:
        masked = aten.threshold_backward(grad, output, 0)
        aten.native_batch_norm_backward(
            masked, x, w, None, None, mean, invstd, True, EPS, [True, True, True]
        )

    return repeat(backward)


def _onednn_kernel(inputs: Inputs) -> Loop | None:
    if onednn.missing(inputs.x.dtype):
        return None
    x, norm = inputs.x, onednn.BatchNormRelu(inputs.x, True, EPS)
    output, workspace = norm.outputs(x)
    forward = norm.forward(x, output, workspace)
    if inputs.mode == "forward":
        return forward
    forward(1)
    return norm.backward(inputs.grad, x, workspace, torch.empty_like(x))


KERNEL: dict[str, Builder] = {
    "copy": _copy_kernel,
    "bnext": _bnext_kernel(None),
    "bnext ghosts": _bnext_kernel(GHOST),
    "eager": _eager_kernel,
    "onednn": _onednn_kernel,
}
PEERS = {"whole": WHOLE, "kernel": KERNEL}


def inputs_for(cell: Cell, mode: str) -> Inputs:
    return make_inputs(cell.shape, cell.layout, getattr(torch, cell.dtype), mode)


def loops(
    cell: Cell,
    run: str,
    mode: str,
    compiled: bool = False,
    variants: Collection[str] | None = None,
) -> dict[str, Loop]:
    """Every variant that applies, or those of ``variants``; ``compiled`` only if asked for."""
    inputs = inputs_for(cell, mode)
    built = {
        name: build(inputs)
        for name, build in PEERS[run].items()
        if (compiled or name != "compiled") and (variants is None or name in variants)
    }
    return {name: loop for name, loop in built.items() if loop is not None}


def kept_bytes(cell: Cell, name: str = "bnext") -> int | None:
    """What the layer saves for backward beside its input and output; None: does not apply."""
    inputs = inputs_for(cell, "forward_backward")
    layer = bench.LAYERS[name](inputs)
    if layer is None:
        return None
    x = inputs.x.detach().requires_grad_()
    output, kept = bench.kept_for_backward(layer, x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for tensor in (x, output):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
