"""Outputs, gradients and buffers against nn.BatchNorm1d/2d/3d in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_close, assert_same
from cases import ACTIVATIONS, CASES, DTYPES, FEW_CASES, FEW_SHAPES, KINDS, MODES, Case, Mode
from layers import make_layer
from oracle import activate, assert_matches_torch
from torch import nn

import bnext

by_training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@by_training
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case: Case, training: bool, device: str) -> None:
    layer = make_layer(case, training=training, device=device)
    assert_matches_torch(layer, case, Mode(), device=device)


@by_training
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    ("case", "activation"),
    [(case, kind) for case in FEW_CASES for kind in KINDS]
    + [(case, a) for case in FEW_CASES[::7] for a in ACTIVATIONS if a not in KINDS],
    ids=str,
)
def test_activation_and_residual(
    case: Case, activation: str | None, with_residual: bool, training: bool, device: str
) -> None:
    layer = make_layer(case, training=training, activation=activation, act=True, device=device)
    assert_matches_torch(
        layer, case, Mode(), activation=activation, with_residual=with_residual, device=device
    )


@by_training
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3], DTYPES[4]], ids=str)
def test_modes(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    mode: Mode,
    activation: str | None,
    training: bool,
    device: str,
) -> None:
    """Three steps in a row: the cumulative average changes its weight at every step."""
    layer = make_layer(
        Case(shape).with_dtypes(*dtypes),
        mode,
        training=training,
        activation=activation,
        act=activation is not None,
        device=device,
    )
    for step in range(3):
        case = Case(shape, mean=0.5 - step, seed=step).with_dtypes(*dtypes)
        assert_matches_torch(layer, case, mode, activation=activation, device=device)


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_layer_without_statistics_normalises_by_the_batch_in_eval(shape, device) -> None:
    mode = Mode(track_running_stats=False)
    case = Case(shape)
    layer = make_layer(case, mode, device=device)
    trained = layer(case.input(device))
    assert_same(layer.eval()(case.input(device)), trained)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("shape", [*FEW_SHAPES, (2, 3, 2, 2, 2, 3)], ids=str)
def test_functional(shape: tuple[int, ...], running: bool, device: str) -> None:
    """F.batch_norm's argument order; any rank from 2; training without running buffers."""
    case = Case(shape).with_dtypes(torch.float64)
    values = case.parameters(device)
    names = ("running_mean", "running_var", "weight", "bias")
    ours = [values[n].clone() if running or "running" not in n else None for n in names]
    # On the CPU: cuDNN takes no input of six dimensions.
    theirs = [None if v is None else v.cpu().clone() for v in ours]
    x = case.input(device)
    have = bnext.batch_norm(x, *ours, True, 0.3, 1e-3)
    want = F.batch_norm(x.cpu(), *theirs, True, 0.3, 1e-3)
    assert_close(have, want, 10.0)
    for name, a, b in zip(names[: 2 * running], ours, theirs, strict=False):
        assert_close(a, b, 10.0, name=name)


@by_training
@pytest.mark.parametrize(
    "shape", [(0, 5), (0, 5, 4), (0, 5, 2, 3), (3, 5, 0), (2, 5, 0, 3)], ids=str
)
def test_empty_batch(shape: tuple[int, ...], training: bool, device: str) -> None:
    """An empty batch passes through; its gradients are zeros and the statistics stay."""
    layer = make_layer(Case((2, 5, *shape[2:])), training=training, device=device)
    theirs = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](5).to(device)
    theirs.load_state_dict(layer.state_dict())
    theirs.train(training)
    for module in (layer, theirs):
        x = torch.empty(shape, device=device, requires_grad=True)
        output = module(x)
        assert output.shape == x.shape
        output.sum().backward()
        assert x.grad.shape == x.shape
    for name, p in theirs.named_parameters():
        assert_same(layer.get_parameter(name).grad, p.grad, name)
    for name, b in theirs.named_buffers():
        assert_same(layer.get_buffer(name), b, name)


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("needed", ["input", "weight", "bias", "residual"])
@by_training
def test_one_gradient_alone(
    needed: str, activation: str | None, training: bool, device: str
) -> None:
    """What is asked for does not depend on what else is asked for."""
    case = Case((4, 13, 7, 7))
    layer = make_layer(case, training=training, activation=activation, act=True, device=device)
    before = {k: v.clone() for k, v in layer.state_dict().items()}

    def grads(only: str | None) -> dict[str, torch.Tensor]:
        layer.load_state_dict(before)
        tensors = {
            "input": case.input(device),
            "residual": case.residual(device),
            "weight": layer.weight,
            "bias": layer.bias,
        }
        for name, tensor in tensors.items():
            tensor.requires_grad_(only in (None, name))
        output = layer(tensors["input"], tensors["residual"])
        wanted = [t for n, t in tensors.items() if only in (None, n)]
        names = [n for n in tensors if only in (None, n)]
        found = torch.autograd.grad(output, wanted, case.grad_output(device))
        return dict(zip(names, found, strict=True))

    assert_same(grads(needed)[needed], grads(None)[needed], needed)


