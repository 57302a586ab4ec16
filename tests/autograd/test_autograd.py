"""The layer in the autograd engine: reverse mode to any order, saved tensors, hooks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from autograd_cases import EPS, GHOST, Case, all_cases, torch_batch_norm
from layers import randn
from op_samples import ops
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.utils.checkpoint import checkpoint

import bnext
from bnext.measure.bench import kept_for_backward

pytestmark = pytest.mark.usefixtures("device")

# float64 against float64 of another order of operations: some hundred roundings of 1e-16.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}

CASES = all_cases(("rows", "channels_last"), affines=("both",))


def weights_like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def scalar(tensors: list[Tensor], seed: int) -> Tensor:
    """A random linear functional: it gives every element another weight."""
    return sum((t * weights_like(t, seed + i)).sum() for i, t in enumerate(tensors))


def derivatives(function: object, case: Case, order: int) -> list[list[Tensor]]:
    """Gradients of order 1, 2, ... of a random functional of the output, of the gradients, ..."""
    tensors = case.tensors()
    values = list(tensors.values())
    current = [case.call(function, tensors)]
    found = []
    for k in range(1, order + 1):
        # Squared: else the derivatives of what is linear in an argument would stop at order 1.
        loss = scalar([t.square() + t for t in current], 10 * k)
        current = list(torch.autograd.grad(loss, values, create_graph=k < order))
        found.append(current)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_and_second_order(case: Case) -> None:
    actual = derivatives(bnext.batch_norm, case, 2)
    expected = derivatives(torch_batch_norm, case, 2)
    for order, (a, e) in enumerate(zip(actual, expected, strict=True), start=1):
        for x, y in zip(a, e, strict=True):
            torch.testing.assert_close(x, y, **CLOSE, msg=lambda m, k=order: f"order {k}: {m}")


@pytest.mark.parametrize(
    "case",
    [
        Case("rows", "silu", True, "both", GHOST),
        Case("rows", None, False, "both"),
        Case("planes", "relu", True, "weight"),
        Case("channels_last", "silu", False, "none", training=False),
    ],
    ids=str,
)
def test_third_order(case: Case) -> None:
    """Against finite differences: F.batch_norm cannot be the oracle, it "does not support 3rd+
    order derivatives" (torch 2.14.1)."""
    tensors = case.tensors()
    function = case.function(tuple(tensors))

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        output = function(*values)
        return torch.autograd.grad(scalar([output.square()], 0), values, create_graph=True)

    assert gradgradcheck(gradient, tuple(tensors.values()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("create_graph", [False, True])
def test_create_graph_changes_no_value(create_graph: bool) -> None:
    """The fused kernel and the differentiable formula are two roads to the same gradients."""
    case = Case("planes", "silu", True, "both", GHOST)
    tensors = case.tensors()
    output = case.call(bnext.batch_norm, tensors)
    grads = torch.autograd.grad(
        scalar([output], 0), list(tensors.values()), create_graph=create_graph
    )
    expected = derivatives_of_first_order(case)
    for grad, e in zip(grads, expected, strict=True):
        assert grad.requires_grad is create_graph
        torch.testing.assert_close(grad, e, **CLOSE, check_layout=False)


def derivatives_of_first_order(case: Case) -> tuple[Tensor, ...]:
    tensors = case.tensors()
    output = case.call(torch_batch_norm, tensors)
    return torch.autograd.grad(scalar([output], 0), list(tensors.values()))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_gradient_penalty(activation: str | None) -> None:
    """The use of double backward in practice: a penalty on the gradient of the input, of a network
    in float32, against the same network in float64 out of torch's own layers."""
    torch.manual_seed(0)
    ours = nn.Sequential(
        nn.Linear(6, 8, device=ops.device),
        bnext.BatchNormAct1d(8, activation=activation, device=ops.device),
        nn.Linear(8, 1, device=ops.device),
    )
    theirs = nn.Sequential(
        nn.Linear(6, 8, device=ops.device),
        nn.BatchNorm1d(8, device=ops.device),
        nn.Linear(8, 1, device=ops.device),
    ).double()
    theirs.load_state_dict(ours.state_dict())
    act = {None: nn.Identity(), "relu": nn.ReLU(), "silu": nn.SiLU()}[activation]
    theirs.insert(2, act)
    x = randn(16, 6)

    def penalised(model: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum(1).mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    actual, expected = penalised(ours, x), penalised(theirs, x.double())
    largest = max(e.abs().max().item() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        # 16 rows through two linear layers and two derivatives: a hundred roundings of 1.2e-7.
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_only_for_what_requires_them(training: bool, name: str) -> None:
    case = Case("planes", "relu", True, "both", training=training)
    tensors = case.tensors(grad=False)
    assert not case.call(bnext.batch_norm, tensors).requires_grad
    tensors[name].requires_grad_()
    output = case.call(bnext.batch_norm, tensors)
    assert output.requires_grad
    output.sum().backward()
    assert [n for n, t in tensors.items() if t.grad is not None] == [name]


def test_no_grad_and_inference_mode() -> None:
    case = Case("planes", "relu", True)
    tensors = case.tensors()
    expected = case.call(bnext.batch_norm, tensors)
    assert expected.grad_fn is not None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = case.call(bnext.batch_norm, tensors)
        assert not output.requires_grad and output.grad_fn is None
        assert torch.equal(output, expected)
    layer = bnext.BatchNormAct2d(2, device=ops.device)
    with torch.inference_mode():
        layer(randn(4, 2, 3, 3))
        assert layer(randn(4, 2, 3, 3)).is_inference()
    assert layer.num_batches_tracked == 2
    # The buffers changed in inference mode are normal tensors and serve a training step after it.
    layer(randn(4, 2, 3, 3)).sum().backward()
    assert layer.weight.grad is not None


# --- What is saved for backward


def changed_before_backward(case: Case, which: str) -> None:
    tensors = case.tensors()
    # A leaf that requires grad cannot be changed in place: put a node in front.
    inner = {name: t * 1.0 for name, t in tensors.items()}
    output = case.call(bnext.batch_norm, inner)
    with torch.no_grad():
        (output if which == "output" else inner[which]).mul_(2)
    scalar([output], 0).backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("which", "activation", "residual"),
    [
        ("input", None, False),
        ("input", "relu", False),
        ("weight", None, False),
        ("bias", "silu", False),
        ("output", "relu", True),
        ("output", "leaky_relu", True),
        ("residual", "silu", True),
    ],
)
def test_change_in_place_of_what_was_saved_raises(
    which: str, activation: str | None, residual: bool, training: bool
) -> None:
    case = Case("planes", activation, residual, "both", None, training)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed_before_backward(case, which)


@pytest.mark.parametrize(("activation", "residual"), [(None, False), ("relu", False)])
def test_output_may_change_in_place_without_residual(
    activation: str | None, residual: bool
) -> None:
    """The pre-activation is recomputed from the input: nothing of the output is kept, so that an
    in-place operation of the next layer is as free as after nn.BatchNorm."""
    changed_before_backward(Case("planes", activation, residual), "output")


def test_running_statistics_may_change_before_an_eval_backward() -> None:
    """The statistics an eval forward used are the ones its backward uses: a training step in
    between (discriminator in eval, then in train) must not leak into the gradient."""
    torch.manual_seed(0)
    layer = bnext.BatchNormAct1d(
        4, activation="silu", dtype=torch.float64, device=ops.device
    ).eval()
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    x = randn(8, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    loss = layer(x).square().sum()
    layer.train()(randn(8, 4, dtype=torch.float64) * 5 + 3)
    (actual,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_two_forwards_before_a_backward() -> None:
    """A layer called twice (siamese network, GAN, DDP with two losses) gives each call its own
    statistics, and running statistics of the second do not disturb the first's gradients."""
    torch.manual_seed(0)
    first, second = (randn(6, 3, 4, dtype=torch.float64, requires_grad=True) for _ in "12")
    ours = bnext.BatchNorm1d(3, dtype=torch.float64, device=ops.device)
    theirs = nn.BatchNorm1d(3, dtype=torch.float64, device=ops.device)
    results = []
    for layer in (ours, theirs):
        first.grad = second.grad = None
        y1, y2 = layer(first), layer(second)
        (scalar([y1], 0) + scalar([y2.square()], 1)).backward()
        results.append(
            [first.grad, second.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()]
        )
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


def test_retain_graph_and_backward_twice() -> None:
    case = Case("rows", "relu", True)
    tensors = case.tensors()
    loss = scalar([case.call(bnext.batch_norm, tensors)], 0)
    loss.backward(retain_graph=True)
    once = {name: t.grad.clone() for name, t in tensors.items()}
    loss.backward()
    for name, t in tensors.items():
        assert torch.equal(t.grad, 2 * once[name])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_nothing_of_the_size_of_the_input_is_saved_beyond_it() -> None:
    """Without a residual the input alone; relu with a residual shares the output."""
    for activation, residual, large in [
        (None, False, {"input"}),
        ("relu", False, {"input"}),
        ("silu", False, {"input"}),
        ("relu", True, {"input", "output"}),
        ("silu", True, {"input", "residual"}),
    ]:
        case = Case("planes", activation, residual)
        tensors = case.tensors()
        output, kept = kept_for_backward(case.call, bnext.batch_norm, tensors)
        owners = {t.data_ptr(): name for name, t in {**tensors, "output": output}.items()}
        found = {owners.get(t.data_ptr()) for t in kept if t.numel() >= output.numel()}
        assert found == large, (activation, residual)


def test_saved_tensors_hooks_and_checkpoint() -> None:
    case = Case("planes", "relu", True, "both", GHOST)
    tensors = case.tensors()
    values = list(tensors.values())
    expected = torch.autograd.grad(scalar([case.call(bnext.batch_norm, tensors)], 0), values)
    with torch.autograd.graph.save_on_cpu():
        loss = scalar([case.call(bnext.batch_norm, tensors)], 0)
    for a, e in zip(torch.autograd.grad(loss, values), expected, strict=True):
        assert torch.equal(a, e)
    for reentrant in (False, True):
        output = checkpoint(lambda *v: case.function(tuple(tensors))(*v), *values,
                            use_reentrant=reentrant)  # fmt: skip
        for t in values:
            t.grad = None
        scalar([output], 0).backward()
        for t, e in zip(values, expected, strict=True):
            assert torch.equal(t.grad, e)


def test_hooks() -> None:
    layer = bnext.BatchNormAct1d(3, dtype=torch.float64, device=ops.device)
    x = randn(4, 3, dtype=torch.float64, requires_grad=True)
    seen: list[str] = []
    x.register_hook(lambda g: seen.append("tensor"))
    layer.weight.register_hook(lambda g: g * 0)
    layer.register_forward_pre_hook(lambda *_: seen.append("forward pre"))
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.bias.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    layer(x).square().sum().backward()
    assert set(seen) == {"tensor", "forward pre", "forward", "backward pre", "backward",
                         "accumulated"}  # fmt: skip
    assert layer.weight.grad.abs().max() == 0 and layer.bias.grad.abs().max() > 0


def test_anomaly_mode() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            case = Case("rows", "silu")
            case.call(bnext.batch_norm, case.tensors()).sum().backward()
            huge = torch.full_like(randn(4, 2, dtype=torch.float64), torch.inf, requires_grad=True)
            output = bnext.batch_norm(huge, None, None, training=True)
            with pytest.raises(RuntimeError, match="returned nan values"):
                output.sum().backward()


def test_gradient_of_a_view_and_of_a_shared_input() -> None:
    """The input is also the residual: its gradient is the sum of both."""
    case = Case("planes", "silu")
    base = randn(10, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    grads = []
    for function in (bnext.batch_norm, torch_batch_norm):
        x = base[::2]
        output = case.call(function, {"input": x}, residual=x)
        grads.append(torch.autograd.grad(scalar([output], 0), base)[0])
    torch.testing.assert_close(*grads, **CLOSE)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_backward_from_another_thread(two_threads: None) -> None:
    """Data-parallel engines run backward off the thread that ran forward."""
    from concurrent.futures import ThreadPoolExecutor

    x = randn(64, 32, 8, requires_grad=True)

    def step(_: int) -> Tensor:
        output = bnext.batch_norm(x, None, None, training=True, eps=EPS, activation="relu")
        return torch.autograd.grad(output.square().sum(), x)[0]

    with ThreadPoolExecutor(4) as pool:
        grads = list(pool.map(step, range(8)))
    assert all(torch.equal(g, grads[0]) for g in grads)
