"""Statistics, outputs and gradients of inputs with a large offset, in every layout.

The truth is computed in float64 from the float32 (or half) input actually fed, by the definition:
mean first, then the mean square of the centred input. Channels come first in `truth`, so that no
layout of torch's own kernels matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_same
from cases import Case, Mode, lay_out
from layers import make_layer
from oracle import assert_matches_torch
from torch import Tensor

import bnext

SHAPES = ((64, 4, 224, 224), (32, 64, 56, 56), (4, 8, 32, 56, 56), (4096, 16), (200_000, 3))
MEANS = (0.0, 1e2, 1e3, 1e4, 1e6)
EPS = 1e-5

# What is asked for: running_var relative to the truth, and outputs absolute (up to mean 1e4).
# Half a last place of a float32 is 6e-8, so there is room for 16 roundings of the variance; at 1e6
# the float32 input itself has steps of 1/16, but the truth is that of the input fed.
VARIANCE_TOLERANCE = {0.0: 1e-6, 1e2: 1e-6, 1e3: 1e-6, 1e4: 1e-6, 1e6: 1e-5}
OUTPUT_TOLERANCE = 1e-5


@dataclass
class Truth:
    """An input (float32, contiguous) with its float64 statistics and output."""

    input: Tensor
    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    output: Tensor  # [C, N * S], float64

    @property
    def unbiased_var(self) -> Tensor:
        n = self.output.shape[1]
        return self.var * (n / (n - 1))


def channels_first(x: Tensor) -> Tensor:
    """(N, C, *) as (C, N * S) in float64."""
    return x.transpose(0, 1).reshape(x.shape[1], -1).double()


def truth(input: Tensor) -> Truth:
    x = channels_first(input)
    mean = x.mean(1)
    mean += (x - mean[:, None]).mean(1)  # one correction: the sum above rounds at mean * eps
    centred = x - mean[:, None]
    var = centred.square().mean(1)
    return Truth(input, mean, var, centred.mul_((var + EPS).rsqrt()[:, None]))


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


_last: dict[object, Truth] = {}


def offset_input(shape: tuple[int, ...], mean: float) -> Truth:
    """The last truth is kept: the tests below run layout by layout over one input."""
    if (shape, mean) not in _last:
        _last.clear()
        _last[shape, mean] = truth(noise(shape) + mean)
    return _last[shape, mean]


def layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    return (
        ("contiguous", "transposed", "offset")
        if len(shape) == 2
        else ("contiguous", "channels_last")
    )


def train_forward(x: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output, running_mean and running_var of a step with momentum 1: the batch's statistics."""
    channels = x.shape[1]
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    output = bnext.batch_norm(x.to(device), mean, var, training=True, momentum=1.0, eps=EPS)
    return output.cpu(), mean.cpu(), var.cpu()


def largest_error(actual: Tensor, expected: Tensor) -> float:
    return float((channels_first(actual) - expected).abs_().max())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual.double() - expected) / expected).abs().max())


@pytest.mark.parametrize(
    ("shape", "mean", "layout"),
    [(s, m, x) for s in SHAPES for m in MEANS for x in layouts(s)],
    ids=str,
)
def test_offset(shape: tuple[int, ...], mean: float, layout: str, set_threads, device: str) -> None:
    want = offset_input(shape, mean)
    x = lay_out(want.input, layout)
    set_threads(1)
    output, running_mean, running_var = train_forward(x, device)
    set_threads(2)
    for again, before in zip(
        train_forward(x, device), (output, running_mean, running_var), strict=True
    ):
        assert_same(again, before, "with two threads")  # so the checks below hold for both

    assert relative_error(running_var, want.unbiased_var) <= VARIANCE_TOLERANCE[mean]
    # running_mean is a float32: half a last place of it, or of the noise's own mean (std 1).
    half_ulp = torch.finfo(torch.float32).eps / 2
    assert ((running_mean - want.mean).abs() <= 2 * half_ulp * want.mean.abs().clamp_min(1)).all()
    if mean <= 1e4:
        assert largest_error(output, want.output) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("outlier", [1e4, 1e6, -1e6])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [(s, x) for s in ((16, 4, 56, 56), (2, 8, 8, 14, 14), *SHAPES[3:]) for x in layouts(s)],
    ids=str,
)
def test_outlier_as_first_element(
    shape: tuple[int, ...], layout: str, outlier: float, set_threads, device: str
) -> None:
    """A pivot taken from the first element would be the worst one here."""
    x = noise(shape) + 1
    x[(0, slice(None), *[0] * (len(shape) - 2))] = outlier
    want = truth(x)
    for threads in (1, 2):
        set_threads(threads)
        output, _, running_var = train_forward(lay_out(x, layout), device)
        assert relative_error(running_var, want.unbiased_var) <= 1e-6
        # The outlier's own output is about sqrt(n), up to 450: 1e-5 is asked of outputs of size 1.
        scale = want.output.abs().clamp_min(1)
        assert ((channels_first(output) - want.output).abs() <= OUTPUT_TOLERANCE * scale).all()


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [(s, x) for s in ((16, 4, 112, 112), (2, 8, 8, 28, 28), *SHAPES[3:]) for x in layouts(s)],
    ids=str,
)
def test_half_types(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, mean: float, device: str
) -> None:
    """The steps of a half type are coarse (8 at 1e3 in bfloat16), but exact statistics of the
    values fed are asked for: spread 20 keeps the channel from being constant."""
    x = (noise(shape) * 20 + mean).to(dtype)
    want = truth(x)
    output, _, running_var = train_forward(lay_out(x, layout), device)
    assert output.dtype == dtype
    assert relative_error(running_var, want.unbiased_var) <= 1e-6
    half_ulp = torch.finfo(dtype).eps / 2 * want.output.abs()
    assert ((channels_first(output) - want.output).abs() <= OUTPUT_TOLERANCE + half_ulp).all()


