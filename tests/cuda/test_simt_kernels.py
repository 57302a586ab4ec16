"""The CUDA kernels, run by the executor, against the CPU's: every case, on GPUs that make the
launch configuration choose every path; and bits that do not depend on the order of threads.

Against the float64 oracle they run as the device "executor" of the other files.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import executor
import pytest
import simt_build
import torch
from assertions import assert_same
from cases import ACTIVATIONS, CASES, FEW_CASES, KINDS, Case
from executor import GPUS
from op_samples import EMPTY, SAMPLES, Sample
from torch import Tensor

pytestmark = pytest.mark.skipif(
    simt_build.cuda_include() is None, reason="no cuda_fp16.h: install the CUDA headers' wheel"
)

OPS = (
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_reduce",
    "batch_norm_merge",
    "batch_norm_fold",
    "batch_norm_apply",
    "batch_norm_grad_reduce",
    "batch_norm_grad_apply",
)
by_gpu = pytest.mark.parametrize("gpu", GPUS)


@pytest.fixture
def simt(gpu: str) -> Any:
    with executor.running_on(GPUS[gpu]) as library:
        yield library


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def assert_near(
    actual: Tensor, expected: Tensor, name: str, dtype: torch.dtype | None = None
) -> None:
    """Two results of the same formula: rounded once each to their dtype, and before that sums of
    up to some thousand terms of the accumulation dtype in different orders. `dtype` is the
    input's, where the result is a double made of sums of floats."""
    assert (actual.shape, actual.dtype, actual.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    ), name
    if not actual.numel():
        return
    acc = torch.float64 if (dtype or actual.dtype) == torch.float64 else torch.float32
    size = expected.double().abs().amax().clamp_min(1.0).item()
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=2 * torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0,
        atol=16 * torch.finfo(acc).eps * size if actual.is_floating_point() else 0,
        msg=lambda m: f"{name}: {m}",
    )


CALLS = [
    pytest.param(op, sample, id=f"{op}-{sample}")
    for op in OPS
    for sample in SAMPLES + EMPTY
    if not (op == "batch_norm_fold" and sample.name == "eval-one-value")
]


@by_gpu
@pytest.mark.parametrize(("op", "sample"), CALLS)
def test_every_op(simt: Any, op: str, sample: Sample) -> None:
    args, cpu_args = sample.args(op), sample.args(op)
    results = as_tuple(getattr(simt, op)(*args))
    expected = as_tuple(getattr(torch.ops.bnext, op)(*cpu_args))
    for i, (a, e) in enumerate(zip(results, expected, strict=True)):
        assert_near(a, e, f"result {i}", sample.dtype)
    for a, e in zip(args, cpu_args, strict=True):  # the buffers
        if isinstance(a, Tensor):
            assert_near(a, e, "argument")


def step(ops: Any, case: Case, activation: str | None, residual: bool, ghost: int | None,
         training: bool) -> dict[str, Tensor]:  # fmt: skip
    """All results of a forward and a backward pass of the fused ops."""
    values = case.parameters()
    weight, bias, *running = values.values()
    batches = torch.tensor(2)
    added = case.residual() if residual else None
    args = (weight, bias, *running, batches, added, training, None, 1e-5)
    linear = torch.ops.bnext.batch_norm(
        case.input(), weight, bias, *(b.clone() for b in running), None, added, training, 0.1, 1e-5,
        None, ghost,
    )[0]  # fmt: skip
    output, *saved = ops.batch_norm(case.input(), *args, activation, ghost)
    # Where z is next to 0 its sign, and so relu's derivative, is a matter of the last bit.
    grad_output = torch.where(linear.abs() < 1e-2, 0, case.grad_output())
    grads = ops.batch_norm_backward(
        grad_output,
        case.input(),
        weight,
        bias,
        output if residual and activation in ("relu", "leaky_relu") else None,
        added if activation == "silu" else None,
        *saved,
        training,
        activation,
        [True, residual],
    )
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    stats = ("save_mean", "save_mean_lo", "save_invstd")
    names = ("output", *stats, *buffers, "grad_input", "grad_weight", "grad_bias", "grad_residual")
    return dict(zip(names, (output, *saved, *running, batches, *grads), strict=True))


def assert_same_step(case: Case, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in actual.items():
        reference = expected[name]
        if name == "save_mean_lo":  # what one rounding of the mean leaves
            assert value.abs().max() <= torch.finfo(value.dtype).eps * max(1, case.mean * 4)
        elif name in ("grad_weight", "grad_bias"):
            # Sums of N * S terms of size about 1 in the accumulation dtype's blocks.
            eps = torch.finfo(value.dtype).eps
            count = case.input().numel() / case.channels
            torch.testing.assert_close(value, reference, rtol=16 * eps, atol=16 * eps * count**0.5)
        else:
            assert_near(value, reference, name)


VARIANTS = list(product(ACTIVATIONS, (False, True), ("eval", "train", "ghosts")))
FEW_VARIANTS = [variant for variant in VARIANTS if variant[0] in KINDS]
# The product of all cases, variants and GPUs would be 84,000 steps: each case has two variants and
# GPUs of its own, the few cases have all variants of each kind of activation.
ROTATED = [
    (case, *VARIANTS[(7 * i + 5 * j) % len(VARIANTS)], list(GPUS)[(i + 2 * j) % len(GPUS)])
    for i, case in enumerate(CASES)
    for j in range(2)
]
FEW = [
    (case, *variant, list(GPUS)[(i + j) % len(GPUS)])
    for i, case in enumerate(FEW_CASES)
    for j, variant in enumerate(FEW_VARIANTS)
]


@pytest.mark.parametrize(
    ("case", "activation", "residual", "mode", "gpu"), [*ROTATED, *FEW], ids=str
)
def test_every_case(
    simt: Any, case: Case, activation: str | None, residual: bool, mode: str
) -> None:
    n, values = case.shape[0], case.input().numel() // case.channels
    ghost = -(-n // 3) if mode == "ghosts" and n >= 6 else None
    training = mode != "eval" and values > 1
    args = (case, activation, residual, ghost, training)
    assert_same_step(case, step(simt, *args), step(torch.ops.bnext, *args))


DETERMINISM = (
    Case((4000, 24)),
    Case((999, 7)),
    Case((6, 16, 40, 40)),
    Case((6, 16, 40, 40), "channels_last"),
    Case((64, 9, 7, 7), dtype=torch.bfloat16),
    Case((40, 48, 6, 6), "channels_last", torch.float16),
)


@by_gpu
@pytest.mark.parametrize("ghosts", [1, 4])
@pytest.mark.parametrize("case", DETERMINISM, ids=str)
def test_the_same_bits_in_any_order_of_threads(case: Case, ghosts: int, gpu: str) -> None:
    ghost = None if ghosts == 1 else -(-case.shape[0] // ghosts)
    results = []
    for seed in range(5):
        with executor.running_on(GPUS[gpu], seed) as library:
            results.append(step(library, case, "relu", True, ghost, True))
    for seed, result in enumerate(results):
        for name, value in result.items():
            assert_same(value, results[0][name], f"{name}, seed {seed}")
