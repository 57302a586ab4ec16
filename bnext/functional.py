"""The functional form of the layers."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnext import autograd
from bnext.ops import ForwardCall


def batch_norm(
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
    r"""``activation(batch_norm(input) + residual)`` in one call.

    .. math:: y = f\Big(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b + r
              \Big)

    over each channel (Ioffe and Szegedy 2015). In training, the statistics are those of the batch,
    or of each ghost of ``ghost_batch_size`` samples (Hoffer, Hubara and Soudry 2017); they are
    found by merging (count, mean, M2) triples (Welford 1962; Chan, Golub and LeVeque 1983), and
    are right in every memory format and at every offset. See docs/math.md.

    Args:
        input: (N, C, \*), at least 2-D; float32, float64, float16 or bfloat16; any strides.
        running_mean, running_var: (C,). Training updates both in place, once and with the
            statistics of the whole batch; eval normalises by them. May be None in training.
        weight, bias: (C,), of the input's dtype or float32.
        training: normalise by the batch's statistics rather than by the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; in units of the input squared.
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.01) or "silu".
        residual: added before the activation; shape, dtype and device of ``input``.
        ghost_batch_size: training only: the N samples are split in order into
            ``ceil(N / ghost_batch_size)`` near-equal pieces (:func:`torch.tensor_split`), each
            normalised by its own statistics. None, or at least N, is plain batch norm.

    Returns:
        Tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: fewer than two values per channel (in the batch or in a ghost) in training, or
            an ``eps``, ``activation`` or ``ghost_batch_size`` out of range.
        RuntimeError: a shape, dtype, device or layout that does not fit; the message names the
            argument. Nothing is changed by a call that raises.
    """
    return layer_forward(
        ForwardCall(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            None,
            residual,
            training,
            momentum,
            eps,
            activation,
            ghost_batch_size,
        )
    )


def layer_forward(call: ForwardCall, dims: tuple[int, ...] = ()) -> Tensor:
    """What a layer computes. ``dims``: the ranks that it accepts; empty for any."""
    # By name and once: an attribute of a named tuple takes as long as five local names.
    input, weight, bias, running_mean, running_var, counter, residual, _, _, _, _, ghosts = call
    if has_torch_function_variadic(input, weight, bias, running_mean, running_var, residual):
        tensors = (input, weight, bias, running_mean, running_var, residual)
        return handle_torch_function(_layer_forward, tensors, *call, dims)
    if counter is not None and counter.dtype != torch.long:
        # nn.BatchNorm takes counters of any dtype, which averaged checkpoints have.
        integer = counter.long()
        output = layer_forward(call._replace(num_batches_tracked=integer), dims)
        counter.copy_(integer)
        return output
    if dims and input.dim() not in dims:
        expected = " or ".join(f"{d}D" for d in dims)
        raise ValueError(f"expected {expected} input (got {input.dim()}D input)")
    if isinstance(ghosts, bool):
        check_ghost_batch_size(ghosts)
    return autograd.batch_norm(call)


def _layer_forward(*args: Any) -> Tensor:
    """The same for tensor subclasses, which look for tensors among the arguments."""
    *call, dims = args
    return layer_forward(ForwardCall(*call), dims)


def check_ghost_batch_size(ghost_batch_size: int | None) -> int | None:
    """Returns it, or raises what a constructor raises for a bad one."""
    if ghost_batch_size is None:
        return None
    if isinstance(ghost_batch_size, bool) or not isinstance(ghost_batch_size, int):
        raise TypeError(
            "ghost_batch_size must be a positive integer or None, got "
            f"{ghost_batch_size!r} of type {type(ghost_batch_size).__name__}"
        )
    if ghost_batch_size <= 0:
        raise ValueError(
            f"ghost_batch_size must be a positive integer or None, got {ghost_batch_size}"
        )
    return ghost_batch_size


__all__ = ["batch_norm"]
