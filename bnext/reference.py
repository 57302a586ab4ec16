"""Batch norm in plain PyTorch operators: the oracle of tests and benchmarks, and the formula that
differentiates where the fused kernels cannot (higher order, forward mode, functorch transforms).

Slow and clear on purpose. In float64 it is accurate to a few units in the last place; in lower
precision it computes in float32, with the mean corrected once, as docs/math.md describes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bnext import activations


def num_ghosts(n_batch: int, ghost_batch_size: int | None) -> int:
    """``ceil(n_batch / ghost_batch_size)``, 1 for plain batch norm or an empty batch."""
    if ghost_batch_size is None or n_batch == 0 or ghost_batch_size >= n_batch:
        return 1
    return -(-n_batch // ghost_batch_size)


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _equal_ghosts(input: Tensor, ghosts: int) -> Iterator[Tensor]:
    """Views of ``input`` (N, C, *) as (G, n, C, S), G ghosts of n samples each.

    The pieces of :func:`torch.tensor_split` have at most two sizes, and the larger come first.
    """
    n_batch, n_channel = input.shape[:2]
    size, longer = divmod(n_batch, ghosts)
    flat = input.reshape(n_batch, n_channel, -1) if input.numel() else input.flatten(2)
    split = longer * (size + 1)
    if longer:
        yield flat[:split].reshape(longer, size + 1, n_channel, -1)
    if longer < ghosts:
        yield flat[split:].reshape(ghosts - longer, size, n_channel, -1)


class _Moments(NamedTuple):
    """Of equal ghosts: deviations (G, n, C, S) from the mean, mean and variance (G, 1, C, 1)."""

    deviations: Tensor
    mean: Tensor
    variance: Tensor


def _moments(pieces: Tensor) -> _Moments:
    mean = pieces.mean((1, 3), keepdim=True)
    deviations = pieces - mean
    # At mean 1e4 a float32 mean is off by up to 5e-4; what it misses is the mean of the deviations.
    low = deviations.mean((1, 3), keepdim=True)
    deviations = deviations - low
    return _Moments(deviations, mean + low, deviations.square().mean((1, 3), keepdim=True))


def _per_channel(values: Tensor | None, dtype: torch.dtype, otherwise: float) -> Tensor | float:
    return otherwise if values is None else values.to(dtype)[:, None]


def batch_norm_reference(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    ghost_batch_size: int | None = None,
) -> Tensor:
    """:func:`bnext.batch_norm` in plain PyTorch; same arguments, shapes and side effects.

    Differentiable to any order, in reverse and forward mode, and under :mod:`torch.func`. The
    arguments are not checked: :func:`bnext.batch_norm` does that.
    """
    dtype = _acc_dtype(input.dtype)
    x = input.to(dtype)
    w, b = _per_channel(weight, dtype, 1.0), _per_channel(bias, dtype, 0.0)
    if input.numel() == 0:
        normalized = (x.flatten(2) if x.dim() > 2 else x[:, :, None]) * w + b
    elif training:
        ghosts = list(_equal_ghosts(x, num_ghosts(input.shape[0], ghost_batch_size)))
        moments = [_moments(pieces) for pieces in ghosts]
        if running_mean is not None and running_var is not None:
            _update_running_stats(moments, running_mean, running_var, momentum)
        normalized = torch.cat(
            [(m.deviations * torch.rsqrt(m.variance + eps) * w + b).flatten(0, 1) for m in moments]
        )
    else:
        assert running_mean is not None and running_var is not None
        invstd = torch.rsqrt(running_var.to(dtype) + eps)[:, None]
        mean = running_mean.to(dtype)[:, None]
        normalized = (x.reshape(*x.shape[:2], -1) - mean) * (invstd * w) + b
    z = normalized.reshape(input.shape)
    if residual is not None:
        z = z + residual.to(dtype)
    return activations.apply(activation, z).to(input.dtype)


@torch.no_grad()
def _update_running_stats(
    moments: list[_Moments], running_mean: Tensor, running_var: Tensor, momentum: float
) -> None:
    """One update with the statistics of the whole batch: the ghosts', merged (Chan et al. 1983)."""
    mean = m2 = total = 0.0
    for deviations, ghost_means, ghost_variances in moments:
        # no_grad does not stop forward mode, detach does.
        ghost_means, ghost_variances = ghost_means.detach(), ghost_variances.detach()
        count = deviations.shape[1] * deviations.shape[3]
        for ghost_mean, ghost_variance in zip(ghost_means, ghost_variances, strict=True):
            delta = ghost_mean.double().flatten() - mean
            m2 = m2 + count * ghost_variance.double().flatten()
            m2 = m2 + delta.square() * (total * count / (total + count))
            total += count
            mean = mean + delta * (count / total)
    running_mean.copy_(momentum * mean + (1 - momentum) * running_mean.double())
    running_var.copy_(momentum * m2 / (total - 1) + (1 - momentum) * running_var.double())


