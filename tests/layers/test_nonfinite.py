"""NaN and infinities go where F.batch_norm and relu let them go, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_same
from cases import ACTIVATIONS, Case, lay_out
from oracle import activate
from torch import Tensor

import bnext

NAN, INF = math.nan, math.inf
# What is put into channel 1 (of 13): at the first element, at the last, both.
PATTERNS = {
    "nan_first": (NAN, None),
    "nan_last": (None, NAN),
    "inf": (INF, None),
    "minus_inf": (None, -INF),
    "both_inf": (INF, -INF),
    "nan_and_inf": (INF, NAN),
}
SHAPES = ((40, 13), (4, 13, 6, 7), (3, 13, 40, 40))
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

by_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_pattern = pytest.mark.parametrize("pattern", PATTERNS)
by_training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def poisoned(
    shape: tuple[int, ...], layout: str, pattern: str, dtype: torch.dtype, device: str
) -> Tensor:
    x = Case(shape).input(device).to(dtype)
    channel = x.transpose(0, 1)[1]
    first, last = PATTERNS[pattern]
    if first is not None:
        channel[(0,) * channel.dim()] = first
    if last is not None:
        channel[(-1,) * channel.dim()] = last
    return lay_out(x, layout if len(shape) > 2 or layout == "contiguous" else "transposed")


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double().contiguous()


def same_pattern(actual: Tensor, expected: Tensor) -> None:
    """NaN where NaN, the same infinities, and close elsewhere (how close is tested elsewhere)."""
    tolerance = 4 * torch.finfo(actual.dtype).eps
    # 1e-14: what torch is compared with is itself off by up to 7e-15 in float64 (measured against
    # 80-bit numbers, (3, 13, 40, 40), 2026-11), where bnext is off by 1e-15.
    atol = max(4 * tolerance, 1e-14)
    torch.testing.assert_close(
        actual.cpu(), expected.to("cpu", actual.dtype), rtol=tolerance, atol=atol, equal_nan=True
    )


@by_layout
@by_shape
@by_pattern
@by_training
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_outputs_and_buffers_as_torch(
    shape: tuple[int, ...],
    layout: str,
    pattern: str,
    dtype: torch.dtype,
    training: bool,
    device: str,
) -> None:
    x = poisoned(shape, layout, pattern, dtype, device)
    case = Case(shape, param_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ours = case.parameters(device)
    # torch's CUDA kernels may make other values of infinities: the oracle is on the CPU.
    theirs = {k: on_cpu(v) for k, v in ours.items()}
    have = bnext.batch_norm(x, **ours, training=training, activation="relu")
    want = F.relu(F.batch_norm(on_cpu(x), **theirs, training=training))
    same_pattern(have, want)
    if training:
        assert have[:, 1].isnan().all(), "relu(NaN) is NaN"
    for name in ("running_mean", "running_var"):
        same_pattern(ours[name], theirs[name])


@by_layout
@by_shape
@by_pattern
def test_other_channels_are_untouched(
    shape: tuple[int, ...], layout: str, pattern: str, device: str
) -> None:
    x = poisoned(shape, layout, pattern, torch.float32, device)
    clean = x.clone()
    clean[:, 1] = 0.5
    others = [c for c in range(13) if c != 1]
    results = []
    for value in (x, clean):
        tensors = Case(shape).parameters(device)
        value = value.requires_grad_()
        y = bnext.batch_norm(value, **tensors, training=True, activation="relu")
        (grad,) = torch.autograd.grad(y, value, torch.ones_like(y))
        results.append((y[:, others], grad[:, others], tensors["running_var"][others]))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


@by_shape
@by_layout
def test_a_poisoned_sample_stays_in_its_ghost(
    shape: tuple[int, ...], layout: str, device: str
) -> None:
    x = poisoned(shape, layout, "nan_first", torch.float32, device)
    y = bnext.batch_norm(x, None, None, training=True, ghost_batch_size=len(x) // 2)
    ghosts = y.tensor_split(-(-len(x) // (len(x) // 2)))
    assert ghosts[0][:, 1].isnan().all()
    for ghost in ghosts[1:]:
        assert ghost.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@by_layout
def test_activation_of_a_value_that_is_not_finite(
    layout: str, value: float, activation: str, device: str
) -> None:
    """In eval only the element itself: relu(-inf) = 0, silu(-inf) = NaN or -0 as in torch.silu."""
    case = Case((4, 13, 6, 7), layout)
    x = case.input(device)
    x[1, 2, 3, 4] = value
    tensors = case.parameters(device)
    have = bnext.batch_norm(x, **tensors, activation=activation)
    z = F.batch_norm(on_cpu(x), **{k: on_cpu(v) for k, v in tensors.items()})
    want = activate(z, activation)
    same_pattern(have, want)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@by_layout
def test_residual_that_is_not_finite(
    layout: str, activation: str, value: float, device: str
) -> None:
    case = Case((4, 13, 6, 7), layout)
    tensors = case.parameters(device)
    residual = case.residual(device)
    residual[1, 2, 3, 4] = value
    have = bnext.batch_norm(
        case.input(device), **tensors, residual=residual, activation=activation, training=False
    )
    z = F.batch_norm(on_cpu(case.input(device)), **{k: on_cpu(v) for k, v in tensors.items()})
    want = activate(z + on_cpu(residual), activation)
    same_pattern(have, want)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("poison", ["input", "grad_output"])
@by_shape
@by_layout
def test_gradients_in_eval(
    layout: str, shape: tuple[int, ...], poison: str, activation: str | None, device: str
) -> None:
    """Frozen statistics: a bad element reaches its own gradient, and those of weight and bias of
    its channel, as in torch."""
    clean = Case(shape, layout if len(shape) > 2 else "contiguous")
    bad = poisoned(shape, layout, "nan_first", torch.float32, device)
    x = bad if poison == "input" else clean.input(device)
    g = bad if poison == "grad_output" else clean.grad_output(device)

    def gradients(norm, cast) -> list[Tensor]:
        tensors = {k: cast(v) for k, v in clean.parameters(device).items()}
        wanted = [cast(x).detach(), tensors["weight"], tensors["bias"]]
        for tensor in wanted:
            tensor.requires_grad_()
        y = norm(wanted[0], **tensors)
        return [grad.cpu() for grad in torch.autograd.grad(y, wanted, cast(g))]

    def theirs(*args, **kwargs) -> Tensor:
        y = F.batch_norm(*args, **kwargs)
        return {None: lambda v: v, "relu": F.relu, "leaky_relu": F.leaky_relu}[activation](y)

    def ours(*args, **kwargs) -> Tensor:
        return bnext.batch_norm(*args, **kwargs, activation=activation)

    have = gradients(ours, lambda t: t.clone())
    want = gradients(theirs, on_cpu)
    for name, a, b in zip(("input", "weight", "bias"), have, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
    assert have[0].isnan().sum() <= 1


@by_layout
def test_values_near_the_largest_float16_do_not_overflow(layout: str, device: str) -> None:
    """Sums and squares are taken in float32: 6e4 squared is no float16."""
    case = Case((64, 13, 5, 5), layout, dtype=torch.float16, mean=0.0, std=1.5e4)
    x = case.input(device).clamp(-6e4, 6e4)
    running_var = torch.ones(13, device=device)
    y = bnext.batch_norm(
        x, torch.zeros(13, device=device), running_var, training=True, momentum=1.0
    )
    want = x.double().transpose(0, 1).reshape(13, -1).var(1)
    torch.testing.assert_close(running_var.double(), want, rtol=1e-6, atol=0)
    assert y.isfinite().all()


@by_layout
@by_shape
@pytest.mark.parametrize("size", [1e155, 1e200, 1e300])
def test_squares_that_overflow_leave_outputs_finite(
    layout: str, shape: tuple[int, ...], size: float, device: str
) -> None:
    """The variance is infinite and its inverse 0, as in torch; the mean is what it is."""
    case = Case(shape, layout if len(shape) > 2 else "contiguous", dtype=torch.float64, mean=0.1)
    x = case.input(device) * size
    x[0, 0], x[-1, 0] = size, -size
    for ghost_batch_size in (None, 2):
        mean, var = torch.zeros(2, 13, dtype=torch.float64, device=device).unbind()
        y = bnext.batch_norm(
            x, mean, var, training=True, momentum=1.0, ghost_batch_size=ghost_batch_size
        )
        # Two values of a ghost at 1e155 may be so close that their squares do not overflow.
        assert y.isfinite().all() if ghost_batch_size else (y == 0).all()
        assert (var == math.inf).all()
        torch.testing.assert_close(mean / size, x.transpose(0, 1).flatten(1).mean(1) / size)
