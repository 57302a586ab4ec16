"""What a model's batch norms do over a training run: freezing, accumulation, checkpoints, batches
that are not finite, weight decay. `naive` tests show that plain code fails at it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import ACTIVATIONS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext
from bnext.activations import FROM_OUTPUT


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(activation: str | None = "relu", **options: object) -> bnext.BatchNormAct2d:
    torch.manual_seed(0)
    norm = bnext.BatchNormAct2d(3, activation=activation, dtype=torch.float64, **options)
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- freeze


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_frozen_layer_is_an_affine_function(activation: str | None, residual: bool) -> None:
    norm = layer(activation, ghost_batch_size=2)
    frozen = bnext.freeze(copy.deepcopy(norm)).train()
    norm.eval()
    assert not any(p.requires_grad for p in frozen.parameters())
    before = buffers(frozen)
    x, r, grad = (randn(4, 3, 5, 6, seed=s) for s in range(3))
    results = []
    for model in (frozen, norm):
        inputs = [x.clone().requires_grad_()] + ([r.clone().requires_grad_()] if residual else [])
        output = model(*inputs)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, grad)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    assert_equal(buffers(frozen), before)


def kept_for_backward(call: Callable[[], Tensor]) -> set[int]:
    """Where the tensors lie that autograd keeps."""
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    return kept - {output.data_ptr()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_frozen_layer_keeps_nothing_of_its_input(activation: str | None) -> None:
    norm = layer(activation)
    x = randn(4, 3, 5, 6).requires_grad_()
    assert x.data_ptr() in kept_for_backward(lambda: norm(x))
    bnext.freeze(norm)
    keeps_input = activation is not None and activation not in FROM_OUTPUT
    assert (x.data_ptr() in kept_for_backward(lambda: norm(x))) == keeps_input


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_of_a_frozen_layer(activation: str | None) -> None:
    norm = bnext.freeze(layer(activation))
    x = randn(2, 3, 2, 2, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_unfreeze_restores_what_was() -> None:
    model = nn.Sequential(layer(), layer())
    model[0].weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    assert bnext.freeze(bnext.freeze(model)) is model
    assert "frozen=True" in repr(model)
    bnext.unfreeze(model)
    assert [p.requires_grad for p in model.parameters()] == before
    assert "frozen" not in repr(model)
    old = buffers(model)
    model(randn(4, 3, 5, 6))
    assert not torch.equal(old[0], model[0].running_mean)


def test_revert_undoes_what_was_set() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    model = bnext.convert_sync(plain, ghost_batch_size=2)
    bnext.accumulate(bnext.skip_nonfinite(bnext.freeze(model)), 2)
    back = bnext.revert(model)
    for found, expected in zip(back.modules(), plain.modules(), strict=True):
        assert type(found) is type(expected)
        assert vars(found).keys() == vars(expected).keys()
    assert all(p.requires_grad for p in back.parameters())
    assert list(dict(back.named_buffers())) == list(dict(plain.named_buffers()))


# --- accumulate


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("ghost", [None, 2])
def test_accumulated_statistics_are_those_of_the_whole_batch(
    momentum: float | None, ghost: int | None
) -> None:
    model = bnext.accumulate(layer(momentum=momentum, ghost_batch_size=ghost), 3)
    whole = layer(momentum=momentum)
    for step in range(2):
        batch = randn(9, 3, 5, 6, seed=step) + 1e3
        for part in batch.split([2, 4, 3]):
            expected = layer(ghost_batch_size=ghost)(part)
            torch.testing.assert_close(model(part), expected, rtol=1e-12, atol=1e-12)
        whole(batch)
        for found, expected in zip(model.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_naive_accumulation_is_another_average() -> None:
    naive, whole = layer(), layer()
    batch = randn(9, 3, 5, 6) + 1e3
    for part in batch.split([2, 4, 3]):
        naive(part)
    whole(batch)
    assert naive.num_batches_tracked == 3
    assert not torch.allclose(naive.running_var, whole.running_var, rtol=1e-3)


def test_accumulating_gradients_are_the_layers() -> None:
    found, expected = (randn(4, 3, 5, 6).requires_grad_() for _ in range(2))
    bnext.accumulate(layer("silu"), 2)(found, found * 2).square().sum().backward()
    layer("silu")(expected, expected * 2).square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_second_derivatives_in_steps_are_an_error() -> None:
    x = randn(4, 3, 5, 6).requires_grad_()
    output = bnext.accumulate(layer(), 2)(x)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_micro_batches_that_wait_are_not_lost() -> None:
    model, plain = bnext.accumulate(layer(), 5), layer()
    batch = randn(4, 3, 5, 6)
    model(batch)
    assert model.num_batches_tracked == 0
    bnext.accumulate(model, 1)
    plain(batch)
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    model(batch)
    assert model.num_batches_tracked == 2


def test_an_accumulating_layer_refuses_what_a_layer_refuses() -> None:
    model = bnext.accumulate(layer(ghost_batch_size=1), 2)
    before = buffers(model)
    for bad, error in (
        (randn(3, 3, 1, 1), ValueError),
        (randn(3, 3, 1), ValueError),
        (randn(3, 4, 2, 2), RuntimeError),
        (randn(2, 3, 2, 2, dtype=torch.int64), RuntimeError),
    ):
        with pytest.raises(error):
            model(bad)
    assert_equal(buffers(model), before)
    assert not model._accumulation.triples


# --- checkpoints


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_checkpoint_updates_the_statistics_once(reentrant: bool, steps: int) -> None:
    model, plain = bnext.accumulate(layer(), steps), bnext.accumulate(layer(), steps)
    for _ in range(2):
        x, y = (randn(4, 3, 5, 6).requires_grad_() for _ in range(2))
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        plain(y).square().sum().backward()
        assert_equal([x.grad], [y.grad])
    assert_equal(buffers(model), buffers(plain))


def test_naive_checkpointing_updates_twice() -> None:
    naive = nn.BatchNorm2d(3, dtype=torch.float64)
    x = randn(4, 3, 5, 6).requires_grad_()
    checkpoint(naive, x, use_reentrant=False).square().sum().backward()
    assert naive.num_batches_tracked == 2


def test_two_forwards_before_a_backward() -> None:
    model, plain = layer(), nn.BatchNorm2d(3, dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    results = []
    for norm in (model, plain):
        x, y = (randn(4, 3, 5, 6, seed=s).requires_grad_() for s in range(2))
        (norm(x).relu() * norm(y).relu()).sum().backward()
        results.append([x.grad, y.grad, norm.weight.grad, *norm.buffers()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# --- batches that are not finite


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_counted_and_left_out(value: float, steps: int) -> None:
    model = bnext.accumulate(layer(skip_nonfinite=True), steps)
    batch = randn(4, 3, 5, 6)
    broken = batch.clone()
    broken[1, 2, 0, 0] = value
    before = buffers(model)[:3]
    for _ in range(steps):
        assert not model(broken).isfinite().all()
    assert_equal(buffers(model)[:3], before)
    assert model.nonfinite_batches == 1
    for _ in range(steps):
        model(batch)
    assert model.num_batches_tracked == 1 and model.nonfinite_batches == 1
    assert "nonfinite_batches" not in model.state_dict()


def test_naive_statistics_never_recover() -> None:
    model = layer()
    model(torch.full((4, 3, 5, 6), float("nan"), dtype=torch.float64))
    model(randn(4, 3, 5, 6))
    assert model.running_mean.isnan().all()


def test_skip_nonfinite_of_a_converted_model() -> None:
    model = bnext.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    assert bnext.skip_nonfinite(model) is model
    model(torch.full((4, 3, 5, 6), torch.inf))
    assert model[1].nonfinite_batches == 1 and model[1].running_mean.isfinite().all()
    bnext.skip_nonfinite(model, False)
    model(torch.full((4, 3, 5, 6), torch.inf))
    assert model[1].running_mean.isnan().any()


# --- weight decay


def test_no_weight_decay_on_normalisation() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), layer(), nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.BatchNorm2d(3)
    )
    model.append(model[0])  # shared
    decayed, others = bnext.param_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(p) for p in model[0].parameters()]
    assert len(others["params"]) == 8
    torch.optim.AdamW(bnext.param_groups(model, 0.1), lr=0.1)
    torch.optim.SGD(bnext.param_groups(nn.Linear(2, 2), 0.1), lr=0.1)


def test_is_batch_norm() -> None:
    norms = [layer(), bnext.BatchNorm1d(3), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
    norms.append(nn.LazyBatchNorm1d())
    assert all(map(bnext.is_batch_norm, norms))
    others = [nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3)]
    assert not any(map(bnext.is_batch_norm, others))


# --- bad calls


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bnext.freeze(nn.Linear(2, 2)), ValueError, "model has no batch norm"),
        (lambda: bnext.freeze(nn.BatchNorm1d(2)), ValueError, "bnext.convert first"),
        (lambda: bnext.freeze([]), TypeError, "model must be"),
        (
            lambda: bnext.freeze(bnext.BatchNorm1d(2, track_running_stats=False)),
            ValueError,
            "no running statistics",
        ),
        (lambda: bnext.accumulate(layer(), 0), ValueError, "steps"),
        (lambda: bnext.accumulate(layer(), 1.5), TypeError, "steps"),
        (lambda: bnext.param_groups(layer(), -1), ValueError, "weight_decay"),
        (lambda: bnext.param_groups([], 1), TypeError, "model must be"),
        (lambda: bnext.convert_sync(layer(), "gloo"), TypeError, "process_group"),
        (lambda: layer(process_group=3), TypeError, "process_group"),
    ],
)
def test_bad_calls(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
