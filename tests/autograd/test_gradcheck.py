"""Every derivative against finite differences, in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from autograd_cases import GHOST, Case, all_cases
from cases import LAYOUTS, lay_out, layouts_of
from op_samples import ops
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bnext

# Not for what is a formula above the kernels.
on_each_device = pytest.mark.usefixtures("device")

# A central difference of step 1e-6 in float64 is good to about 1e-9 here. gradcheck's own defaults
# (1e-3 relative) would let a systematic error of a thousandth pass.
TIGHT = {"atol": 1e-6, "rtol": 1e-5}


def prepared(case: Case) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    tensors = case.tensors()
    return tuple(tensors), tuple(tensors.values())


def few_cases() -> list[Case]:
    """Every value of every option, not their product: for the checks that cost more."""
    cases = [
        Case("rows", "silu", True, "both", GHOST),
        Case("rows", None, False, "none", None),
        Case("planes", "relu", True, "weight", GHOST),
        Case("planes", "leaky_relu", False, "bias", None),
        Case("channels_last", "silu", False, "both", None),
        Case("channels_last", "relu", True, "both", GHOST),
    ]
    frozen = [
        Case("rows", "leaky_relu", True, "both", training=False),
        Case("planes", "silu", True, "none", training=False),
        Case("channels_last", None, False, "weight", training=False),
    ]
    return cases + frozen


@on_each_device
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_gradcheck(case: Case) -> None:
    names, values = prepared(case)
    assert gradcheck(case.function(names), values, **TIGHT)


# Layouts end at the kernels, and the second order is a formula above them: one layout of each rank.
@pytest.mark.parametrize(
    "case", all_cases(("rows", "channels_last"), affines=("both", "none")), ids=str
)
def test_gradgradcheck(case: Case) -> None:
    names, values = prepared(case)
    assert gradgradcheck(case.function(names), values, **TIGHT)


@pytest.mark.parametrize("case", few_cases(), ids=str)
def test_batched_and_forward_derivatives(case: Case) -> None:
    names, values = prepared(case)
    assert gradcheck(
        case.function(names),
        values,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        **TIGHT,
    )


@pytest.mark.parametrize("case", few_cases(), ids=str)
def test_mixed_second_order(case: Case) -> None:
    """Forward over reverse, and a batched double backward."""
    names, values = prepared(case)
    assert gradgradcheck(
        case.function(names),
        values,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        **TIGHT,
    )


ARGUMENTS = ("input", "weight", "bias", "residual")
SUBSETS = [s for size in range(1, 4) for s in combinations(ARGUMENTS, size)]


@on_each_device
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_any_subset_may_require_grad(
    training: bool, activation: str, subset: tuple[str, ...]
) -> None:
    case = Case("planes", activation, True, "both", GHOST if training else None, training)
    tensors = case.tensors()
    values = tuple(tensors[name] for name in subset)
    assert gradcheck(case.function(subset), values, **TIGHT)
    if activation == "silu":  # relu hides nothing that silu does not
        assert gradgradcheck(case.function(subset), values, **TIGHT)


@on_each_device
@pytest.mark.parametrize(
    ("batch", "ghost"), [(4, 2), (7, 3), (7, 4), (8, 3), (4, 4), (4, 5)], ids=str
)
def test_ghost_sizes(batch: int, ghost: int) -> None:
    """Equal pieces, pieces that differ by one, one piece, and a ghost larger than the batch."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(batch, 2, generator=generator, dtype=torch.float64)]
    values += [torch.randn(2, generator=generator, dtype=torch.float64) for _ in range(2)]
    values = [v.to(ops.device).requires_grad_() for v in values]

    def function(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bnext.batch_norm(
            input, None, None, weight, bias, True, 0.1, 0.1, ghost_batch_size=ghost
        )

    assert gradcheck(function, values, **TIGHT)
    assert gradgradcheck(function, values, **TIGHT)


@on_each_device
@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 2, 2, 1, 2), (2, 1), (1, 2, 3), (4, 17)], ids=str)
def test_other_ranks_and_sizes(shape: tuple[int, ...]) -> None:
    """Three and five dimensions, one channel, one sample, more channels than a vector holds."""
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(shape, generator=generator, dtype=torch.float64).to(ops.device)
    input.requires_grad_()

    def function(input: Tensor) -> Tensor:
        return bnext.batch_norm(
            input, None, None, training=True, momentum=0.1, eps=0.1, activation="silu"
        )

    assert gradcheck(function, input, **TIGHT)
    if input.numel() < 40:
        assert gradgradcheck(function, input, **TIGHT)


# gradcheck lays its grad_output out as the output. Users do not: an expanded or transposed
# grad_output has other strides (an expanded one, zeros), which the kernels must not trust.


@on_each_device
@pytest.mark.parametrize("case", few_cases(), ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_grad_output_of_any_strides(case: Case, layout: str) -> None:
    tensors = case.tensors()
    output = case.call(bnext.batch_norm, tensors)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(output.shape, generator=generator, dtype=output.dtype).to(ops.device)
    if layout not in layouts_of(tuple(grad.shape)):
        pytest.skip(f"{layout} needs more dimensions")
    same_layout = torch.empty_like(output).copy_(grad)
    expected = torch.autograd.grad(output, list(tensors.values()), same_layout, retain_graph=True)
    actual = torch.autograd.grad(output, list(tensors.values()), lay_out(grad, layout))
    for name, a, e in zip(tensors, actual, expected, strict=True):
        # The strides choose the loop, not the arithmetic beyond the order of a sum of 40 terms.
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@on_each_device
@pytest.mark.parametrize("case", few_cases(), ids=str)
def test_expanded_grad_output(case: Case) -> None:
    """sum().backward() hands the layer a grad_output whose strides are all zero."""
    tensors = case.tensors()
    values = list(tensors.values())
    output = case.call(bnext.batch_norm, tensors)
    expected = torch.autograd.grad(output, values, torch.ones_like(output), retain_graph=True)
    actual = torch.autograd.grad(output.sum(), values)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-13)


@on_each_device
@pytest.mark.parametrize("case", few_cases(), ids=str)
def test_gradcheck_with_expanded_grad_output(case: Case) -> None:
    names, values = prepared(case)
    function = case.function(names)
    assert gradcheck(lambda *v: function(*v).sum(), values, **TIGHT)
    assert gradcheck(lambda *v: function(*v).sum(dim=1), values, **TIGHT)
