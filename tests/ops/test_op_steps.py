"""reduce -> merge -> fold -> apply as separate ops: what the fused ops do, for synchronised use."""

from __future__ import annotations

import oracle
import pytest
import torch
from op_samples import EMPTY, SAMPLES, Sample, assert_same_parts, ops
from torch import Tensor, nn

import bnext

TRAINING = [s for s in SAMPLES if s.training]
# Merging doubles in another order costs some units of 2^-53; the offset below multiplies them.
DOUBLE = {"rtol": 1e-12, "atol": 1e-12}


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sample", TRAINING, ids=str)
def test_reduce_fold_apply_is_the_fused_forward(sample: Sample, device: str) -> None:
    args = sample.forward_args()
    output, *saved = ops.batch_norm(*args)
    fused_buffers = args[3:6]

    fold_args = sample.fold_args()
    parts = ops.batch_norm_fold(*fold_args)
    # The means of batch_norm_reduce are doubles: those of a float64 input lose their low part.
    rounded = sample.dtype == torch.float64
    for a, e in zip(parts, saved, strict=True):
        assert_same_parts(a, e, sample.dtype, rounded=rounded)
    applied = ops.batch_norm_apply(
        sample.input, sample.weight, sample.bias, sample.residual_tensor, *parts, sample.activation
    )
    assert_same_parts(applied, output, sample.dtype, rounded=rounded)
    for a, e in zip(fold_args[3:6], fused_buffers, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            # Ghosts are merged in double in groups there and one by one here.
            eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0
            torch.testing.assert_close(a, e, rtol=8 * eps if rounded else eps, atol=0)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_grad_reduce_grad_apply_is_the_fused_backward(sample: Sample, device: str) -> None:
    grad_input, grad_weight, grad_bias, grad_residual = ops.batch_norm_backward(
        *sample.backward_args()
    )
    parts = ops.batch_norm_grad_apply(*sample.grad_apply_args())
    assert_same_parts(parts[0], grad_input, sample.dtype)
    assert_exact(parts[1], grad_residual)
    sum_dy, sum_dy_xmu = ops.batch_norm_grad_reduce(*sample.grad_reduce_args())
    invstd = sample.forward()[1].invstd.double()
    eps = torch.finfo(grad_bias.dtype).eps
    # The same doubles, rounded once; sums over ghosts may be in another order. Of other pieces
    # (see assert_same_parts) the float sums differ by some roundings too.
    close = (
        {"rtol": eps, "atol": 1e-14} if ops.on_cpu_kernels else {"rtol": 8 * eps, "atol": 8 * eps}
    )
    torch.testing.assert_close(grad_bias.double(), sum_dy.sum(0), **close)
    torch.testing.assert_close(grad_weight.double(), (sum_dy_xmu * invstd).sum(0), **close)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.dtype == torch.float32], ids=str)
def test_reduce_against_float64(sample: Sample, device: str) -> None:
    count, mean, m2 = ops.batch_norm_reduce(sample.input, sample.ghost)
    assert (count.dtype, mean.dtype, m2.dtype) == (torch.int64, torch.float64, torch.float64)
    pieces = sample.input.double().tensor_split(len(count))
    dims = [0, *range(2, sample.input.dim())]
    for i, piece in enumerate(pieces):
        assert count[i] == piece.numel() // piece.shape[1]
        true_mean = piece.mean(dims)
        true_m2 = piece.var(dims, unbiased=False) * count[i]
        # Sums of deviations in float32 over a block of at most 64 lines (docs/math.md, "Errors").
        torch.testing.assert_close(mean[i], true_mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(m2[i], true_m2, rtol=1e-5, atol=1e-6)


def test_reduce_defaults_to_one_ghost(device: str) -> None:
    x = SAMPLES[0].input
    for a, e in zip(ops.batch_norm_reduce(x), ops.batch_norm_reduce(x, None), strict=True):
        assert_exact(a, e)
    for a, e in zip(ops.batch_norm_reduce(x, len(x)), ops.batch_norm_reduce(x), strict=True):
        assert_exact(a, e)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [(8,), (3, 5), (1, 0, 6, 1), (0, 8), (0, 0)], ids=str)
