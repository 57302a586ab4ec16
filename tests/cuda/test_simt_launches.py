"""What is around the kernels, on the executor: capture, errors, and plans that are forced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import executor
import pytest
import simt_build
import torch
from assertions import assert_same
from cases import Case
from executor import GPUS
from layers import make_layer
from test_forced_plans import CASES

pytestmark = pytest.mark.skipif(
    simt_build.cuda_include() is None, reason="no cuda_fp16.h: install the CUDA headers' wheel"
)


@pytest.fixture
def library() -> Iterator[Any]:
    with executor.running_on(GPUS["two_sms"]) as found:
        yield found
        found.set_capturing(False)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("shape", [(33, 13), (64, 13, 7, 7), (3, 2, 2)], ids=str)
def test_capture(library: Any, shape: tuple[int, ...], track: bool) -> None:
    """A graph gets counters of its own, and none where a launch needs none (the last shape's,
    without running statistics)."""
    case = Case(shape)
    x, weight, bias = case.input(), *list(case.parameters().values())[:2]

    def forward() -> Any:
        running = list(case.parameters().values())[2:] if track else [None, None]
        return library.batch_norm(
            x, weight, bias, *running, None, None, True, 0.1, 1e-5, None, None
        )

    want = forward()
    library.set_capturing(True)
    for have, expected in zip(forward(), want, strict=True):
        assert_same(have, expected)


def test_an_error_is_told_once(library: Any) -> None:
    """It does not come up again in the next check that torch makes, and nothing has changed."""
    layer = make_layer(Case((33, 13)))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    versions = {name: buffer._version for name, buffer in layer.named_buffers()}
    library.fail_next_launch()
    with pytest.raises(RuntimeError, match=r"bnext: \w+ failed on the device: cudaErrorLaunchFail"):
        layer(Case((33, 13)).input())
    assert library.last_error() == 0
    for name, buffer in layer.named_buffers():
        assert_same(buffer, before[name], name)
        assert buffer._version == versions[name]
    layer(Case((33, 13)).input())
    assert int(layer.num_batches_tracked) == int(before["num_batches_tracked"]) + 1


def test_forced_plans_are_of_every_kind() -> None:
    """What test_forced_plans.py runs: teams, lone blocks and two passes, over rows and planes, by
    vectors and by single elements, with 32-bit and 64-bit offsets."""
    plans = set()
    for gpu in GPUS.values():
        with executor.running_on(gpu) as library:
            for case in CASES:
                for tensors in (1, 2):
                    layout, kind, _, *rest = library.cuda_plan(case.input(), None, tensors).split()
                    plans.add((layout.rstrip(":"), kind, "scalar" in rest, "wide" in rest))
    kinds = {(rows, kind, scalar, wide) for rows in ("rows", "planes")
             for kind in ("lone", "team", "two-pass") for scalar in (False, True)
             for wide in (False, True) if not wide or kind == "two-pass"}  # fmt: skip
    assert plans >= kinds, kinds - plans


def test_bad_limits_are_refused(library: Any) -> None:
    with pytest.raises(RuntimeError, match="num_sms, .* must be positive, got 0, 1 and 1"):
        library.limit_cuda_device(0, 1, 1, 0)
    with pytest.raises(RuntimeError, match="tensors must be 1, 2 or 3, got 4"):
        library.cuda_plan(torch.ones(2, 2), None, 4)