def test_tiny_spread_on_a_large_offset(device: str) -> None:
    """Values that differ by one step of float32 only: the differences are exact, so is the rest."""
    x = torch.full((64, 8, 6, 6), 4096.0)
    x[::2] += 2**-11
    want = truth(x)
    for layout in layouts(tuple(x.shape)):
        output, _, running_var = train_forward(lay_out(x, layout), device)
        assert relative_error(running_var, want.unbiased_var) <= 1e-6
        assert largest_error(output, want.output) <= OUTPUT_TOLERANCE


FAR = 1e12  # steps of float64 are 1.2e-4 here
# The worst case of docs/math.md, section 5, for doubles: 3 (h + 1) u (1 + n / k) with h = 32.
DOUBLE_TOLERANCE = 3 * 33 * 9 * torch.finfo(torch.float64).eps / 2


@pytest.mark.parametrize("ghosts", [1, 3], ids="{}_ghosts".format)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (s, x)
        for s in ((16, 4, 56, 56), (2, 8, 8, 14, 14), (9, 5, 3, 3), *SHAPES[3:])
        for x in (*layouts(s), "sliced")
    ],
    ids=str,
)
def test_doubles_far_from_zero(
    shape: tuple[int, ...], layout: str, ghosts: int, set_threads, device: str
) -> None:
    """A mean rounded to a double would leave four digits of the variance: NIST's NumAcc4, further
    out. The differences from FAR are exact, so the truth is that of x - FAR."""
    values = torch.where(noise(shape) > 0, 0.2, 0.4).double()
    if ghosts > 1:  # a ghost close to zero has digits that one far from it has not
        ghost_size = -(-shape[0] // ghosts)
        values[:ghost_size] -= FAR
    x = values + FAR
    pieces = x.tensor_split(ghosts)
    near = [truth(piece - (FAR if piece.mean() > FAR / 2 else 0)) for piece in pieces]
    batch = truth(x - FAR) if ghosts == 1 else truth(x)
    channels = shape[1]
    for threads in (1, 2):
        set_threads(threads)
        mean, var = torch.zeros(2, channels, dtype=torch.float64, device=device).unbind()
        output = bnext.batch_norm(
            lay_out(x, layout).to(device), mean, var, training=True, momentum=1.0, eps=EPS,
            ghost_batch_size=ghost_size if ghosts > 1 else None,
        )  # fmt: skip
        for piece, want in zip(output.cpu().tensor_split(ghosts), near, strict=True):
            error = (channels_first(piece) - want.output).abs()
            assert (error <= DOUBLE_TOLERANCE * want.output.abs().clamp_min(1)).all()
        assert relative_error(var.cpu(), batch.unbiased_var) <= DOUBLE_TOLERANCE
        far_mean = batch.mean + (FAR if ghosts == 1 else 0)
        assert relative_error(mean.cpu(), far_mean) <= 4 * torch.finfo(torch.float64).eps


def test_doubles_far_from_zero_have_right_gradients(device: str) -> None:
    """Backward gets the low part of the mean as well: without it, the mean is off by up to 6e-5,
    and so are gradients of size 1."""
    shape = (64, 5, 7, 7)
    near = Case(shape, dtype=torch.float64, param_dtype=torch.float64).input()
    near = (near * 4096).round() / 4096  # the same steps as FAR has, or coarser
    weight = torch.linspace(0.5, 1.5, 5, dtype=torch.float64, device=device)
    grad_output = noise(shape).double().to(device)
    for layout in layouts(shape):
        found, expected = (
            gradients(lay_out(x, layout).to(device), weight, grad_output, bnext.batch_norm)
            for x in (near + FAR, near)
        )
        for name, a, b in zip(("input", "weight", "bias"), found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e4 + 0.1, 1e6 + 0.3])
