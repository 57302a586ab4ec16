"""BatchNorm + ReLU of bnext and its peers in PyTorch, as loops to be timed.

``python -m bnext bench`` times them for one shape; benchmarks/peers.py adds peers that bnext's
users need not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bnext
from bnext.measure.accuracy import to_layout
from bnext.measure.timing import Clock, Loop, Rounds, interleave, repeat

MODES = ("forward", "forward_backward", "eval")
# Tensors of the input's size that a call reads or writes where no cache helps: forward reads the
# input twice, backward the input and the gradient twice; each writes one.
PASSES = {"copy": 2, "forward": 3, "backward": 5, "forward_backward": 8, "eval": 2}
GHOST = 32


@dataclass(frozen=True)
class Inputs:
    """What all variants of a measurement share."""

    x: Tensor
    grad: Tensor
    mode: str

    @property
    def channels(self) -> int:
        return self.x.size(1)

    @property
    def nbytes(self) -> int:
        return self.x.numel() * self.x.element_size()

    def layer(self, family: Any, name: str = "BatchNorm", **options: Any) -> Any:
        """``family.{name}{1,2,3}d`` for this input; its parameters are float32."""
        rank = max(1, self.x.dim() - 2)
        return getattr(family, f"{name}{rank}d")(self.channels, device=self.x.device, **options)

    @property
    def ghosts(self) -> int:
        """How many ghosts of ``GHOST`` samples the batch holds, the last one maybe smaller."""
        return -(-self.x.size(0) // GHOST)


def make_inputs(
    shape: Sequence[int], layout: str, dtype: torch.dtype, mode: str, device: str = "cpu"
) -> Inputs:
    """``layout``: channels_last, or any other word for contiguous."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)
    x = to_layout(x, layout if layout == "channels_last" else "contiguous")
    return Inputs(x, torch.randn_like(x), mode)


def module_loop(layer: nn.Module, inputs: Inputs) -> Loop:
    """The layer as users run it: a fresh output, and gradients of input and parameters."""
    x, grad = inputs.x.detach(), inputs.grad
    layer.train(inputs.mode != "eval")
    if inputs.mode == "forward_backward":
        x.requires_grad_()
        wanted = [x, *layer.parameters()]
        return repeat(lambda: torch.autograd.grad(layer(x), wanted, grad))

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return repeat(forward)


def _eager(inputs: Inputs, inplace: bool = False) -> nn.Module:
    return nn.Sequential(inputs.layer(nn), nn.ReLU(inplace))


def _compiled(inputs: Inputs) -> nn.Module:
    torch._dynamo.reset()  # or, after a few shapes, it would compile for dynamic ones
    compiled: Any = torch.compile(_eager(inputs))
    return compiled


def _ghosts(inputs: Inputs) -> nn.Module | None:
    if inputs.ghosts == 1 or inputs.mode == "eval":
        return None
    return inputs.layer(bnext, "BatchNormAct", ghost_batch_size=GHOST)


# A layer of the peer for these inputs, or None where there is nothing to compare.
LAYERS: dict[str, Callable[[Inputs], nn.Module | None]] = {
    "bnext": lambda inputs: inputs.layer(bnext, "BatchNormAct"),
    "bnext ghosts": _ghosts,
    "eager": _eager,
    "eager in-place": lambda inputs: _eager(inputs, inplace=True),
    "compiled": _compiled,
}


def kept_for_backward(function: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """The output, and what its graph keeps: tensors saved for backward, and those that are
    attributes of a node, which saved-tensor hooks do not see."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)
    nodes = [node for node in [output.grad_fn] if node is not None]
    for node in nodes:  # grows while it is walked
        nodes += [following for following, _ in node.next_functions if following is not None]
        for value in getattr(node, "__dict__", {}).values():
            values = value if isinstance(value, (list, tuple)) else [value]
            kept += [v for v in values if isinstance(v, Tensor)]
    return output, kept


def copy_loop(inputs: Inputs) -> Loop:
    """The floor: one read and one write of the input."""
    source, target = inputs.x.detach(), torch.empty_like(inputs.x)
    return repeat(lambda: target.copy_(source))


def loops(inputs: Inputs, compiled: bool = True) -> dict[str, Loop]:
    """Every layer that applies, and ``copy``."""
    found = {"copy": copy_loop(inputs)}
    for name, build in LAYERS.items():
        layer = build(inputs) if compiled or name != "compiled" else None
        if layer is not None:
            found[name] = module_loop(layer, inputs)
    return found


def bench(
    shape: Sequence[int],
    layout: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seconds: float = 2.0,
    compiled: bool = True,
) -> Iterator[tuple[Inputs, Rounds]]:
    """Mode by mode."""
    clock = Clock(device)
    for mode in MODES:
        inputs = make_inputs(shape, layout, dtype, mode, device)
        yield inputs, interleave(loops(inputs, compiled), seconds, clock)
