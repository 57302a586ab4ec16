"""The pure-PyTorch reference itself, against nn.BatchNorm in float64 and a loop over ghosts."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_same
from cases import ACTIVATIONS, DTYPES, FEW_SHAPES, LAYOUTS, SHAPES, Case, Mode, layouts_of
from layers import make_layer
from oracle import assert_matches_torch
from torch import Tensor, nn

import bnext
from bnext.reference import batch_norm_reference

F64 = torch.float64


class ReferenceLayer(nn.Module):
    """The reference with the parameters and buffers of a layer."""

    def __init__(self, layer: nn.Module, activation: str | None, ghosts: int | None) -> None:
        super().__init__()
        for name, p in layer.named_parameters():
            self.register_parameter(name, p)
        for name, b in layer.named_buffers():
            self.register_buffer(name, b)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if not hasattr(self, name):
                self.register_parameter(name, None)
        self.eps, self.momentum, self.training = layer.eps, layer.momentum, layer.training
        self.activation, self.ghosts = activation, ghosts

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.training and self.running_mean is not None:
            self.num_batches_tracked += 1
        return batch_norm_reference(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            ghost_batch_size=self.ghosts,
        )


def check(
    case: Case,
    mode: Mode | None = None,
    *,
    training: bool = True,
    activation: str | None = None,
    residual: bool = False,
    ghosts: int | None = None,
) -> None:
    mode = mode or Mode()
    layer = ReferenceLayer(make_layer(case, mode, training=training), activation, ghosts)
    assert_matches_torch(
        layer,
        case,
        mode,
        activation=activation,
        with_residual=residual,
        ghost_batch_size=ghosts,
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], training: bool) -> None:
    check(Case(shape).with_dtypes(F64), training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_every_layout(shape: tuple[int, ...], layout: str) -> None:
    if layout in layouts_of(shape):
        check(Case(shape, layout).with_dtypes(F64), activation="silu", residual=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_dtype_and_activation(dtypes, activation, residual: bool, training: bool) -> None:
    case = Case((4, 13, 7, 7)).with_dtypes(*dtypes)
    check(case, training=training, activation=activation, residual=residual)


@pytest.mark.parametrize("ghosts", [1, 2, 3, 4, 9, 10, 11, 64])
@pytest.mark.parametrize("shape", [(10, 5, 7), (10, 3, 2, 3)], ids=str)
def test_ghosts(shape: tuple[int, ...], ghosts: int) -> None:
    check(Case(shape).with_dtypes(F64), ghosts=ghosts, activation="silu")


@pytest.mark.parametrize(
    "mode",
    [Mode(affine=False), Mode(bias=False), Mode(track_running_stats=False), Mode(momentum=-0.1)],
    ids=str,
)
def test_modes(mode: Mode) -> None:
    check(Case((10, 5, 7)).with_dtypes(F64), mode, ghosts=3)


def test_same_arguments_as_the_functional() -> None:
    import inspect

    ours = inspect.signature(bnext.batch_norm).parameters
    theirs = inspect.signature(batch_norm_reference).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 2, 3), (3, 5, 0)], ids=str)
def test_empty_batch_leaves_the_statistics(shape: tuple[int, ...]) -> None:
    buffers = torch.full((5,), 0.5), torch.full((5,), 2.0)
    y = batch_norm_reference(torch.empty(shape), *buffers, training=True, activation="relu")
    assert y.shape == shape
    assert_same(buffers[0], torch.full((5,), 0.5))
    assert_same(buffers[1], torch.full((5,), 2.0))