def test_merge_of_shards_is_reduce_of_the_whole(
    sizes: tuple[int, ...], offset: float, device: str
) -> None:
    """Of any split, empty shards (a rank without data) included."""
    generator = torch.Generator().manual_seed(0)
    whole = (
        torch.randn(sum(sizes), 5, 3, generator=generator, dtype=torch.float64).to(device) + offset
    )
    shards = [ops.batch_norm_reduce(part) for part in whole.split(list(sizes))]
    merged = ops.batch_norm_merge(*(torch.cat(parts) for parts in zip(*shards, strict=True)))
    expected = ops.batch_norm_reduce(whole)
    assert torch.equal(merged[0], expected[0])
    torch.testing.assert_close(merged[1], expected[1], **DOUBLE)
    # Deviations are rounded at the size of the values, 2^-53 * offset, and squared.
    torch.testing.assert_close(merged[2], expected[2], rtol=1e-12 + offset * 1e-15, atol=1e-12)
    assert [t.shape for t in merged] == [(1,), (1, 5), (1, 5)]


def test_merge_is_ordered_and_keeps_one_triple(device: str) -> None:
    count, mean, m2 = ops.batch_norm_reduce(SAMPLES[1].input, 2)
    again = ops.batch_norm_merge(count, mean, m2)
    for a, e in zip(ops.batch_norm_merge(count, mean, m2), again, strict=True):
        assert_exact(a, e)
    one = (count[:1], mean[:1], m2[:1])
    for a, e in zip(ops.batch_norm_merge(*one), one, strict=True):
        assert_exact(a, e)


def test_merge_of_counts_beyond_int32(device: str) -> None:
    count = torch.tensor([2**40, 2**40 + 2], device=device)
    mean = torch.tensor([[1.0], [2.0]], dtype=torch.float64, device=device)
    m2 = torch.zeros(2, 1, dtype=torch.float64, device=device)
    total, merged_mean, merged_m2 = ops.batch_norm_merge(count, mean, m2)
    assert total.item() == 2**41 + 2
    weight = (2**40 + 2) / (2**41 + 2)
    torch.testing.assert_close(merged_mean.item(), 1 + weight, rtol=1e-15, atol=0)
    torch.testing.assert_close(merged_m2.item(), 2**40 * weight, rtol=1e-14, atol=0)


# --- Synchronised statistics: each rank reduces, one merge, each rank applies


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_batch_over_ranks_is_the_batch(activation: str | None, device: str) -> None:
    """Three ranks of different sizes, one of them empty, against the fused ops on the whole."""
    sample = Sample("whole", (9, 5, 4), activation=activation, dtype=torch.float64)
    x, dy, sizes = sample.input, sample.grad_output, [4, 0, 5]
    weight, bias = sample.weight, sample.bias
    moments = [ops.batch_norm_reduce(part) for part in x.split(sizes)]
    total = ops.batch_norm_merge(*(torch.cat(p) for p in zip(*moments, strict=True)))
    buffers = sample.running()
    saved = ops.batch_norm_fold(*total, *buffers, 0.1, 1e-3, x.dtype)
    parts = [
        ops.batch_norm_apply(part, weight, bias, None, *saved, activation)
        for part in x.split(sizes)
    ]
    args = sample.forward_args()
    output, *fused_saved = ops.batch_norm(*args)
    torch.testing.assert_close(torch.cat(parts), output, **DOUBLE)
    for a, e in zip((*saved, *buffers), (*fused_saved, *args[3:6]), strict=True):
        torch.testing.assert_close(a, e, **DOUBLE)

    common = (weight, bias, None, None, *saved)
    sums = [
        ops.batch_norm_grad_reduce(g, part, *common, activation)
        for g, part in zip(dy.split(sizes), x.split(sizes), strict=True)
    ]
    sum_dy, sum_dy_xmu = (sum(s) for s in zip(*sums, strict=True))
    grads = [
        ops.batch_norm_grad_apply(
            g, part, *common, total[0], sum_dy, sum_dy_xmu, activation, [True, False]
        )[0]
        for g, part in zip(dy.split(sizes), x.split(sizes), strict=True)
    ]
    expected = ops.batch_norm_backward(*sample.backward_args())
    torch.testing.assert_close(torch.cat(grads), expected[0], **DOUBLE)
    torch.testing.assert_close((sum_dy_xmu * saved[2]).sum(0), expected[1], **DOUBLE)
    torch.testing.assert_close(sum_dy.sum(0), expected[2], **DOUBLE)


