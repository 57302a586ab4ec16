"""Random shapes, strides, dtypes and options against bnext.reference in float64.

(The reference itself is tested against nn.BatchNorm in test_reference.py.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from assertions import GRAD_EPS, assert_close, assert_same
from cases import ACTIVATIONS, DTYPES, Case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Magnitudes, away_from_kink
from torch import Tensor

import bnext
from bnext.reference import batch_norm_reference

EPS = 1e-3
# 0 and 1, sizes around the vector widths, and a few larger ones.
SIZES = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 70]))


@dataclass(frozen=True)
class View:
    """Strides that a user's tensor may have: a storage larger than the view, its dimensions in
    another order, sliced, expanded, and starting anywhere."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    expanded: tuple[bool, ...]
    offset: int

    def of(self, values: Tensor) -> Tensor:
        for dim, expand in enumerate(self.expanded):
            if expand and values.shape[dim] > 1:
                values = values.narrow(dim, 0, 1)
        stored = [values.shape[d] * self.steps[d] for d in self.order]
        storage = values.new_full((self.offset + math.prod(stored),), math.nan)
        view = storage[self.offset :].view(stored)
        view = view.permute([self.order.index(d) for d in range(values.dim())])
        view = view[tuple(slice(None, None, step) for step in self.steps)]
        return view.copy_(values)


@st.composite
def views(draw, rank: int, may_expand: bool = True) -> View:
    steps = st.sampled_from([1, 1, 1, 2, 3])
    expand = st.sampled_from([False] * 5 + [True]) if may_expand else st.just(False)
    return View(
        order=tuple(draw(st.permutations(range(rank)))),
        steps=tuple(draw(steps) for _ in range(rank)),
        expanded=tuple(draw(expand) for _ in range(rank)),
        offset=draw(st.integers(0, 3)),
    )


@dataclass(frozen=True)
class Call:
    """One call of bnext.batch_norm with a backward pass."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    view: View
    grad_view: View
    residual_view: View | None
    activation: str | None
    training: bool
    running: bool
    weight: bool
    bias: bool
    ghost_batch_size: int | None
    mean: float


@st.composite
def calls(draw) -> Call:
    rank = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(SIZES, min_size=rank, max_size=rank)))
    assume(math.prod(shape) <= 20_000)
    training = draw(st.booleans())
    return Call(
        shape=shape,
        dtypes=draw(st.sampled_from(DTYPES)),
        view=draw(views(rank)),
        grad_view=draw(views(rank)),
        residual_view=draw(st.one_of(st.none(), views(rank))),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        training=training,
        running=draw(st.booleans()) or not training,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        ghost_batch_size=draw(st.one_of(st.none(), st.integers(1, 12))),
        mean=draw(st.sampled_from([0.0, 1.0, -30.0])),
    )


class Layer:
    """The attributes of a layer that `Magnitudes` reads."""

    def __init__(self, tensors: dict[str, Tensor | None]) -> None:
        self.eps = EPS
        for name, value in tensors.items():
            setattr(self, name, value)


def values_per_channel(call: Call) -> tuple[int, int]:
    """In the smallest ghost; and the number of ghosts."""
    n = call.shape[0]
    ghosts = 1
    if call.training and call.ghost_batch_size and n:
        ghosts = -(-n // call.ghost_batch_size)
    return (n // ghosts) * math.prod(call.shape[2:]), ghosts


@given(calls())
@settings(max_examples=600, derandomize=True, deadline=None, database=None)
def test_matches_the_reference(call: Call) -> None:
    """Output, every gradient and both buffers; one value per channel fails."""
    case = Case(call.shape, mean=call.mean).with_dtypes(*call.dtypes)
    tensors: dict[str, Tensor | None] = dict(case.parameters())
    for name in ("weight", "bias"):
        if not getattr(call, name):
            tensors[name] = None
    if not call.running:
        tensors["running_mean"] = tensors["running_var"] = None
    x = call.view.of(case.input())
    g = call.grad_view.of(case.grad_output())
    # Expanding broadcasts the values; narrow and expand make a view of stride 0.
    x, g = x.expand(call.shape), g.expand(call.shape)
    residual = None
    if call.residual_view is not None:
        residual = call.residual_view.of(case.residual()).expand(call.shape)

    options = dict(
        training=call.training,
        momentum=0.3,
        eps=EPS,
        activation=call.activation,
        ghost_batch_size=call.ghost_batch_size,
    )
    count, ghosts = values_per_channel(call)
    if call.training and x.numel() and count == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            bnext.batch_norm(x, **tensors, residual=residual, **options)
        return

    def step(function, cast, grad_output) -> tuple[Tensor, dict[str, Tensor], dict]:
        named = {k: None if t is None else cast(t) for k, t in tensors.items()}
        named["input"], named["residual"] = cast(x), None if residual is None else cast(residual)
        wanted = {
            k: named[k].requires_grad_()
            for k in ("input", "residual", "weight", "bias")
            if named[k] is not None
        }
        output = function(named.pop("input"), **named, **options)
        grads = torch.autograd.grad(output, list(wanted.values()), cast(grad_output))
        buffers = {k: named[k] for k in ("running_mean", "running_var") if named[k] is not None}
        return output.detach(), dict(zip(wanted, grads, strict=True)), buffers

    def cast64(tensor: Tensor) -> Tensor:
        return tensor.detach().double().clone(memory_format=torch.contiguous_format)

    if not x.numel():
        output, grads, _ = step(bnext.batch_norm, lambda t: t.detach(), g)
        assert output.shape == x.shape and output.dtype == x.dtype
        assert all((grad == 0).all() for grad in grads.values())
        return
    sizes = Magnitudes(
        x,
        g,
        Layer(tensors),
        training=call.training,
        activation=call.activation,
        residual=residual,
        num_ghosts=ghosts,
    )
    linear = {k: None if t is None else cast64(t) for k, t in tensors.items()}
    z = batch_norm_reference(
        cast64(x),
        **linear,
        residual=None if residual is None else cast64(residual),
        **{**options, "activation": None},
    )
    g = away_from_kink(g, z, sizes.output, call.activation)
    before = {k: t.clone() for k, t in tensors.items() if t is not None}
    want = step(batch_norm_reference, cast64, g)
    have = step(bnext.batch_norm, lambda t: t.detach(), g)

    assert have[0].dtype == x.dtype
    assert_close(have[0], want[0], sizes.output, name="output")
    for name, grad in have[1].items():
        size = sizes.grads[name]
        assert_close(grad, want[1][name], size, eps_count=GRAD_EPS, name=f"grad of {name}")
    for name, buffer in have[2].items():
        size = before[name].double().abs() + sizes.batch[name]
        assert_close(buffer, want[2][name], size, name=name)
    for name in ("weight", "bias"):
        if tensors[name] is not None:
            assert_same(tensors[name].detach(), before[name], name)


@given(st.data())
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
def test_only_the_values_matter_not_the_strides(data: st.DataObject) -> None:
    """Any view of some values gives the output of the contiguous values, up to rounding."""
    rank = data.draw(st.integers(2, 5))
    shape = tuple(data.draw(st.lists(st.integers(2, 9), min_size=rank, max_size=rank)))
    values = Case(shape).input()
    view = data.draw(views(rank, may_expand=False)).of(values)
    assert torch.equal(view, values)
    have = bnext.batch_norm(view, None, None, training=True, activation="silu")
    want = bnext.batch_norm(values, None, None, training=True, activation="silu")
    torch.testing.assert_close(have, want, rtol=0, atol=1e-6)  # 8 eps of outputs up to about 1
