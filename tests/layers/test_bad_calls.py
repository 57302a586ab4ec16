"""Bad calls fail with an error that names the argument, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_calls import FUNCTIONAL, Bad, functional_call
from bad_op_calls import GOOD_OP_CALLS, OPS
from layers import ACT, ALL, PLAIN, SHAPES
from torch import Tensor, nn

import bnext


def has_values(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def assert_fails_and_changes_nothing(
    call: Callable[[], Any], tensors: dict[str, Any], bad: Bad
) -> None:
    tensors = {name: t for name, t in tensors.items() if has_values(t)}
    before = {name: (t.detach().clone(), t._version) for name, t in tensors.items()}
    with pytest.raises(bad.errors, match=bad.match):
        call()
    for name, tensor in tensors.items():
        values, version = before[name]
        assert torch.equal(tensor.detach(), values), f"{name} was changed"
        assert tensor._version == version, f"{name} was written to"


@pytest.mark.parametrize("bad", FUNCTIONAL, ids=str)
def test_functional(bad: Bad) -> None:
    arguments = functional_call() | bad.change()
    assert_fails_and_changes_nothing(lambda: bnext.batch_norm(**arguments), arguments, bad)


def on_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value


# These are not about what a meta tensor has: shape, dtype and dense strides.
NOT_FOR_META = ("meta", "requires_grad", "overlapping", "sparse", "a_list", "a_number")
META = [bad for bad in FUNCTIONAL if not any(word in bad.name for word in NOT_FOR_META)]


@pytest.mark.parametrize("bad", META, ids=str)
def test_functional_on_meta(bad: Bad) -> None:
    """Shapes are checked without values too, so a graph is not traced from a bad call."""
    arguments = {k: on_meta(v) for k, v in (functional_call() | bad.change()).items()}
    with pytest.raises(bad.errors, match=bad.match):
        bnext.batch_norm(**arguments)


@pytest.mark.parametrize(
    ("op", "bad"), [(op, bad) for op, bads in OPS.items() for bad in bads], ids=str
)
def test_raw_op(op: str, bad: Bad) -> None:
    arguments = GOOD_OP_CALLS[op]() | bad.change()
    function = getattr(torch.ops.bnext, op)
    assert_fails_and_changes_nothing(lambda: function(**arguments), arguments, bad)


@pytest.mark.parametrize("op", GOOD_OP_CALLS)
def test_the_unchanged_call_of_a_raw_op_is_good(op: str) -> None:
    """Otherwise the tests above would show nothing."""
    results = getattr(torch.ops.bnext, op)(**GOOD_OP_CALLS[op]())
    assert results is not None
    assert OPS[op], "each op has bad calls"


def test_the_unchanged_call_of_the_functional_is_good() -> None:
    assert bnext.batch_norm(**functional_call()).isfinite().all()


def test_the_tables_are_complete() -> None:
    assert len({bad.name for bad in FUNCTIONAL}) == len(FUNCTIONAL) >= 40
    assert sum(len({bad.name for bad in bads}) for bads in OPS.values()) >= 15 + len(FUNCTIONAL)
    registered = {
        name.removeprefix("bnext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("bnext::batch_norm")
    }
    assert registered == set(OPS), "every op has its bad calls here"


# Layers: what is wrong with the input, of a layer of 6 channels


RANK_MESSAGES = {1: r"expected 2D or 3D input \(got 4D input\)", 2: "expected 4D", 3: "expected 5D"}
INPUTS: dict[str, tuple[Callable[[type], Tensor], str]] = {
    "rank_1": (lambda cls: torch.randn(6), r"expected .*D input \(got 1D input\)"),
    "num_features": (
        lambda cls: torch.randn(4, 7, *SHAPES[cls][2:]),
        "(running_mean|running_var|weight|bias)",
    ),
    "integers": (lambda cls: torch.ones(SHAPES[cls]).long(), "input.*dtype"),
    "double": (
        lambda cls: torch.randn(SHAPES[cls]).double(),
        "(running_mean|running_var|weight|bias).*dtype",
    ),
    "meta": (
        lambda cls: torch.ones(SHAPES[cls], device="meta"),
        "(running_mean|running_var|weight|bias).*device",
    ),
    "one_value": (
        lambda cls: torch.randn(1, 6, *[1] * (len(SHAPES[cls]) - 2)),
        "Expected more than 1 value per channel when training",
    ),
}


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


@pytest.mark.parametrize("wrong", INPUTS)
@pytest.mark.parametrize("cls", ALL)
def test_layer_input(cls: type, wrong: str) -> None:
    """num_batches_tracked does not count a batch that failed."""
    make, message = INPUTS[wrong]
    layer, x = cls(6), make(cls)
    bad = Bad(wrong, dict, message)
    assert_fails_and_changes_nothing(lambda: layer(x), {**state_of(layer), "input": x}, bad)
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("cls", ALL)
def test_layer_rank(cls: type) -> None:
    rank = int(cls.__name__[-2])
    x = torch.randn(4, 6, 5, 5) if rank != 2 else torch.randn(4, 6, 5)
    layer = cls(6)
    bad = Bad("rank", dict, RANK_MESSAGES[rank], (ValueError,))
    assert_fails_and_changes_nothing(lambda: layer(x), state_of(layer), bad)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("eps", 0.0, "batch_norm eps must be positive during training, but got 0"),
        ("eps", -1.0, "batch_norm eps must be positive during training, but got -1"),
        ("ghost_batch_size", 0, "ghost_batch_size"),
        ("ghost_batch_size", 1.5, "ghost_batch_size"),
    ],
)
def test_layer_attribute_set_later(cls: type, option: str, value: object, message: str) -> None:
    layer = cls(6)
    try:
        setattr(layer, option, value)
    except (ValueError, TypeError) as error:  # refused where it is set: as good
        assert option in str(error)
        return
    x = torch.randn(SHAPES[cls])
    bad = Bad(option, dict, message, (ValueError, TypeError, RuntimeError))
    assert_fails_and_changes_nothing(lambda: layer(x), {**state_of(layer), "input": x}, bad)


@pytest.mark.parametrize("cls", ACT)
@pytest.mark.parametrize(
    "change",
    [
        lambda r: r[:1],
        lambda r: r[:, :, None],
        lambda r: r.double(),
        lambda r: r.to("meta"),
        lambda r: r.to_sparse(),
        lambda r: r.tolist(),
    ],
    ids=["shape", "rank", "dtype", "device", "sparse", "list"],
)
def test_layer_residual(cls: type, change: Callable[[Tensor], Any]) -> None:
    layer, x = cls(6), torch.randn(SHAPES[cls])
    residual = change(torch.randn(SHAPES[cls]))
    bad = Bad("residual", dict, "residual", (ValueError, RuntimeError, TypeError))
    assert_fails_and_changes_nothing(
        lambda: layer(x, residual), {**state_of(layer), "input": x, "residual": residual}, bad
    )


@pytest.mark.parametrize("cls", PLAIN)
def test_eval_after_the_buffers_were_removed(cls: type) -> None:
    """A layer that lost one of its two statistics says so, and does not fall back to the batch."""
    layer = cls(6).eval()
    layer.running_var = None
    bad = Bad("running_var", dict, "running_mean|running_var")
    assert_fails_and_changes_nothing(lambda: layer(torch.randn(SHAPES[cls])), state_of(layer), bad)