@pytest.mark.parametrize("shape", [(1000, 3), (7, 5, 13, 11)], ids=str)
def test_constant_input_has_variance_zero(
    shape: tuple[int, ...], value: float, device: str
) -> None:
    """invstd is 1 / sqrt(eps) = 316 here: one float32 rounding of the mean would show, 1e6 times
    6e-8 times 316 = 19, so the outputs see whether the low part of the mean is used."""
    x = torch.full(shape, value)
    for layout in layouts(shape):
        output, running_mean, running_var = train_forward(lay_out(x, layout), device)
        assert (running_mean == x.flatten()[0]).all()
        assert (running_var <= (torch.finfo(torch.float32).eps * value) ** 2).all()
        assert (output.abs() <= OUTPUT_TOLERANCE).all()


@pytest.mark.parametrize("mean", [1e2, 1e4])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [(s, x) for s in ((200, 13), (4, 13, 7, 7), (2, 64, 3, 5, 5)) for x in layouts(s)],
    ids=str,
)
def test_step_with_an_offset(
    shape: tuple[int, ...], layout: str, training: bool, mean: float
) -> None:
    """The tolerances hold no |mean|. A mean rounded to float32 is off by up to 5e-4 at 1e4: so
    these are tests of its low part, in the output, and in what backward gets of it."""
    case = Case(shape, layout, mean=mean)
    for activation in (None, "silu"):
        layer = make_layer(case, training=training, activation=activation, act=True)
        assert_matches_torch(layer, case, Mode(), activation=activation)
    if training:
        layer = make_layer(case, ghost_batch_size=shape[0] // 2)
        assert_matches_torch(layer, case, Mode(), ghost_batch_size=shape[0] // 2)


def gradients(x: Tensor, weight: Tensor, grad_output: Tensor, norm) -> list[Tensor]:
    x = x.detach().requires_grad_()
    weight = weight.clone().requires_grad_()
    bias = torch.zeros_like(weight).requires_grad_()
    y = norm(x, None, None, weight, bias, True, 0.1, EPS)
    return list(torch.autograd.grad(y, (x, weight, bias), grad_output))


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("shape", [(8, 16, 56, 56), (2, 8, 8, 28, 28), (4096, 16), (50_000, 3)])
def test_gradients_no_worse_than_contiguous_eager(shape: tuple[int, ...], mean: float) -> None:
    """In every layout, by the root mean square of the error against float64. Eager gets the layout
    that its kernels are right in: channels as planes, (1, C, N * S)."""
    want = truth(noise(shape) + mean)
    channels = shape[1]
    weight = torch.linspace(0.5, 1.5, channels)
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.25

    dy, xhat = channels_first(grad_output), want.output
    scale = (weight.double() * (want.var + EPS).rsqrt())[:, None]
    dweight = (dy * xhat).sum(1)
    inner = dy - dy.mean(1, keepdim=True) - xhat * dweight[:, None] / dy.shape[1]
    expected = [(scale * inner), dweight, dy.sum(1)]

    def errors(grads: list[Tensor]) -> list[float]:
        found = [channels_first(grads[0]), *[g.double() for g in grads[1:]]]
        return [float((a - b).square().mean().sqrt()) for a, b in zip(found, expected, strict=True)]

    planes = channels_first(want.input).float()[None]
    eager = gradients(planes, weight, channels_first(grad_output).float()[None], F.batch_norm)
    theirs = errors([eager[0].view(channels, *planes.shape[2:]).transpose(0, 1), *eager[1:]])
    # Below one rounding of the result (relative eps) the comparison is one of luck. So is that of
    # two root mean squares of n errors, which scatter by 1 / sqrt(n): three of those are allowed
    # (nothing for grad_input, a factor of 1.75 for 16 channels).
    eps = torch.finfo(torch.float32).eps
    sizes = [b.numel() for b in expected]
    floor = [eps * float(b.square().mean().sqrt()) for b in expected]
    for layout in layouts(shape):
        x, g = lay_out(want.input, layout), lay_out(grad_output, layout)
        ours = errors(gradients(x, weight, g, bnext.batch_norm))
        names = ("input", "weight", "bias")
        for name, a, b, least, n in zip(names, ours, theirs, floor, sizes, strict=True):
            luck = 1 + 3 / math.sqrt(n)
            assert a <= max(b * luck, least), f"{layout}, {name}: {a:.3g}; eager {b:.3g}"
