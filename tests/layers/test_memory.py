"""Inputs stay as they are, outputs keep the memory format, and little is saved for backward."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_same
from cases import ACTIVATIONS, LAYOUTS, Case, lay_out
from layers import ACT, ALL, SHAPES, make_layer, randn
from op_samples import ops
from torch import Tensor, nn

import bnext
from bnext.measure.bench import kept_for_backward

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", ACT)
def test_input_and_residual_are_neither_changed_nor_aliased(
    cls: type, layout: str, training: bool
) -> None:
    if layout == "channels_last" and cls is bnext.BatchNormAct1d:
        layout = "transposed"
    for activation in ACTIVATIONS:
        layer = cls(6, activation=activation, device=ops.device).train(training)
        x, residual = (lay_out(randn(*SHAPES[cls]), layout) for _ in range(2))
        copies = x.clone(), residual.clone()
        y = layer(x, residual)
        assert y.untyped_storage().data_ptr() not in (
            x.untyped_storage().data_ptr(),
            residual.untyped_storage().data_ptr(),
        )
        y.fill_(7.0)
        assert_same(x, copies[0], "input")
        assert_same(residual, copies[1], "residual")


@pytest.mark.parametrize("cls", ALL)
def test_an_empty_output_does_not_alias_its_input(cls: type) -> None:
    x = randn(0, *SHAPES[cls][1:])
    assert cls(6, device=ops.device).eval()(x) is not x


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("shape", "format"),
    [
        ((4, 6, 5, 7), torch.contiguous_format),
        ((4, 6, 5, 7), torch.channels_last),
        ((4, 6, 3, 5, 7), torch.contiguous_format),
        ((4, 6, 3, 5, 7), torch.channels_last_3d),
    ],
)
def test_output_and_grad_keep_the_memory_format(
    shape: tuple[int, ...], format: torch.memory_format, training: bool
) -> None:
    x = randn(*shape).contiguous(memory_format=format).requires_grad_()
    layer = ACT[len(shape) - 3](6, device=ops.device).train(training)
    y = layer(x, randn(*shape))  # a residual of another format does not decide
    assert y.is_contiguous(memory_format=format)
    y.backward(randn(*shape))
    assert x.grad.is_contiguous(memory_format=format)


def test_sequences_with_channels_innermost_stay_so() -> None:
    """A transposed (N, L, C) has no memory format of torch's, but is as common."""
    x = lay_out(randn(4, 6, 5), "channels_last").requires_grad_()
    y = bnext.BatchNormAct1d(6, device=ops.device)(x)
    assert y.stride() == x.stride() == (30, 1, 6)
    y.backward(randn(4, 6, 5))
    assert x.grad.stride() == x.stride()


def saved_bytes(layer: nn.Module, *inputs: Tensor) -> tuple[Tensor, int]:
    """The output, and the bytes saved for backward beyond inputs, output and parameters."""
    output, saved = kept_for_backward(layer, *inputs)
    assert saved, "nothing is kept"
    known = {t.untyped_storage().data_ptr() for t in (*inputs, output, *layer.parameters())}
    known |= {b.untyped_storage().data_ptr() for b in layer.buffers()}
    extra = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return output, sum(size for pointer, size in extra.items() if pointer not in known)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_vectors_of_channels_are_saved_for_backward(
    activation: str | None, residual: bool, training: bool
) -> None:
    """Beyond the input, the residual and the output, which live anyway: at most four vectors of
    (ghosts, channels) in float32, against 16 KiB of activations per channel here."""
    case = Case((16, 6, 16, 16))
    ghosts = 4
    layer = make_layer(
        case,
        training=training,
        act=True,
        activation=activation,
        ghost_batch_size=4,
        device=ops.device,
    )
    inputs = [case.input(ops.device).requires_grad_()]
    if residual:
        inputs.append(case.residual(ops.device).requires_grad_())
    _, extra = saved_bytes(layer, *inputs)
    vector = (ghosts if training else 1) * 6 * 4
    assert 3 * vector <= extra <= 4 * vector  # mean in two parts and invstd


def test_output_is_not_kept_alive_without_a_residual() -> None:
    """relu without a residual is recomputed from the input, so an in-place successor is free."""
    layer = make_layer(Case((16, 6, 16, 16)), act=True, activation="relu", device=ops.device)
    x = Case((16, 6, 16, 16)).input(ops.device).requires_grad_()
    y, kept = kept_for_backward(layer, x)
    pointers = [t.untyped_storage().data_ptr() for t in kept]
    assert x.untyped_storage().data_ptr() in pointers
    assert y.untyped_storage().data_ptr() not in pointers


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_changing_what_was_saved_is_noticed(activation: str) -> None:
    """In place, between forward and backward: an error, not a wrong gradient."""
    layer = make_layer(Case((4, 6, 5, 5)), act=True, activation=activation, device=ops.device)
    x, residual = (Case((4, 6, 5, 5), seed=s).input(ops.device).requires_grad_() for s in (0, 1))
    for changed in ("input", "weight", "needed for the sign of z"):
        copy, added = x.clone(), residual.clone()
        y = layer(copy, added)
        target = {"input": copy, "weight": layer.weight}.get(
            changed, y if activation == "relu" else added
        )
        with torch.no_grad():
            target.mul_(-1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_output_may_be_changed_in_place_without_a_residual() -> None:
    layer = make_layer(Case((4, 6, 5, 5)), act=True, activation="relu", device=ops.device)
    grads = []
    for scale in (lambda y: y * 2, lambda y: y.mul_(2)):
        x = Case((4, 6, 5, 5)).input(ops.device).requires_grad_()
        scale(layer(x)).square().sum().backward()
        grads.append(x.grad)
    assert_same(grads[1], grads[0])


def test_backward_in_eval_uses_the_statistics_of_its_forward() -> None:
    """A training step in between changes the running statistics, not the gradient."""
    case = Case((4, 6, 5, 5))
    layer = make_layer(case, training=False, device=ops.device)
    x = case.input(ops.device).requires_grad_()
    (want,) = torch.autograd.grad(layer(x), x, case.grad_output(ops.device))
    y = layer(x)
    layer.train()(case.input(ops.device) + 5)
    (have,) = torch.autograd.grad(y, x, case.grad_output(ops.device))
    assert_same(have, want)


def test_backward_twice() -> None:
    """retain_graph keeps what is needed; without it the second backward is an error."""
    case = Case((4, 6, 5, 5))
    x = case.input(ops.device).requires_grad_()
    y = make_layer(case, act=True, activation="silu", device=ops.device)(x)
    first = torch.autograd.grad(y, x, case.grad_output(ops.device), retain_graph=True)[0]
    assert_same(torch.autograd.grad(y, x, case.grad_output(ops.device))[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, case.grad_output(ops.device))


def test_updating_the_statistics_counts_as_a_change_in_place() -> None:
    """Who differentiates through a buffer is told that it was overwritten."""
    layer = bnext.BatchNorm1d(6, device=ops.device)
    factor = torch.ones(6, device=ops.device, requires_grad=True)
    losses = [factor * layer.running_mean, factor * layer.running_var]
    layer(randn(4, 6))
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()
    version = layer.running_mean._version
    layer.eval()(randn(4, 6))
    assert layer.running_mean._version == version
