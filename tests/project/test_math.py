"""What docs/math.md claims, as numbers: pivot, error bounds, second order, ghosts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bnext

U = 2.0**-24  # unit roundoff of float32


def squares(d: Tensor) -> float:
    return d.square().sum().item()


@given(st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=64), st.integers(1, 8))
def test_pivot_lemma(values: list[int], k: int) -> None:
    """sum (x - p)^2 <= (1 + n/k) M2 for p the mean of the first k."""
    x = torch.tensor(values, dtype=torch.float64)
    n, k = len(x), min(k, len(x))
    m2 = squares(x - x.mean())
    assert squares(x - x[:k].mean()) <= (1 + n / k) * m2 * (1 + 1e-12) + 1e-6


@pytest.mark.parametrize("k", [4, 8])
def test_pivot_lemma_is_close(k: int) -> None:
    x = (torch.arange(64) < k).double()
    assert squares(x - x[:k].mean()) == pytest.approx(64 / k * squares(x - x.mean()))


# (shape, layout): rows, planes with a long run, planes with a short run, channels_last.
INPUTS = [
    ((4096, 3), None),
    ((8, 3, 64, 40), None),
    ((64, 3, 4, 4), None),
    ((8, 3, 64, 40), torch.channels_last),
]


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(("shape", "memory_format"), INPUTS, ids=str)
@pytest.mark.parametrize("outlier", [False, True])
def test_error_of_m2_is_within_its_bound(
    outlier: bool, shape: tuple[int, ...], memory_format: torch.memory_format | None, offset: float
) -> None:
    """3 (h + 1) u (1 + n/k), n = h = 64, k = 8: the same at every offset."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).float()
    if outlier:
        x[(0, slice(None)) + (0,) * (x.dim() - 2)] = 1e6
    if memory_format:
        x = x.contiguous(memory_format=memory_format)
    _, mean, m2 = torch.ops.bnext.batch_norm_reduce(x)
    columns = x.double().movedim(1, 0).flatten(1)
    true_mean = columns.mean(1, keepdim=True)
    true_m2 = (columns - true_mean).square().sum(1)
    n, k = 64, 8
    bound = 3 * (n + 1) * U * (1 + n / k)
    assert ((m2[0] - true_m2).abs() <= bound * true_m2).all()
    # The sum of deviations, by the same argument: (h + 1) u sqrt(sum d^2 / n) for a block's mean.
    mean_bound = (n + 1) * U * ((1 + n / k) * true_m2 / columns.shape[1]).sqrt()
    assert ((mean[0] - true_mean[:, 0]).abs() <= mean_bound + 2.0**-50 * offset).all()


def test_second_order_in_closed_form() -> None:
    """The cotangents of section 3, against the double backward that runs."""
    torch.manual_seed(0)
    n, eps = 7, 0.1
    column, dy = (torch.randn(n, 1, dtype=torch.float64, requires_grad=True) for _ in "12")
    weight = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    output = bnext.batch_norm(column, None, None, weight, training=True, eps=eps)
    dx, dw = torch.autograd.grad(output, [column, weight], dy, create_graph=True)
    v, v_w = torch.randn(n, dtype=torch.float64), 0.7
    actual = torch.autograd.grad((dx[:, 0] * v).sum() + dw.sum() * v_w, [dy, weight, column])

    x, g, w = column.detach()[:, 0], dy.detach()[:, 0], weight.detach()
    c = x - x.mean()
    invstd = (c.square().mean() + eps).rsqrt()
    hat = c * invstd
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    p = centre - torch.outer(hat, hat) / n
    a, alpha, beta = v @ centre @ g, v @ c, g @ c
    to_g = w * invstd * (p @ v) + v_w * hat
    to_w = invstd * a - invstd**3 / n * alpha * beta
    to_x = -w * invstd**3 / n * (
        a * c + beta * centre @ v + alpha * centre @ g - 3 * invstd**2 / n * alpha * beta * c
    ) + v_w * (invstd * centre @ g - invstd**3 * beta * c / n)
    for found, closed in zip(actual, (to_g, to_w, to_x), strict=True):
        torch.testing.assert_close(found.flatten(), closed.flatten(), rtol=1e-12, atol=1e-12)


def test_ghosts_are_near_equal_and_never_larger_than_asked() -> None:
    for n in range(1, 60):
        for size in range(1, n + 3):
            count = torch.ops.bnext.batch_norm_reduce(torch.zeros(n, 1), size)[0]
            sizes = [len(t) for t in torch.zeros(n).tensor_split(-(-n // size))]
            assert count.tolist() == sizes
            assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_running_variance_holds_the_variance_between_ghosts() -> None:
    """Two ghosts that are constants: each has variance 0, the batch has not."""
    x = torch.tensor([[0.0], [0.0], [2.0], [2.0]], dtype=torch.float64)
    mean, var = torch.zeros(1).double(), torch.zeros(1).double()
    output = bnext.batch_norm(x, mean, var, training=True, momentum=1.0, ghost_batch_size=2)
    assert output.abs().max() == 0
    assert mean.item() == 1 and var.item() == pytest.approx(4 / 3)
