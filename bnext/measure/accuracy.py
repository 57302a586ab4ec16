"""How far a layer's statistics, outputs and gradients are from the float64 truth.

The truth is taken from the very values that the layer is given (rounded to its dtype first), so
what is measured is the arithmetic of the layer and nothing else. Any layer with the attributes of
``nn.BatchNorm*d`` can be measured: the demo and ``benchmarks/accuracy.py`` put two side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LAYOUTS", "LayerErrors", "Sample", "layer_errors", "layers_for", "make_sample",
           "measure", "num_threads", "to_layout"]  # fmt: skip

LayerFactory = Callable[[int], nn.Module]
"""Number of channels -> a fresh layer with affine parameters and running statistics."""

LAYOUTS = ("contiguous", "channels_last", "transposed")
_OUTLIER = 1e6


@dataclass(frozen=True)
class Sample:
    """An input and its float64 truth. Per-channel tensors have shape (C,)."""

    input: Tensor  # [N, C, *]
    mean: Tensor  # float64
    var: Tensor  # float64, unbiased: what running_var must be after one batch at momentum 1
    normalized: Tensor  # float64, [N, C, *]: what the output must be with weight 1 and bias 0
    invstd: Tensor  # float64
    eps: float


@dataclass(frozen=True)
class LayerErrors:
    """Worst errors of one layer on one sample; the worst channel or element counts."""

    running_mean: float  # |error|, in standard deviations of the channel
    running_var: float  # |error| relative to the true variance
    var_ratio: float  # running_var / true variance of the channel where it is furthest from 1
    output: float  # |error|; outputs have standard deviation 1
    output_rounding: float  # |error| of the truth itself once rounded to the output's dtype
    grad_input: float  # |error| relative to the largest |grad_input|; nan where not measured


@contextmanager
def num_threads(threads: int | None) -> Iterator[None]:
    """Run the body with this number of intra-op threads (None: leave it)."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_layout(input: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return input.contiguous()
    if layout == "channels_last" and input.dim() in (4, 5):
        memory_format = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
        return input.contiguous(memory_format=memory_format)
    if layout == "transposed" and input.dim() == 2:
        return input.t().contiguous().t()
    raise ValueError(f"layout {layout!r} does not exist for an input of {input.dim()} dimensions")


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _reduced_dims(input: Tensor) -> list[int]:
    return [dim for dim in range(input.dim()) if dim != 1]


def make_sample(
    shape: Sequence[int],
    mean: float = 0.0,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    *,
    outlier: bool = False,
    eps: float = 1e-5,
    seed: int = 0,
) -> Sample:
    """Normal values of standard deviation 1 around ``mean``, with their float64 truth.

    ``outlier`` sets the first value of every channel to 1e6 (6e4 in float16): an algorithm that
    shifts by the first value it meets must survive it.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).add_(mean)
    if outlier:
        largest = torch.finfo(dtype).max * 0.9
        exact.view(shape[0], shape[1], -1)[0, :, 0] = min(_OUTLIER, largest)
    input = to_layout(exact.to(dtype), layout)
    exact = input.double()
    dims = _reduced_dims(exact)
    true_mean = exact.mean(dims)
    # Two passes, the second also correcting the rounding of the mean (Chan, Golub, LeVeque 1983).
    centred = exact.sub_(_per_channel(true_mean, exact))
    count = centred.numel() // centred.size(1)
    correction = centred.mean(dims)
    m2 = centred.square().sum(dims) - count * correction.square()
    true_mean = true_mean + correction
    centred -= _per_channel(correction, centred)
    invstd = (m2 / count + eps).rsqrt()
    normalized = centred.mul_(_per_channel(invstd, centred))
    return Sample(input, true_mean, m2 / (count - 1), normalized, invstd, eps)


def _grad_input_error(layer: nn.Module, sample: Sample, device: str) -> float:
    input = sample.input.detach().to(device).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(sample.normalized.shape, generator=generator).to(input.dtype)
    layer(input).backward(torch.empty_like(input).copy_(grad_output))
    assert input.grad is not None
    dims = _reduced_dims(input)
    grad, hat = grad_output.double(), sample.normalized
    truth = grad - grad.mean(dims, keepdim=True) - hat * (grad * hat).mean(dims, keepdim=True)
    truth *= _per_channel(sample.invstd, truth)
    return ((input.grad.cpu().double() - truth).abs().max() / truth.abs().max()).item()


def measure(
    layer: LayerFactory,
    sample: Sample,
    threads: int | None = None,
    *,
    backward: bool = False,
    device: str = "cpu",
) -> LayerErrors:
    """Errors of one training step of ``layer`` on ``sample``, made on ``device``."""
    module: Any = layer(sample.input.size(1)).to(device).train()
    module.eps, module.momentum = sample.eps, 1.0  # momentum 1: running statistics = this batch's
    with num_threads(threads):
        with torch.no_grad():
            output = module(sample.input.to(device)).cpu()
        running_mean = module.running_mean.cpu().double()
        running_var = module.running_var.cpu().double()
        grad_input = _grad_input_error(module, sample, device) if backward else math.nan
    ratio = running_var / sample.var
    furthest = ratio.clamp_min(torch.finfo(torch.float64).tiny).log().abs().argmax()
    rounding = sample.normalized.to(output.dtype).double() - sample.normalized
    return LayerErrors(
        running_mean=((running_mean - sample.mean).abs() / sample.var.sqrt()).max().item(),
        running_var=(ratio - 1).abs().max().item(),
        var_ratio=ratio[furthest].item(),
        output=(output.double() - sample.normalized).abs().max().item(),
        output_rounding=rounding.abs().max().item(),
        grad_input=grad_input,
    )


def layer_errors(
    layer: LayerFactory,
    shape: Sequence[int],
    mean: float = 0.0,
    layout: str = "contiguous",
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> LayerErrors:
    """``measure(layer, make_sample(...))`` in one call."""
    return measure(layer, make_sample(shape, mean, layout, dtype), threads)


def layers_for(n_dims: int) -> dict[str, LayerFactory]:
    """PyTorch's layer and bnext's, by name, for an input of ``n_dims`` dimensions."""
    import bnext

    if n_dims <= 3:
        return {"PyTorch": nn.BatchNorm1d, "bnext": bnext.BatchNorm1d}
    if n_dims == 4:
        return {"PyTorch": nn.BatchNorm2d, "bnext": bnext.BatchNorm2d}
    return {"PyTorch": nn.BatchNorm3d, "bnext": bnext.BatchNorm3d}
