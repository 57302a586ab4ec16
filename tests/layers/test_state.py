"""State is never lost: not by a call that raises, nor by what comes between micro-batches, nor by
tools that copy, freeze or average."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils import parametrize
from torch.optim import swa_utils

import bnext


def model() -> nn.Module:
    torch.manual_seed(0)
    return bnext.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))


def batches(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 5, 5, generator=generator) + 2 for _ in range(n)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def assert_state(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# --- a call that raises has changed nothing


def inference_tensor(*shape: int) -> Tensor:
    with torch.inference_mode():
        return torch.randn(shape) + 5


def in_a_hook_that_raises(call: Callable[[], Any]) -> None:
    def pack(tensor: Tensor) -> Tensor:
        raise RuntimeError("no room to save")

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()


@pytest.mark.parametrize("steps", [1, 2, "skip"])
@pytest.mark.parametrize(
    "how", ["inference tensor", "inference residual", "hook", "dtype", "shape"]
)
def test_a_call_that_raises_changes_no_buffer(how: str, steps: Any) -> None:
    layer = bnext.BatchNormAct2d(3)
    if steps == "skip":
        bnext.skip_nonfinite(layer)
    elif steps > 1:
        bnext.accumulate(layer, steps)
        layer(torch.randn(4, 3, 2, 2))  # waits
    before = state(layer)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    calls: dict[str, Callable[[], Any]] = {
        "inference tensor": lambda: layer(inference_tensor(4, 3, 2, 2)),
        "inference residual": lambda: layer(x, inference_tensor(4, 3, 2, 2)),
        "hook": lambda: in_a_hook_that_raises(lambda: layer(x)),
        "dtype": lambda: layer(x.double()),
        "shape": lambda: layer(torch.randn(4, 2, 2, 2)),
    }
    with pytest.raises(RuntimeError):
        calls[how]()
    assert_state(layer, before)
    if steps == 2:  # one micro-batch still waits, and this one completes it
        layer(torch.randn(4, 3, 2, 2))
        assert int(layer.num_batches_tracked) == 1


def test_an_inference_tensor_is_named() -> None:
    with pytest.raises(RuntimeError, match="input must not be an inference tensor"):
        bnext.BatchNorm2d(3)(inference_tensor(4, 3, 2, 2))
    with torch.no_grad():
        bnext.BatchNorm2d(3)(inference_tensor(4, 3, 2, 2))  # nothing is saved


# --- what waits for its update


@pytest.mark.parametrize("what", ["reset_running_stats", "reset_parameters", "load_state_dict"])
def test_what_replaces_the_statistics_drops_what_waits(what: str) -> None:
    layer = bnext.BatchNorm1d(1, momentum=1.0)
    bnext.accumulate(layer, 2)
    layer(torch.tensor([[1000.0], [1002.0]]))
    arguments = [bnext.BatchNorm1d(1).state_dict()] if what == "load_state_dict" else []
    getattr(layer, what)(*arguments)
    for _ in range(2):
        layer(torch.tensor([[-1.0], [1.0]]))
    assert layer.running_mean.item() == 0


def test_reset_counts_non_finite_batches_anew() -> None:
    layer = bnext.BatchNorm2d(3, device="meta", skip_nonfinite=True).to_empty(device="cpu")
    layer.nonfinite_batches.fill_(7)
    layer.reset_parameters()
    assert int(layer.nonfinite_batches) == 0


# --- update_bn


def test_update_bn_leaves_frozen_layers_as_they_are() -> None:
    network = nn.Sequential(model(), nn.Conv2d(4, 3, 1), bnext.BatchNorm2d(3))
    for x in batches():
        network(x)
    bnext.freeze(network[0])
    before = state(network[0])
    bnext.update_bn(batches(), network)
    assert_state(network[0], before)
    assert int(network[2].num_batches_tracked) == 3


@pytest.mark.parametrize("waits", [0, 1])
def test_update_bn_of_an_accumulating_model(waits: int) -> None:
    expected, found = model(), model()
    bnext.update_bn(batches(), expected)
    bnext.accumulate(found, 4)
    for x in batches(waits):
        found(x * 100)
    bnext.update_bn(batches(), found)
    torch.testing.assert_close(found[1].running_mean, expected[1].running_mean)
    torch.testing.assert_close(found[1].running_var, expected[1].running_var)
    assert found[1]._accumulation.steps == 4 and found[1].momentum == expected[1].momentum


def test_averaged_models() -> None:
    """A counter that swa_utils has made float, and update_bn of the average."""
    network = model()
    averaged = swa_utils.AveragedModel(network, use_buffers=True)
    averaged.update_parameters(network)
    bnext.update_bn(batches(), averaged)
    assert int(averaged.module[1].num_batches_tracked) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("steps", [1, 2])
def test_counters_of_any_dtype(dtype: torch.dtype, momentum: float | None, steps: int) -> None:
    layers = [bnext.BatchNorm2d(3, momentum=momentum) for _ in range(2)]
    for layer in layers:
        bnext.accumulate(layer, steps)
    layers[1].num_batches_tracked = layers[1].num_batches_tracked.to(dtype)
    for x in batches(4):
        for layer in layers:
            layer(x)
    assert int(layers[1].num_batches_tracked) == int(layers[0].num_batches_tracked) == 4 // steps
    assert layers[1].num_batches_tracked.dtype == dtype
    assert torch.equal(layers[1].running_var, layers[0].running_var)


# --- frozen is frozen


def train(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)
    network(batches(1)[0]).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("then", ["nothing", "requires_grad_", "train"])
def test_frozen_parameters_beside_an_optimizer(optimizer: Any, then: str) -> None:
    network = model()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = optimizer(network.parameters(), lr=0.1, weight_decay=0.1, **options)
    train(network, steps)
    bnext.freeze(network)
    if then == "requires_grad_":
        network.requires_grad_(True)
    network.train()
    before = state(network[1])
    for _ in range(2):
        train(network, steps)
    assert_state(network[1], before)


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp()


def test_a_parametrized_layer() -> None:
    network = model()
    parametrize.register_parametrization(network[1], "weight", Positive())
    expected = copy.deepcopy(network)(batches(1)[0])
    bnext.freeze(network)
    assert not any(p.requires_grad for p in network[1].parameters())
    groups = bnext.param_groups(network, 0.1)
    assert {id(p) for p in network[1].parameters()} == {id(p) for p in groups[1]["params"]}
    bnext.unfreeze(network)
    assert all(p.requires_grad for p in network[1].parameters())
    plain = bnext.revert(network)
    assert isinstance(plain[1], nn.BatchNorm2d) and not isinstance(plain[1], bnext.BatchNorm2d)
    torch.testing.assert_close(plain(batches(1)[0]), expected)


def test_unfreeze_after_a_parameter_was_removed() -> None:
    layer = bnext.BatchNorm2d(3)
    bnext.freeze(layer)
    layer.bias = None
    bnext.unfreeze(layer)
    assert layer.weight.requires_grad and not layer.frozen


def test_freezing_twice_takes_back_what_came_between() -> None:
    network = bnext.freeze(model())
    network.requires_grad_(True)
    bnext.freeze(network)
    assert not network[1].weight.requires_grad
    assert bnext.unfreeze(network)[1].weight.requires_grad


# --- copies


def test_copies_share_a_process_group(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        network = bnext.convert_sync(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), group)
        assert copy.deepcopy(network)[1].process_group is group
        assert copy.copy(network[1]).process_group is group
        assert type(bnext.revert(network)[1]) is nn.BatchNorm2d
        assert len(list(bnext.fold(network.eval()).modules())) == 3
        loaded = pickle.loads(pickle.dumps(network))
        assert loaded[1].process_group == "default"
    finally:
        dist.destroy_process_group()


def test_synchronised_norms_keep_their_group(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        plain = nn.Sequential(nn.SyncBatchNorm(3, process_group=group))
        converted = bnext.convert(plain, inplace=True)
        assert converted[0].process_group is group
        assert bnext.revert(converted, inplace=True)[0].process_group is group
    finally:
        dist.destroy_process_group()


def test_the_message_names_a_dtype_once() -> None:
    with pytest.raises(RuntimeError, match="input's dtype Double, got dtype Float"):
        bnext.BatchNorm2d(3)(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="dtype Half or dtype Float, got dtype Double"):
        bnext.BatchNorm2d(3).double()(torch.randn(4, 3, 2, 2, dtype=torch.float16))
