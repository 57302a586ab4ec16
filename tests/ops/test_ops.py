"""torch.ops.bnext.*: schemas, opcheck, meta kernels, and refusals to differentiate."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from op_samples import EMPTY, SAMPLES, Sample, assert_same_parts, ops
from torch import Tensor

from bnext.config import build_info

GRAD_ARGS = (
    "Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? output, "
    "Tensor? residual, Tensor save_mean, Tensor save_mean_lo, Tensor save_invstd, "
)
SCHEMAS = {
    "batch_norm": "(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? residual, bool training, "
    "float? momentum, float eps, str? activation, SymInt? ghost_batch_size) "
    "-> (Tensor output, Tensor save_mean, Tensor save_mean_lo, Tensor save_invstd)",
    "batch_norm_backward": f"({GRAD_ARGS}bool training, str? activation, bool[2] output_mask) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    "batch_norm_reduce": "(Tensor input, SymInt? ghost_batch_size=None) "
    "-> (Tensor count, Tensor mean, Tensor m2)",
    "batch_norm_merge": "(Tensor count, Tensor mean, Tensor m2) "
    "-> (Tensor count, Tensor mean, Tensor m2)",
    "batch_norm_fold": "(Tensor count, Tensor mean, Tensor m2, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
    "ScalarType dtype) -> (Tensor save_mean, Tensor save_mean_lo, Tensor save_invstd)",
    "batch_norm_apply": "(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor save_mean, Tensor save_mean_lo, Tensor save_invstd, str? activation) -> Tensor",
    "batch_norm_grad_reduce": f"({GRAD_ARGS}str? activation) -> (Tensor sum_dy, Tensor sum_dy_xmu)",
    "batch_norm_grad_apply": f"({GRAD_ARGS}Tensor? count, Tensor? sum_dy, Tensor? sum_dy_xmu, "
    "str? activation, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_residual)",
    "cpu_isa": "() -> str",
    "cpu_isas": "() -> str[]",
}
TENSOR_OPS = [name for name in SCHEMAS if name.startswith("batch_norm")]


def overload(op: str) -> Any:
    return getattr(ops, op).default


def canonical(schema: str) -> str:
    return str(torch._C.parse_schema(schema))


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema(op: str) -> None:
    assert str(overload(op)._schema) == canonical(f"bnext::{op}{SCHEMAS[op]}")


def test_there_are_no_other_ops() -> None:
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("bnext::")}
    hooks = {"cuda_plan", "limit_cuda_device"} if build_info()["cuda"] else set()
    assert names == {f"bnext::{op}" for op in {*SCHEMAS, *hooks}}


# fold has no eval mode: one value per channel is too few for it.
CALLS = [
    pytest.param(op, sample, id=f"{op}-{sample}")
    for op in TENSOR_OPS
    for sample in SAMPLES + EMPTY
    if not (op == "batch_norm_fold" and sample.name == "eval-one-value")
]


@pytest.mark.parametrize(("op", "sample"), CALLS)
def test_opcheck(op: str, sample: Sample) -> None:
    args = sample.args(op)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # The dynamic trace compares gradients too; it is slow, so the grad-free ops take a few of it.
    if op == "batch_norm" or sample in SAMPLES[:6]:
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(overload(op), args, test_utils=tests)


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.dtype in (torch.float32, torch.float64)], ids=str
)
def test_opcheck_with_gradients(sample: Sample) -> None:
    args = list(sample.forward_args())
    for i in (0, 1, 2, 6):  # input, weight, bias, residual
        if args[i] is not None:
            args[i].requires_grad_()
    torch.library.opcheck(overload("batch_norm"), tuple(args))


def to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def as_tuple(value: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


@pytest.mark.parametrize(("op", "sample"), CALLS)
def test_meta_tensors_come_out_as_the_real_ones(op: str, sample: Sample, device: str) -> None:
    args = sample.args(op)
    real = as_tuple(overload(op)(*args))
    with torch._C._AutoDispatchBelowAutograd():  # the executor's ops have no meta kernel
        meta = as_tuple(getattr(torch.ops.bnext, op)(*map(to_meta, sample.args(op))))
    for r, m in zip(real, meta, strict=True):
        assert m.device.type == "meta"
        assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("sample", SAMPLES + EMPTY, ids=str)
def test_shapes_and_dtypes(sample: Sample, device: str) -> None:
    ghosts = 1
    if sample.training and sample.ghost is not None and sample.shape[0]:
        ghosts = -(-sample.shape[0] // sample.ghost)
    acc = torch.float64 if sample.dtype == torch.float64 else torch.float32
    channels = sample.shape[1]
    output, saved = sample.forward()
    assert (output.shape, output.dtype) == (torch.Size(sample.shape), sample.dtype)
    assert [(s.shape, s.dtype) for s in saved] == [((ghosts, channels), acc)] * 3
    grads = ops.batch_norm_backward(*sample.backward_args())
    assert [(g.shape, g.dtype) for g in grads] == [
        (sample.shape, sample.dtype), ((channels,), acc), ((channels,), acc),
        (sample.shape, sample.dtype)]  # fmt: skip
    for mask in ((True, False), (False, True), (False, False)):
        masked = ops.batch_norm_backward(*sample.backward_args(mask))
        parts = ops.batch_norm_grad_apply(*sample.grad_apply_args(mask))
        for i, k in ((0, 0), (3, 1)):
            if mask[k]:
                assert torch.equal(masked[i], grads[i])
                assert_same_parts(parts[k], grads[i], sample.dtype)
            else:
                assert masked[i].shape == parts[k].shape == (0,)
        assert_same_parts(masked[1], grads[1], sample.dtype)
        assert_same_parts(masked[2], grads[2], sample.dtype)


# --- Mutation


def test_buffers_change_in_place_and_autograd_knows(device: str) -> None:
    for op in ("batch_norm", "batch_norm_fold"):
        args = SAMPLES[0].args(op)
        buffers = args[3:6]
        versions = [b._version for b in buffers]
        before = [b.clone() for b in buffers]
        overload(op)(*args)
        assert all(b._version > v for b, v in zip(buffers, versions, strict=True))
        assert not any(torch.equal(b, a) for b, a in zip(buffers, before, strict=True))
        assert buffers[2] == 4


def test_eval_changes_no_buffer(device: str) -> None:
    args = list(SAMPLES[0].forward_args())
    args[7] = False  # training
    before = [b.clone() for b in args[3:6]]
    _, mean, mean_lo, _ = ops.batch_norm(*args)
    assert all(torch.equal(a, b) for a, b in zip(args[3:6], before, strict=True))
    assert torch.equal(mean, before[0][None]) and not mean_lo.any()
    assert mean.data_ptr() != args[3].data_ptr(), "a view of the buffer would change under it"


# --- What has no derivative says so


def differentiable_positions(args: tuple[Any, ...]) -> list[int]:
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]


@pytest.mark.parametrize("op", [op for op in TENSOR_OPS if op != "batch_norm"])
def test_other_ops_refuse_to_differentiate(op: str) -> None:
    sample = next(s for s in SAMPLES if s.name == "channels_last-silu-residual")
    plain = as_tuple(overload(op)(*sample.args(op)))
    for i in differentiable_positions(sample.args(op)):
        args = list(sample.args(op))
        args[i].requires_grad_()
        with pytest.raises(RuntimeError, match="not differentiable|requires? grad"):
            overload(op)(*args)
        if op == "batch_norm_fold" and i in (3, 4):
            continue  # a running statistic may not require grad at all
        with torch.no_grad():
            for a, e in zip(as_tuple(overload(op)(*args)), plain, strict=True):
                assert torch.equal(a, e) and not a.requires_grad


@pytest.mark.parametrize("op", TENSOR_OPS)
def test_no_op_drops_a_tangent(op: str) -> None:
    """A forward-mode tangent goes through or raises; it must not vanish."""
    sample = next(s for s in SAMPLES if s.name == "channels_last-silu-residual")
    for i in differentiable_positions(sample.args(op)):
        args = list(sample.args(op))
        with fwAD.dual_level():
            args[i] = fwAD.make_dual(args[i], torch.ones_like(args[i]))
            try:
                results = as_tuple(overload(op)(*args))
            except (RuntimeError, NotImplementedError):
                continue
            tangents = [fwAD.unpack_dual(r).tangent for r in results if r.is_floating_point()]
            assert any(t is not None for t in tangents), f"argument {i}: the tangent was dropped"


def test_saved_statistics_are_outside_the_graph() -> None:
    args = list(SAMPLES[0].forward_args())
    args[0].requires_grad_()
    output, *saved = ops.batch_norm(*args)
    assert output.requires_grad
    assert not any(s.requires_grad for s in saved)


# --- docs/ops.md

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ops.md"


def sections() -> dict[str, str]:
    parts = re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE)[1:]
    return {p.splitlines()[0].strip().strip("`"): p for p in parts}


@pytest.mark.parametrize("op", SCHEMAS)
def test_op_is_documented(op: str) -> None:
    section = sections()[f"bnext::{op}"]
    schema = re.search(r"```text\n(.*?)```", section, flags=re.DOTALL)
    assert schema, "no schema"
    documented = " ".join(schema[1].split()).replace("( ", "(")
    assert canonical(f"bnext::{documented}") == str(overload(op)._schema)
    if op in TENSOR_OPS:
        for heading in ("**Shapes", "**Errors", "```python"):
            assert heading in section, heading


@pytest.mark.parametrize("op", TENSOR_OPS)
def test_documented_example_runs(op: str) -> None:
    """The examples build on each other: each runs after those above it."""
    names: dict[str, Any] = {}
    for name, section in sections().items():
        for code in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
            exec(compile(code, f"docs/ops.md, {name}", "exec"), names)
        if name == f"bnext::{op}":
            return
    raise AssertionError(f"{op} has no section")
