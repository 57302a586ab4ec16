"""The ops called without torch.ops: the same results, errors and overrides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_same
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bnext import ops

ARGS = {
    "momentum": (8, None),
    "eps": (9, 1),
    "activation": (10, None),
    "ghost_batch_size": (11, 3),
}


def forward_args(**changed: Any) -> list[Any]:
    torch.manual_seed(0)
    args = [torch.randn(8, 5), torch.rand(5), None, torch.zeros(5), torch.ones(5)]
    args += [torch.tensor(0), None, True, 0.1, 1e-5, "relu", None]
    for name, value in changed.items():
        args[ARGS[name][0]] = value
    return args


class Wrapped(Tensor):
    pass


@pytest.mark.parametrize("name", [None, *ARGS])
def test_forward_is_the_op(name: str | None) -> None:
    changed = {} if name is None else {name: ARGS[name][1]}
    ours, theirs = forward_args(**changed), forward_args(**changed)
    for a, b in zip(ops.batch_norm_below_autograd(*ours), ops.batch_norm(*theirs), strict=True):
        assert_same(a, b, "output")
    for a, b in zip(ours[3:6], theirs[3:6], strict=True):
        assert_same(a, b, "buffer")


@pytest.mark.parametrize("mask", [[True, False], (False, True), [True, True]])
def test_backward_is_the_op(mask: Any) -> None:
    forward = forward_args()
    stats = ops.batch_norm(*forward)[1:]
    args = (torch.randn(8, 5), *forward[:3], None, None, *stats, True, "relu", mask)
    expected = torch.ops.bnext.batch_norm_backward(*args)
    for a, b in zip(ops.batch_norm_backward_below_autograd(*args), expected, strict=True):
        assert_same(a, b, "gradient")


@pytest.mark.parametrize(
    "change",
    [{0: None}, {0: [1.0]}, {1: 2.0}, {9: None}, {10: 3}, {10: "rélu"}, {11: 2**70}, {}],
    ids=str,
)
def test_errors_are_those_of_torch_ops(change: dict[int, Any]) -> None:
    """Also the empty change, which is one argument too many."""
    args = forward_args()
    for i, value in change.items():
        args[i] = value
    args = args if change else [*args, None]
    with pytest.raises(Exception) as expected:
        torch.ops.bnext.batch_norm.default(*args)
    with pytest.raises(type(expected.value)) as got:
        ops.batch_norm_below_autograd(*args)
    assert str(got.value) == str(expected.value)


def test_a_subclass_keeps_its_override() -> None:
    args = forward_args()
    args[0] = args[0].as_subclass(Wrapped)
    assert type(ops.batch_norm_below_autograd(*args)[0]) is Wrapped


def test_modes_see_the_op() -> None:
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for mode in Functions, Dispatches:
        with mode():
            ops.batch_norm_below_autograd(*forward_args())
        assert torch.ops.bnext.batch_norm.default in seen
        seen.clear()


def test_autograd_is_left_out() -> None:
    args = forward_args()
    args[0].requires_grad_()
    assert not ops.batch_norm_below_autograd(*args)[0].requires_grad
    assert ops.batch_norm(*args)[0].requires_grad
