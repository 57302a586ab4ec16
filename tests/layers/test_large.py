"""Inputs beyond the last-level cache: outputs are stored past the caches, and planes are taken
through all steps channel by channel."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_same
from cases import Case, Mode
from layers import make_layer, step
from oracle import assert_matches_torch

from benchmarks.grid import last_level_cache_bytes

ops = torch.ops.bnext
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Samples and spatial sizes. Channel by channel go planes of 512 elements and more, of whole cache
# lines or ragged; the others have too many values a channel for a core's cache, too small planes,
# or are rows. No float64: the oracle rounds as much.
CASES = (
    ((4, 64, 64), "contiguous", F32, "relu", False, 1),
    ((5, 61, 61), "contiguous", F32, "silu", True, 1),
    ((33, 23, 23), "contiguous", BF16, "relu", True, 1),
    ((4, 64, 64), "contiguous", BF16, None, False, 1),
    ((5, 61, 61), "contiguous", F16, "leaky_relu", False, 3),
    ((3, 8, 32, 33), "contiguous", F32, "relu", True, 2),
    ((9, 200, 200), "contiguous", F32, "relu", False, 1),
    ((40, 16, 16), "contiguous", F32, "silu", False, 1),
    ((4, 64, 64), "channels_last", F32, "relu", False, 1),
    ((5, 61, 61), "channels_last", BF16, "relu", True, 3),
)


def beyond_the_cache(plane: tuple[int, ...], layout: str, dtype: torch.dtype) -> Case:
    """With so many channels that the cache does not hold four such tensors, at least 17: no
    multiple of what a piece takes."""
    per_channel = torch.Size(plane).numel() * dtype.itemsize
    cache = max(last_level_cache_bytes(), 32 << 20)  # what the kernels take where Linux tells none
    channels = max(17, cache // (4 * per_channel) + 1)
    samples, *spatial = plane
    return Case((samples, channels, *spatial), layout, dtype)


@pytest.mark.parametrize(
    ("plane", "layout", "dtype", "activation", "with_residual", "ghosts"), CASES, ids=str
)
def test_right_and_the_same_bits_for_any_number_of_threads(
    plane: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    activation: str | None,
    with_residual: bool,
    ghosts: int,
    set_threads,
) -> None:
    case = beyond_the_cache(plane, layout, dtype)
    size = None if ghosts == 1 else -(-case.shape[0] // ghosts)
    layer = make_layer(case, training=True, act=True, activation=activation, ghost_batch_size=size)
    assert_matches_torch(
        layer,
        case,
        Mode(),
        activation=activation,
        with_residual=with_residual,
        ghost_batch_size=size,
    )
    set_threads(1)
    first = step(case, True, activation, ghosts)
    for threads in (2, 3):
        set_threads(threads)
        for name, value in step(case, True, activation, ghosts).items():
            assert_same(value, first[name], f"{name}, {threads} threads")


def test_parts_give_the_bits_of_the_fused_ops() -> None:
    case = beyond_the_cache((5, 61, 61), "contiguous", F32)
    x, grad = case.input(), case.grad_output()
    affine = (torch.rand(case.channels) + 0.5, torch.randn(case.channels))
    no_buffers = (None, None, None)
    output, *saved = ops.batch_norm(x, *affine, *no_buffers, None, True, 0.1, 1e-5, "relu", None)
    count, mean, m2 = ops.batch_norm_reduce(x)
    for part, of_fused in zip(
        ops.batch_norm_fold(count, mean, m2, *no_buffers, 0.1, 1e-5, x.dtype), saved, strict=True
    ):
        assert_same(part, of_fused, "statistics")
    assert_same(ops.batch_norm_apply(x, *affine, None, *saved, "relu"), output, "output")

    args = (grad, x, *affine, None, None, *saved)
    grad_input = ops.batch_norm_backward(*args, True, "relu", [True, False])[0]
    sums = ops.batch_norm_grad_reduce(*args, "relu")
    part = ops.batch_norm_grad_apply(*args, count, *sums, "relu", [True, False])[0]
    assert_same(part, grad_input, "grad_input")
