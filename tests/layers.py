"""Builds bnext's layers for a case, with parameters and buffers that are neither 0 nor 1."""

from __future__ import annotations

import torch
from assertions import assert_same
from cases import Case, Mode
from op_samples import ops
from torch import Tensor, nn

import bnext

PLAIN = (bnext.BatchNorm1d, bnext.BatchNorm2d, bnext.BatchNorm3d)
ACT = (bnext.BatchNormAct1d, bnext.BatchNormAct2d, bnext.BatchNormAct3d)
ALL = (*PLAIN, *ACT)
TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# A small input of 6 channels for each.
SHAPES = dict(zip((*ALL, *TORCH), ((4, 6), (4, 6, 5, 5), (4, 6, 3, 5, 5)) * 3, strict=True))


def make_layer(
    case: Case,
    mode: Mode | None = None,
    *,
    training: bool = True,
    act: bool = False,
    activation: str | None = None,
    ghost_batch_size: int | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """bnext.BatchNorm<d>d, or BatchNormAct<d>d if `act`."""
    options = dict(vars(mode or Mode()), ghost_batch_size=ghost_batch_size)
    if act:
        options["activation"] = activation
    layer = (ACT if act else PLAIN)[case.spatial_rank - 1](
        case.channels, **options, device=device, dtype=case.param_dtype
    )
    with torch.no_grad():
        for name, value in case.parameters(device).items():
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(value)
    return layer.train(training)


def step(
    case: Case, training: bool, activation: str | None, ghosts: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """All results of a forward and a backward pass."""
    size = None if ghosts == 1 else -(-case.shape[0] // ghosts)
    layer = make_layer(
        case,
        training=training,
        act=True,
        activation=activation,
        ghost_batch_size=size,
        device=device,
    )
    x, residual = (t(device).requires_grad_() for t in (case.input, case.residual))
    wanted = {"input": x, "residual": residual, "weight": layer.weight, "bias": layer.bias}
    y = layer(x, residual)
    grads = torch.autograd.grad(y, list(wanted.values()), case.grad_output(device))
    named = dict(zip(wanted, grads, strict=True))
    return {"output": y.detach(), **named, **dict(layer.named_buffers())}


def trained(cls: type, **options: object) -> nn.Module:
    """A layer of 6 channels after a step, so that nothing in its state has its first value."""
    layer = cls(6, **{"device": ops.device, **options})
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p)
    layer(sample(cls))
    return layer


def randn(*shape: int, **options: object) -> Tensor:
    """torch.randn on the device of the test."""
    return torch.randn(shape, **options, device=ops.device)


def sample(cls: type) -> Tensor:
    return randn(*SHAPES[cls])


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    state = b.state_dict()
    assert list(a.state_dict()) == list(state)
    for name, value in a.state_dict().items():
        assert_same(value, state[name], name)
