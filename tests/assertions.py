"""How close is close enough: tolerances derived from the arithmetic, and what uses them.

A result is computed in the accumulation type (float for half, bfloat16 and float; double for
double) and rounded once to its own type. So its error has two parts:

* arithmetic: a few roundings of the accumulation type. They are relative to the size of what is
  added up, not to the result, which may be small by cancellation. That size is called the
  *magnitude* and is given by `oracle.py` element by element; it is |scale| * |x - mean| + |bias| +
  |residual| for an output, and holds no |mean|: an offset of the input must not cost accuracy.
* rounding: half a unit in the last place of the result, eps/2 * |expected|, or half the smallest
  subnormal number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Roundings on the way to one element of the output: x - mean (1), the low part of the mean (1),
# mean and variance themselves (2 + 2: block sums in the accumulation type, merges that are exact by
# comparison), sqrt and division (2), weight (1), bias (1), residual (1), activation (3: exp, sum,
# division). Each is at most eps/2, so 14 of them stay below 8 eps; the gradients have about as many
# again (two more sums, three more terms).
OUTPUT_EPS = 8.0
GRAD_EPS = 16.0

# A systematic error may take this part of the arithmetic tolerance. Not 0: one rounding of a
# channel's mean or scale is shared by all of its elements, and a test may have one channel only.
SYSTEMATIC_PART = 0.25

# Rounding errors are taken as uniform in +-tolerance: their mean over n elements has the standard
# deviation tolerance / sqrt(3 n). Five of those: one failure in two million honest comparisons.
SIGMAS = 5.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def arithmetic_tolerance(dtype: torch.dtype, magnitude: Tensor, eps_count: float) -> Tensor:
    return eps_count * torch.finfo(accumulation_dtype(dtype)).eps * magnitude


def rounding_tolerance(dtype: torch.dtype, expected: Tensor) -> Tensor:
    info = torch.finfo(dtype)
    return (info.eps / 2 * expected.abs()).clamp_min(info.smallest_normal * info.eps / 2)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor | float,
    *,
    eps_count: float = OUTPUT_EPS,
    name: str = "result",
) -> None:
    """`actual` is `expected` (float64) up to the tolerances above, element by element *and* on
    average: errors that all point one way (up or down, or towards 0) are found even where each of
    them is small enough."""
    assert expected.dtype == torch.float64, "the oracle works in float64"
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    actual64 = actual.detach().double().cpu().reshape(-1)
    expected = expected.detach().cpu().reshape(-1)
    if not expected.numel():
        return
    size = torch.as_tensor(magnitude, dtype=torch.float64).detach().cpu()
    size = size.expand_as(expected) if size.dim() == 0 else size.reshape(-1)
    assert expected.isfinite().all(), f"{name}: the oracle itself is not finite"
    assert actual64.isfinite().all(), f"{name}: {(~actual64.isfinite()).sum()} not finite"

    arithmetic = arithmetic_tolerance(actual.dtype, size, eps_count)
    rounding = rounding_tolerance(actual.dtype, expected)
    error = actual64 - expected
    ratio = error.abs() / (arithmetic + rounding)
    worst = int(ratio.argmax())
    assert ratio[worst] <= 1, (
        f"{name} ({actual.dtype}): element {worst} is {actual64[worst]:.9g}, expected "
        f"{expected[worst]:.9g}; off by {error[worst]:.3g}, {ratio[worst]:.3g} of the tolerance"
    )
    # Equal elements (an expanded tensor) err together: they count once.
    independent = expected.unique().numel()
    noise = SIGMAS * math.sqrt(rounding.square().mean().item() / (3 * independent))
    limit = SYSTEMATIC_PART * arithmetic.mean().item() + noise
    for direction, signed in (("up or down", error), ("in size", error * expected.sign())):
        bias = signed.mean().item()
        assert abs(bias) <= limit, (
            f"{name} ({actual.dtype}): {bias:.3g} off on average ({direction}), limit {limit:.3g}; "
            "each element is within its tolerance, but the errors have a common sign"
        )


def assert_same(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Bitwise equality (NaN equals NaN)."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} elements differ"
