"""The layers as modules: construction, kinship with torch.nn, state."""

from __future__ import annotations

import inspect

import pytest
import torch
from assertions import assert_same
from cases import ACTIVATIONS
from layers import ACT, ALL, PLAIN, SHAPES, TORCH, assert_same_state, trained
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

PAIRS = tuple(zip(ALL, TORCH * 2, strict=True))  # ours, the one of torch.nn

by_class = pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
by_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda c: c.__name__)


# Construction


@by_pair
def test_constructor_takes_what_torch_takes_in_the_same_order(ours: type, theirs: type) -> None:
    names = list(inspect.signature(ours).parameters)
    positional = [
        "num_features",
        "eps",
        "momentum",
        "affine",
        "track_running_stats",
        "device",
        "dtype",
    ]
    assert names[:7] == positional == list(inspect.signature(theirs).parameters)[:7]
    extra = {"bias", "ghost_batch_size", "process_group", "skip_nonfinite"}
    extra |= {"activation"} if ours in ACT else set()
    keywords = inspect.signature(ours).parameters
    assert set(names[7:]) == extra
    assert all(keywords[n].kind is inspect.Parameter.KEYWORD_ONLY for n in extra)


@by_pair
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps": 1e-3, "momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_attributes_and_first_values_are_those_of_torch(
    ours: type, theirs: type, options: dict
) -> None:
    a, b = ours(6, **options), theirs(6, **options)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        mine, his = getattr(a, name), getattr(b, name)
        assert (mine is None) == (his is None), name
        if his is not None:
            assert_same(mine.detach(), his.detach(), name)
            assert isinstance(mine, nn.Parameter) == isinstance(his, nn.Parameter)
    assert a.ghost_batch_size is None


@by_class
def test_bias_false_leaves_the_weight(cls: type) -> None:
    layer = cls(6, bias=False)
    assert layer.bias is None and layer.weight.shape == (6,)
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    assert "bias" not in layer.state_dict()


@by_class
@pytest.mark.parametrize("options", [{"bias": False}, {"affine": False}], ids=str)
def test_reset_parameters_leaves_alone_what_is_not_there(cls: type, options: dict) -> None:
    layer = trained(cls, **options)
    layer.reset_parameters()
    assert_same_state(layer, cls(6, **options))


@pytest.mark.parametrize("cls", ACT)
def test_activation_defaults_to_relu_and_is_an_attribute(cls: type) -> None:
    assert cls(6).activation == "relu"
    assert (cls(6)(torch.randn(SHAPES[cls])) >= 0).all()
    for name in ACTIVATIONS:
        assert cls(6, activation=name).activation == name


@by_pair
def test_repr_adds_to_that_of_torch(ours: type, theirs: type) -> None:
    assert ours(6).extra_repr().startswith(theirs(6).extra_repr())
    text = repr(ours(6, eps=0.5, momentum=None, ghost_batch_size=32))
    assert text.startswith(ours.__name__ + "(6, eps=0.5, momentum=None")
    assert "ghost_batch_size=32" in text
    if ours in ACT:
        assert "silu" in repr(ours(6, activation="silu"))
    else:
        assert ours(6).extra_repr() == theirs(6).extra_repr()


@by_class
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ghost_batch_size": 0}, "ghost_batch_size"),
        ({"ghost_batch_size": -4}, "ghost_batch_size"),
        ({"ghost_batch_size": 2.0}, "ghost_batch_size"),
        ({"ghost_batch_size": True}, "ghost_batch_size"),
        ({"ghost_batch_size": "32"}, "ghost_batch_size"),
    ],
    ids=str,
)
def test_bad_constructor_arguments(cls: type, options: dict, error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        cls(6, **options)


@pytest.mark.parametrize("cls", ACT)
@pytest.mark.parametrize("activation", ["tanh", "ReLU", "", 1, nn.ReLU()])
def test_bad_activation_lists_the_good_ones(cls: type, activation: object) -> None:
    with pytest.raises(ValueError, match="activation.*relu.*leaky_relu.*silu"):
        cls(6, activation=activation)


@pytest.mark.parametrize("cls", PLAIN)
def test_plain_layer_takes_no_activation_and_no_residual(cls: type) -> None:
    with pytest.raises(TypeError, match="activation"):
        cls(6, activation="relu")
    x = torch.randn(SHAPES[cls])
    with pytest.raises(TypeError):
        cls(6)(x, x)


# Kinship


@pytest.mark.parametrize(("ours", "theirs"), PAIRS[:3])
def test_plain_layer_is_a_torch_layer(ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)


@pytest.mark.parametrize("cls", ACT)
def test_act_layer_is_not_a_torch_batch_norm(cls: type) -> None:
    """Tools that replace or fold a _BatchNorm would drop the activation."""
    assert not issubclass(cls, _BatchNorm)
    model = nn.Sequential(cls(6))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is cls and converted[0] is model[0]


# State


@by_pair
def test_state_dict_is_that_of_torch(ours: type, theirs: type) -> None:
    a, b = ours(6).state_dict(), theirs(6).state_dict()
    assert list(a) == list(b)
    assert [(v.shape, v.dtype) for v in a.values()] == [(v.shape, v.dtype) for v in b.values()]
    assert a._metadata == b._metadata
    assert a._metadata[""]["version"] == 2


@by_pair
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_checkpoints_load_both_ways(ours: type, theirs: type, options: dict) -> None:
    source = trained(theirs, **options)
    layer = ours(6, **options)
    assert str(layer.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
    assert_same_state(layer, source)
    source = trained(ours, **options)
    layer = theirs(6, **options)
    layer.load_state_dict(source.state_dict())
    assert_same_state(layer, source)


@by_pair
def test_version_1_checkpoint_without_num_batches_tracked(ours: type, theirs: type) -> None:
    state = trained(theirs).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer = ours(6)
    layer.load_state_dict(state)
    assert int(layer.num_batches_tracked) == 0
    assert_same(layer.running_mean, state["running_mean"])
    # Since version 2 the key is required.
    state = trained(theirs).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match='Missing key.*"num_batches_tracked"'):
        ours(6).load_state_dict(state)


@by_class
def test_state_dict_of_another_size_is_refused(cls: type) -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        cls(6).load_state_dict(cls(7).state_dict())


@by_class
def test_load_with_assign(cls: type) -> None:
    source = trained(cls)
    with torch.device("meta"):
        layer = cls(6)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(SHAPES[cls])
    assert_same(layer.eval()(x), source.eval()(x))


@by_pair
def test_reset(ours: type, theirs: type) -> None:
    layer = trained(ours)
    weight = layer.weight.detach().clone()
    layer.reset_running_stats()
    assert_same(layer.running_mean, torch.zeros(6))
    assert_same(layer.running_var, torch.ones(6))
    assert int(layer.num_batches_tracked) == 0
    assert_same(layer.weight.detach(), weight)
    layer.reset_parameters()
    assert_same_state(layer, theirs(6))
