"""The assertions themselves: they accept honest rounding and find small, shared errors."""

from __future__ import annotations

import pytest
import torch
from assertions import OUTPUT_EPS, assert_close, assert_same
from cases import CASES, FEW_CASES, SHAPES, Case, lay_out, layouts_of
from conftest import cuda_missing
from oracle import away_from_kink

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]


def exact(n: int = 4096) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_rounding_is_accepted(dtype: torch.dtype) -> None:
    assert_close(exact().to(dtype), exact(), exact().abs())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_wrong_element_is_found(dtype: torch.dtype) -> None:
    wrong = exact().to(dtype)
    wrong[7] += 16 * OUTPUT_EPS * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"element 7 .* of the tolerance"):
        assert_close(wrong, exact(), exact().abs())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_truncation_instead_of_rounding_is_found(dtype: torch.dtype) -> None:
    rounded = exact().to(dtype).double()
    ulp = exact().abs().log2().floor().exp2() * torch.finfo(dtype).eps
    truncated = torch.where(rounded.abs() > exact().abs(), rounded - ulp * exact().sign(), rounded)
    with pytest.raises(AssertionError, match="of the tolerance"):
        assert_close(truncated.to(dtype), exact(), exact().abs())


@pytest.mark.parametrize("direction", ["up or down", "in size"])
def test_systematic_error_within_the_tolerance_is_found(direction: str) -> None:
    """Half of the tolerance everywhere, in the same direction: no element fails on its own."""
    half = 0.5 * OUTPUT_EPS * torch.finfo(torch.float32).eps
    wrong = exact() + half if direction == "up or down" else exact() * (1 + half)
    with pytest.raises(AssertionError, match=f"on average \\({direction}"):
        assert_close(wrong.float(), exact(), exact().abs() if direction == "in size" else 1.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_tenth_of_a_last_place_is_found_in_half_types(dtype: torch.dtype) -> None:
    """An arithmetic in the half type, or a scale rounded to it, shifts the rounding errors."""
    info = torch.finfo(dtype)
    wrong = (exact(65536) * (1 + info.eps / 10)).to(dtype).double()
    rounded = exact(65536).to(dtype)
    assert_close(rounded, exact(65536), exact(65536).abs())
    with pytest.raises(AssertionError):
        assert_close(wrong.to(dtype), exact(65536), exact(65536).abs())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_found(value: float) -> None:
    wrong = exact().float()
    wrong[3] = value
    with pytest.raises(AssertionError, match="1 not finite"):
        assert_close(wrong, exact(), 1e30)


def test_wrong_shape_is_found() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(3, 1), torch.zeros(3, dtype=torch.float64), 1.0)


def test_assert_same_is_bitwise_but_for_nan() -> None:
    nan = float("nan")
    assert_same(torch.tensor([1.0, nan]), torch.tensor([1.0, nan]))
    with pytest.raises(AssertionError, match="1 of 2 elements"):
        assert_same(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002]))
    with pytest.raises(AssertionError):
        assert_same(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))


def test_kink_is_masked_only_where_the_sign_is_uncertain() -> None:
    z = torch.tensor([0.0, 1e-7, -1e-7, 1e-3, -1e-3], dtype=torch.float64)
    g = torch.ones(5)
    masked = away_from_kink(g, z, torch.ones(5, dtype=torch.float64), "relu")
    assert masked.tolist() == [0, 0, 0, 1, 1]
    assert away_from_kink(g, z, torch.ones(5, dtype=torch.float64), "silu") is g


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 3, 5), (4, 6, 3, 5, 2)], ids=str)
def test_layouts_hold_the_same_values_under_other_strides(shape: tuple[int, ...]) -> None:
    values = torch.arange(float(torch.Size(shape).numel())).view(shape)
    strides = set()
    for layout in layouts_of(shape):
        x = lay_out(values, layout)
        strides.add((x.stride(), x.storage_offset()))
        assert torch.equal(x, values) or layout == "expanded"
    assert len(strides) == len(layouts_of(shape)), "two layouts are one"
    if len(shape) in (4, 5):
        format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        assert lay_out(values, "channels_last").is_contiguous(memory_format=format)


def test_cases_are_distinct_and_every_shape_is_used() -> None:
    for cases in (CASES, FEW_CASES):
        assert len({str(c) for c in cases}) == len(cases)
    assert {c.shape for c in CASES} == set(SHAPES)
    assert torch.equal(Case((3, 4)).input(), Case((3, 4)).input())
    assert not torch.equal(Case((3, 4)).input(), Case((3, 4), seed=1).input())


def test_cuda_was_tested() -> None:
    """Skipped, with the reason, where the suite runs on the CPU only."""
    if missing := cuda_missing():
        pytest.skip(missing)
    assert torch.zeros(1, device="cuda").is_cuda