# --- fold


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, -0.1, None])
@pytest.mark.parametrize("ghost", [None, 3])
def test_fold_updates_running_statistics_as_torch(
    ghost: int | None, momentum: float | None, device: str
) -> None:
    """One update per call, with the whole batch's unbiased variance, whatever the ghosts."""
    theirs = nn.BatchNorm1d(4, momentum=momentum, device=device, dtype=torch.float64)
    mean, var = (b.clone() for b in (theirs.running_mean, theirs.running_var))
    batches = torch.tensor(0, device=device)
    for step in range(3):
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(step)).to(device).double()
        x = x * 2 + 1
        theirs(x)
        moments = ops.batch_norm_reduce(x, ghost)
        ops.batch_norm_fold(*moments, mean, var, batches, momentum, 1e-5, x.dtype)
        torch.testing.assert_close(mean, theirs.running_mean, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(var, theirs.running_var, rtol=1e-14, atol=1e-14)
        assert torch.equal(batches, theirs.num_batches_tracked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fold_saves_the_mean_in_two_parts(dtype: torch.dtype, device: str) -> None:
    count = torch.tensor([10], device=device)
    mean = torch.tensor([[10000.123456789]], dtype=torch.float64, device=device)
    m2 = torch.tensor([[40.0]], dtype=torch.float64, device=device)
    hi, lo, invstd = ops.batch_norm_fold(count, mean, m2, None, None, None, 0.1, 1e-5, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert hi.dtype == lo.dtype == invstd.dtype == acc
    # Two floats hold 48 bits and a double 53: 2^-48 relative is what may be missing.
    torch.testing.assert_close(hi.double() + lo.double(), mean, rtol=2**-48, atol=0)
    expected = torch.rsqrt(torch.tensor([[4.0 + 1e-5]], dtype=torch.float64, device=device))
    torch.testing.assert_close(invstd.double(), expected, rtol=torch.finfo(acc).eps, atol=0)


def test_fold_of_an_empty_batch_leaves_the_running_statistics(device: str) -> None:
    args = EMPTY[0].fold_args()
    before = [b.clone() for b in args[3:6]]
    saved = ops.batch_norm_fold(*args)
    assert all(s.isfinite().all() for s in saved)
    assert torch.equal(args[3], before[0]) and torch.equal(args[4], before[1])
    assert args[5] == before[2] + 1


def test_apply_with_frozen_statistics_is_eval(device: str) -> None:
    sample = next(s for s in SAMPLES if s.name == "eval-residual")
    output, saved = sample.forward()
    assert_exact(ops.batch_norm_apply(*sample.apply_args()), output)
    assert_exact(saved.mean, sample.running()[0][None])


@pytest.mark.parametrize("activation", [None, *bnext.activations.ACTIVATIONS])
def test_both_tables_of_activations_agree(activation: str | None) -> None:
    """csrc/core/activation.h and bnext/activations.py: what backward takes the derivative from."""
    x = torch.randn(4, 3, dtype=torch.float64)
    output, *saved = torch.ops.bnext.batch_norm(
        x, None, None, None, None, None, None, True, 0.1, 1e-5, activation, None
    )

    def accepts(output: Tensor | None, residual: Tensor | None) -> bool:
        args = (x, x, None, None, output, residual, *saved, True, activation, [True, True])
        try:
            torch.ops.bnext.batch_norm_backward(*args)
        except RuntimeError:
            return False
        return True

    from_output = activation in bnext.activations.FROM_OUTPUT
    assert accepts(output, None) == (from_output or activation is None)
    assert accepts(None, x) == (not from_output)


@pytest.mark.parametrize("activation", [None, *bnext.activations.ACTIVATIONS])
def test_grad_residual_is_written_without_a_residual(activation: str | None, device: str) -> None:
    x, grad = torch.randn(2, 6, 5, 8).unbind()
    forward = (x, None, None, None, None, None, None, True, 0.1, 1e-5, activation, None)
    _, *saved = ops.batch_norm(*(t.to(device) if isinstance(t, Tensor) else t for t in forward))
    backward = (grad.to(device), x.to(device), None, None, None, None, *saved, True, activation)
    found = ops.batch_norm_backward(*backward, [True, True])[3]
    z = torch.nn.functional.batch_norm(x.double(), None, None, training=True).requires_grad_()
    oracle.activate(z, activation).backward(grad.double())
    torch.testing.assert_close(found.cpu().double(), z.grad, rtol=1e-5, atol=1e-5)


def test_no_channels(device: str) -> None:
    count = torch.tensor([3, 4], device=device)
    empty = torch.zeros(2, 0, dtype=torch.float64, device=device)
    merged = ops.batch_norm_merge(count, empty, empty)
    assert merged[0].tolist() == [7] and merged[1].shape == merged[2].shape == (1, 0)
    stats = ops.batch_norm_fold(count, empty, empty, None, None, None, None, 1e-5, torch.float32)
    assert all(s.shape == (2, 0) for s in stats)