def batch_norm_backward_reference(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    stats: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: str | None,
    ghosts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input (N, C, *), weight (C,), bias (C,) and residual, differentiable again.

    The formula of docs/math.md over differentiable operators. ``stats``: mean and invstd (C,) of
    frozen statistics, None for the batch's own, which then depend on ``input``. ``output`` or
    ``residual`` as for ``torch.ops.bnext.batch_norm_backward``.
    """
    dtype = _acc_dtype(input.dtype)
    if input.numel() == 0:
        zeros = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
        return grad_output * 1, zeros, zeros, grad_output * 1
    x, grad = input.to(dtype), grad_output.to(dtype)
    w, b = _per_channel(weight, dtype, 1.0), _per_channel(bias, dtype, 0.0)

    def pieces(tensor: Tensor | None) -> Iterator[Tensor | None]:
        if tensor is None:
            return iter([None, None])
        return _equal_ghosts(tensor.to(dtype), ghosts)

    grad_inputs, grad_residuals = [], []
    grad_weight = grad_bias = x.new_zeros(x.shape[1])
    for x_g, grad_g, output_g, residual_g in zip(
        pieces(x), pieces(grad), pieces(output), pieces(residual), strict=False
    ):
        assert x_g is not None and grad_g is not None
        if stats is None:
            m = _moments(x_g)
            deviations, invstd = m.deviations, torch.rsqrt(m.variance + eps)
        else:
            deviations, invstd = x_g - stats[0].to(dtype)[:, None], stats[1].to(dtype)[:, None]
        normalized = deviations * invstd
        if output_g is not None:
            z = output_g.detach()  # only its sign matters, and that has no derivative
        else:
            z = normalized * w + b
            z = z if residual_g is None else z + residual_g
        dy = activations.gradient(activation, grad_g, z)
        grad_bias = grad_bias + dy.sum((0, 1, 3))
        grad_weight = grad_weight + (dy * normalized).sum((0, 1, 3))
        dx = dy
        if stats is None:
            dx = dx - dy.mean((1, 3), keepdim=True)
            dx = dx - normalized * (dy * normalized).mean((1, 3), keepdim=True)
        grad_inputs.append((dx * (invstd * w)).flatten(0, 1))
        grad_residuals.append(dy.flatten(0, 1))
    shape = input.shape
    return (
        torch.cat(grad_inputs).reshape(shape).to(input.dtype),
        grad_weight,
        grad_bias,
        torch.cat(grad_residuals).reshape(shape).to(input.dtype),
    )


def frozen_backward_reference(
    grad_output: Tensor,
    weight: Tensor | None,
    output: Tensor | None,
    invstd: Tensor,
    activation: str | None,
) -> tuple[Tensor, None, None, Tensor]:
    """As :func:`batch_norm_backward_reference` of frozen statistics, where weight and bias want no
    gradient: the input is not needed. ``output``: None without an activation."""
    dtype = invstd.dtype
    z = None if output is None else output.detach()
    dy = grad_output.to(dtype)
    dy = dy if z is None else activations.gradient(activation, dy, z)
    scale = invstd if weight is None else invstd * weight.to(dtype)
    scale = scale.reshape(-1, *[1] * (grad_output.dim() - 2))
    return (dy * scale).to(grad_output.dtype), None, None, dy.to(grad_output.dtype)
