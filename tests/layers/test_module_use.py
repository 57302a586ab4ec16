"""The layers in models: copies and moves, parametrization, sharing, schedules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from assertions import assert_same
from layers import ACT, ALL, PLAIN, SHAPES, TORCH, assert_same_state, sample, trained
from op_samples import ops
from torch import Tensor, nn
from torch.nn.utils import parametrize

PAIRS = tuple(zip(ALL, TORCH * 2, strict=True))  # ours, the one of torch.nn

by_class = pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
on_each_device = pytest.mark.usefixtures("device")
by_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda c: c.__name__)


# Copies and moves


def saved_and_loaded(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@on_each_device
@by_class
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch_save"],
)
def test_copies(cls: type, duplicate) -> None:
    options = {"activation": "silu"} if cls in ACT else {}
    layer = trained(cls, ghost_batch_size=2, eps=1e-3, momentum=None, **options)
    twin = duplicate(layer)
    assert type(twin) is cls and repr(twin) == repr(layer)
    assert_same_state(twin, layer)
    x = sample(cls)
    before = layer.running_mean.clone()
    y = twin(x)
    assert_same(layer.running_mean, before, "the copy shares no buffer")
    assert_same(layer(x), y)
    assert_same_state(twin, layer)


@by_class
def test_torch_load_of_a_state_dict(cls: type) -> None:
    layer = trained(cls)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = cls(6)
    twin.load_state_dict(torch.load(file))
    assert_same_state(twin, layer)


@on_each_device
@by_class
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moves_to_a_dtype(cls: type, dtype: torch.dtype) -> None:
    layer = trained(cls).to(dtype)
    assert layer.num_batches_tracked.dtype == torch.int64
    y = layer(sample(cls).to(dtype))
    assert y.dtype == dtype == layer.running_mean.dtype == layer.weight.dtype
    assert int(layer.num_batches_tracked) == 2
    y.sum().backward()
    assert layer.weight.grad.dtype == dtype


@on_each_device
@by_class
@pytest.mark.parametrize("method", ["half", "bfloat16", "float", "double"])
def test_dtype_methods(cls: type, method: str) -> None:
    layer = getattr(trained(cls), method)()
    x = getattr(sample(cls), method)()
    assert layer(x).dtype == x.dtype
    if method in ("half", "bfloat16"):  # parameters in float32 beside an input of half size
        assert layer.float()(x).dtype == x.dtype
        assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("cls", "format"),
    [
        (cls, format)
        for rank, format in ((2, torch.channels_last), (3, torch.channels_last_3d))
        for cls in (PLAIN[rank - 1], ACT[rank - 1])
    ],
)
def test_moves_to_a_memory_format(cls: type, format: torch.memory_format) -> None:
    model = nn.Sequential(trained(cls)).to(memory_format=format)
    x = sample(cls).to(memory_format=format)
    assert model(x).is_contiguous(memory_format=format)


@by_class
def test_meta_device(cls: type) -> None:
    layer = cls(6, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    y = layer(torch.randn(SHAPES[cls], device="meta"))
    assert y.is_meta and y.shape == SHAPES[cls]
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert_same_state(layer, cls(6))
    x = sample(cls)
    assert_same(layer(x), cls(6)(x))


@by_class
def test_to_a_device(cls: type, device: str) -> None:
    layer = trained(cls).cpu().to(device)
    y = layer(torch.randn(SHAPES[cls], device=device))
    assert y.device.type == device == layer.running_mean.device.type


# Use in models


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@on_each_device
@by_class
def test_parametrized_weight(cls: type) -> None:
    layer, plain = trained(cls), trained(cls)
    parametrize.register_parametrization(layer, "weight", Double())
    with torch.no_grad():
        plain.weight.mul_(2)
    x = sample(cls)
    y = layer(x)
    assert_same(y, plain(x))
    y.sum().backward()
    plain(x).sum().backward()
    original = layer.parametrizations.weight.original
    torch.testing.assert_close(original.grad, 2 * plain.weight.grad)


@by_class
def test_a_buffer_replaced_by_a_parameter_is_used(cls: type) -> None:
    layer = trained(cls).eval()
    x = sample(cls)
    want = layer(x)
    mean = layer.running_mean
    del layer.running_mean
    layer.running_mean = nn.Parameter(mean, requires_grad=False)
    assert_same(layer(x), want)


@on_each_device
@by_class
def test_shared_layer_counts_every_call_and_adds_its_gradients(cls: type) -> None:
    layer = trained(cls)
    twin = copy.deepcopy(layer)
    a, b = torch.randn(2, *SHAPES[cls], device=ops.device)
    (layer(a).sum() + (2 * layer(b)).sum()).backward()
    assert int(layer.num_batches_tracked) == 3
    grad = torch.zeros(6, device=ops.device)
    for x, factor in ((a, 1), (b, 2)):
        twin.zero_grad()
        (factor * twin(x)).sum().backward()
        grad += twin.bias.grad
    torch.testing.assert_close(layer.bias.grad, grad)
    assert_same_state(layer, twin)


@on_each_device
@by_pair
def test_replacing_the_class_keeps_the_function(ours: type, theirs: type) -> None:
    """A plain layer computes what its base class computes, in train and in eval."""
    layer = (ours(6, activation=None) if ours in ACT else ours(6)).to(ops.device)
    other = theirs(6, device=ops.device)
    for step in range(3):
        x = torch.randn(SHAPES[ours], generator=torch.Generator().manual_seed(step))
        x = x.to(ops.device)
        torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, other.running_var)
    torch.testing.assert_close(layer.eval()(x), other.eval()(x), rtol=1e-5, atol=1e-6)


@on_each_device
@by_class
def test_momentum_and_eps_may_change_after_construction(cls: type) -> None:
    """Schedules set layer.momentum; the layer must read it at every call."""
    layer = cls(6, device=ops.device)
    x = sample(cls) + 3
    layer.momentum = 1.0
    layer(x)
    dims = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(layer.running_mean, x.mean(dims))
    layer.eval()
    first = layer(x)
    layer.eps = 10.0
    assert (layer(x).abs() < first.abs()).any()


@on_each_device
@by_class
def test_frozen_statistics_by_eval_in_a_training_model(cls: type) -> None:
    layer = trained(cls).eval()
    before = copy.deepcopy(layer)
    layer(sample(cls)).sum().backward()
    assert_same_state(layer, before)
    assert layer.weight.grad is not None