@by_training
def test_grad_output_in_any_layout(training: bool, device: str) -> None:
    """An expanded (sum().backward()), transposed or channels_last gradient is the same gradient."""
    case = Case((4, 13, 7, 7))
    layer = make_layer(case, training=training, device=device)
    before = {k: v.clone() for k, v in layer.state_dict().items()}

    def grad(grad_output: torch.Tensor) -> torch.Tensor:
        layer.load_state_dict(before)
        x = case.input(device).requires_grad_()
        layer(x).backward(grad_output)
        return x.grad

    g = case.grad_output(device)
    views = {
        "channels_last": g.contiguous(memory_format=torch.channels_last),
        "transposed": g.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, view in views.items():
        assert_same(grad(view), grad(g), name)
    one = torch.ones((), device=device)
    assert_same(grad(one.expand(g.shape)), grad(torch.ones_like(g)), "expanded")


def test_no_grad_and_inference_mode_give_the_same_output(device: str) -> None:
    case = Case((4, 13, 7, 7))
    x = case.input(device)
    outputs = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        layer = make_layer(case, activation="relu", act=True, device=device)
        with context():
            outputs.append(layer(x).detach().clone())
    assert_same(outputs[1], outputs[0])
    assert_same(outputs[2], outputs[0])


@by_training
def test_parameters_and_buffers_of_any_strides(training: bool, device: str) -> None:
    """Columns of a matrix: read and updated where they are, and nothing beside them."""
    case = Case((4, 13, 7, 7))
    dense = case.parameters(device)
    matrix = torch.full((13, 2 * len(dense)), 7.0, device=device)
    strided = {}
    for i, (name, values) in enumerate(dense.items()):
        strided[name] = matrix[:, 2 * i].copy_(values)
    x = case.input(device)
    have = bnext.batch_norm(x, **strided, training=training)
    assert_same(have, bnext.batch_norm(x, **dense, training=training))
    for name, values in dense.items():
        assert_same(strided[name], values, name)
    assert (matrix[:, 1::2] == 7.0).all()


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_derivative_at_zero_is_that_of_torch(
    activation: str, with_residual: bool, device: str
) -> None:
    """z is exactly 0 everywhere: the kink takes the derivative of the left, as in torch."""
    x = torch.full((4, 3, 5), 2.0, device=device)
    zeros, ones = torch.zeros(3, device=device), torch.ones(3, device=device)
    grads = []
    for fused in (True, False):
        bias = zeros.clone().requires_grad_()
        if fused:
            residual = torch.zeros_like(x) if with_residual else None
            y = bnext.batch_norm(
                x, zeros + 2, ones, None, bias, activation=activation, residual=residual
            )
        else:
            y = activate(F.batch_norm(x, zeros + 2, ones, None, bias), activation)
        grads.append(torch.autograd.grad(y.sum(), bias)[0])
    torch.testing.assert_close(*grads)


def test_output_beyond_float16_is_infinite(device: str) -> None:
    x = Case((64, 13), dtype=torch.float16, mean=0.0).input(device)
    weight = torch.full((13,), 6e4, dtype=torch.float16, device=device)
    have = bnext.batch_norm(x, None, None, weight, training=True)
    want = F.batch_norm(x.double(), None, None, weight.double(), training=True).half()
    assert torch.equal(have.isinf(), want.isinf()) and want.isinf().any()


def test_silu_of_large_values_has_finite_gradients(device: str) -> None:
    """exp overflows far from 0; silu and its derivative do not."""
    case = Case((64, 13))
    x = case.input(device).requires_grad_()
    weight = torch.full((13,), 1e4, device=device, requires_grad=True)
    y = bnext.batch_norm(x, None, None, weight, training=True, activation="silu")
    want = F.silu(F.batch_norm(x.double(), None, None, weight.double(), training=True))
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-2)  # 8 eps of z, up to 4e4
    for grad in torch.autograd.grad(y.sum(), (x, weight)):
        assert grad.isfinite().all()
