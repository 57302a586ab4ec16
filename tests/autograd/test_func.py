"""torch.func, vmap and forward-mode AD: right, or a clear error, but never a silent zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from autograd_cases import EPS, GHOST, Case, torch_batch_norm
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import bnext

CLOSE = {"rtol": 1e-11, "atol": 1e-11}

CASES = [
    Case("rows", "silu", True, "both", GHOST),
    Case("rows", None, False, "none"),
    Case("planes", "relu", True, "both", GHOST),
    Case("channels_last", "leaky_relu", False, "both"),
    Case("rows", "silu", False, "weight", training=False),
    Case("channels_last", "relu", True, "both", training=False),
]


def functions(case: Case) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple]:
    """The layer, torch's own, and the arguments of both."""
    tensors = case.tensors(grad=False)

    def bind(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *v: case.call(function, dict(zip(tensors, v, strict=True)))

    return bind(bnext.batch_norm), bind(torch_batch_norm), tuple(tensors.values())


def tangents_of(values: tuple, seed: int = 3) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values)


def assert_all_close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE, check_layout=False)


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *v: (function(*v).square() * torch.linspace(0.5, 1.5, len(v[0])).view(
        -1, *[1] * (v[0].dim() - 1))).sum()  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grad_vjp_jvp(case: Case) -> None:
    ours, theirs, values = functions(case)
    argnums = tuple(range(len(values)))
    assert_all_close(grad(loss_of(ours), argnums)(*values), grad(loss_of(theirs), argnums)(*values))
    tangents = tangents_of(values)
    assert_all_close(jvp(ours, values, tangents), jvp(theirs, values, tangents))
    output, pull = vjp(ours, *values)
    expected, expected_pull = vjp(theirs, *values)
    assert_all_close(output, expected)
    cotangent = tangents_of((output,))[0]
    assert_all_close(pull(cotangent), expected_pull(cotangent))
    # The same pullback, over a batch of cotangents.
    cotangents = torch.stack([cotangent, 2 * cotangent, -cotangent])
    assert_all_close(vmap(pull)(cotangents), vmap(expected_pull)(cotangents))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jacobians_and_hessian(case: Case) -> None:
    ours, theirs, values = functions(case)
    argnums = tuple(range(len(values)))
    expected = jacrev(theirs, argnums)(*values)
    assert_all_close(jacrev(ours, argnums)(*values), expected)
    assert_all_close(jacfwd(ours, argnums)(*values), expected)
    # torch's own double backward, from the eager engine: its jvp of a vjp is not the oracle's job.
    eager = torch.autograd.functional.hessian(lambda v: loss_of(theirs)(v, *values[1:]), values[0])
    assert_all_close(hessian(loss_of(ours))(*values), eager)
    assert_all_close(jacrev(jacrev(loss_of(ours)))(*values), eager)
    assert_all_close(jacrev(jacfwd(loss_of(ours)))(*values), eager)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dual_tensors(case: Case) -> None:
    ours, theirs, values = functions(case)
    tangents = tangents_of(values)
    _, expected = jvp(theirs, values, tangents)
    with fwAD.dual_level():
        duals = [fwAD.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
        output = fwAD.unpack_dual(ours(*duals))
        assert_all_close(output.tangent, expected)
        # One tangent at a time: the others are plain tensors.
        parts = []
        for i, dual in enumerate(duals):
            mixed = [dual if i == k else v for k, v in enumerate(values)]
            parts.append(fwAD.unpack_dual(ours(*mixed)).tangent)
        assert_all_close(sum(parts), expected)
        assert fwAD.unpack_dual(ours(*values)).tangent is None


def test_forward_mode_through_a_backward() -> None:
    """A tangent on grad_output alone, without create_graph: the fused backward kernel would drop
    it. Right or an error."""
    case = Case("planes", "silu", False, "both", GHOST)
    tensors = case.tensors()
    values = list(tensors.values())
    output = case.call(bnext.batch_norm, tensors)
    primal, tangent = tangents_of((output.detach(), output.detach()))
    expected = torch.autograd.grad(output, values, tangent, retain_graph=True)
    with fwAD.dual_level():
        try:
            grads = torch.autograd.grad(output, values, fwAD.make_dual(primal, tangent))
        except RuntimeError as error:
            assert "forward" in str(error) or "not differentiable" in str(error)
            return
        # The gradient is linear in grad_output.
        assert_all_close([fwAD.unpack_dual(g).tangent for g in grads], list(expected))


def test_linearize() -> None:
    ours, theirs, values = functions(Case("rows", "silu", False, "both"))
    output, push = linearize(ours, *values)
    tangents = tangents_of(values)
    expected, expected_tangent = jvp(theirs, values, tangents)
    assert_all_close((output, push(*tangents)), (expected, expected_tangent))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vmap(case: Case) -> None:
    """Over a stack of inputs, each with its own statistics, and over stacks of everything."""
    ours, theirs, values = functions(case)
    stacks = tuple(torch.stack([v, v * 1.5 + 0.1, v * v]) for v in values)
    expected = torch.stack([theirs(*(s[i] for s in stacks)) for i in range(3)])
    assert_all_close(vmap(ours)(*stacks), expected)
    assert_all_close(
        vmap(ours, in_dims=(0, *[None] * (len(values) - 1)))(stacks[0], *values[1:]),
        torch.stack([theirs(x, *values[1:]) for x in stacks[0]]),
    )
    inner = tuple(s.movedim(0, 1) for s in stacks)
    assert_all_close(vmap(ours, in_dims=1, out_dims=1)(*inner), expected.movedim(0, 1))
    two = tuple(torch.stack([s, s + 0.2]) for s in stacks)
    expected = torch.stack([torch.stack([theirs(*(s[i, k] for s in two)) for k in range(3)])
                            for i in range(2)])  # fmt: skip
    assert_all_close(vmap(vmap(ours))(*two), expected)
    assert_all_close(vmap(ours, chunk_size=2)(*stacks), vmap(ours)(*stacks))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_vmap_records_gradients(training: bool) -> None:
    """vmap inside an ordinary graph: the engine differentiates through the batched layer."""
    case = Case("rows", "silu", False, "both", None, training)
    ours, theirs, values = functions(case)
    grads = []
    for function in (ours, theirs):
        stack = torch.stack([values[0], values[0] * 2]).requires_grad_()
        weight = values[1].clone().requires_grad_()
        output = vmap(lambda x, w, f=function: f(x, w, values[2]), in_dims=(0, None))(stack, weight)
        grads.append(torch.autograd.grad(output.square().sum(), [stack, weight]))
    assert_all_close(*grads)


def network(activation: str | None = "silu", **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    layer = bnext.BatchNormAct1d(5, activation=activation, **options)
    return nn.Sequential(nn.Linear(3, 5), layer, nn.Linear(5, 1)).double()


def test_per_sample_gradients_in_eval() -> None:
    model = network().eval()
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
    params = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    x, y = torch.randn(7, 3).double(), torch.randn(7, 1).double()

    def loss(params: dict, x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(model, (params, buffers), (x[None],)) - y).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    for i in range(len(x)):
        model.zero_grad()
        (model(x[i : i + 1]) - y[i]).square().sum().backward()
        for name, p in model.named_parameters():
            assert_all_close(per_sample[name][i], p.grad)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_functional_call_trains_like_the_module(momentum: float | None) -> None:
    """Buffers are arguments too (functorch forbids to write to what a function captured)."""
    model, twin = network(momentum=momentum), network(momentum=momentum)
    params = {k: p.detach().clone() for k, p in model.named_parameters()}
    buffers = {k: b.clone() for k, b in model.named_buffers()}

    def loss(params: dict, buffers: dict, x: Tensor) -> Tensor:
        return functional_call(model, (params, buffers), (x,)).square().sum()

    for step in range(3):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step)).double()
        grads = grad(loss)(params, buffers, x)
        twin.zero_grad()
        twin(x).square().sum().backward()
        for name, p in twin.named_parameters():
            assert_all_close(grads[name], p.grad)
        for name, b in twin.named_buffers():
            assert_all_close(buffers[name], b)
    assert model[1].num_batches_tracked == 0  # the module's own buffers were not touched
    with pytest.raises(RuntimeError, match="captured"):
        grad(lambda p: functional_call(model, (p, buffers), (x,)).sum())(params)


def test_vmap_over_a_training_layer_with_running_statistics_is_an_error() -> None:
    """The stack's members would all write to the one running_mean. torch's own error says so, and
    so must ours; and the buffers stay as they are."""
    model = network()
    before = {k: b.clone() for k, b in model.named_buffers()}
    with pytest.raises(
        RuntimeError, match=r"running_mean|running_var|in-?place|track_running_stats"
    ):
        vmap(model)(torch.randn(2, 6, 3).double())
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name]), name
    untracked = network(track_running_stats=False)
    stack = torch.randn(2, 6, 3).double()
    assert_all_close(vmap(untracked)(stack), torch.stack([untracked(x) for x in stack]))


def test_vmap_over_an_ensemble_of_layers() -> None:
    """Stacked parameters and stacked buffers: each member has its own running statistics."""
    members = [network() for _ in range(3)]
    for i, member in enumerate(members):
        with torch.no_grad():
            member[1].running_mean.fill_(i)
    params, buffers = torch.func.stack_module_state(members)
    x = torch.randn(6, 3).double()

    def run(params: dict, buffers: dict) -> Tensor:
        return functional_call(members[0], (params, buffers), (x,))

    try:
        output = vmap(run)(params, buffers)
    except (RuntimeError, ValueError) as error:
        assert any(word in str(error) for word in ("running", "in-place", "inplace")), error
        return
    assert_all_close(output, torch.stack([member(x) for member in members]))
    for i, member in enumerate(members):
        for name, b in member.named_buffers():
            assert_all_close(buffers[name][i], b)


@pytest.mark.parametrize("module", [nn.BatchNorm1d, bnext.BatchNorm1d])
def test_running_statistics_take_no_tangent(module: type[nn.Module]) -> None:
    """no_grad does not stop forward mode: the update must detach. Else an eval forward in the
    same dual level would differentiate through the buffers, which torch's own layer does not."""
    layer = module(3)
    x = torch.randn(6, 3)
    with fwAD.dual_level():
        layer(fwAD.make_dual(x, x.cos()))
        for name, b in layer.named_buffers():
            assert fwAD.unpack_dual(b).tangent is None, name
        assert fwAD.unpack_dual(layer.eval()(x)).tangent is None


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(256, 8), (16, 4, 16, 16)])
def test_the_formula_is_as_accurate_as_the_kernels(shape: tuple[int, ...], offset: float) -> None:
    """In float32 at a large offset, through vmap (output) and create_graph (gradients)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, *shape), generator=generator) + offset
    dy = torch.randn((2, *shape), generator=generator)

    def layer(x: Tensor) -> Tensor:
        return bnext.batch_norm(x, None, None, training=True, activation="silu")

    def gradient(x: Tensor, dy: Tensor, create_graph: bool) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(layer(x), x, dy, create_graph=create_graph)[0].detach()

    truth = torch.stack([layer(v.double()) for v in x])
    # Outputs are of size 1 to 5: some tens of roundings of 6e-8.
    torch.testing.assert_close(vmap(layer)(x).double(), truth, rtol=0, atol=4e-6)
    truth = gradient(x[0].double(), dy[0].double(), False)
    for create_graph in (False, True):
        found = gradient(x[0], dy[0], create_graph)
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-6 * truth.abs().max())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 5, 3), (2, 5, 0), (0, 5, 2, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_inputs(training: bool, shape: tuple[int, ...]) -> None:
    """No samples, no channels or no positions: empty gradients of every kind, and zeros."""
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(shape[1], dtype=torch.float64, requires_grad=True)
    buffers = torch.zeros_like(weight).detach(), torch.ones_like(weight).detach()

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return bnext.batch_norm(x, *buffers, weight, None, training, activation="silu")

    for create_graph in (False, True):
        gx, gw = torch.autograd.grad(layer(x, weight).sum(), [x, weight], create_graph=create_graph)
        assert gx.shape == x.shape and torch.equal(gw, torch.zeros_like(weight))
    output, tangent = jvp(layer, (x.detach(), weight.detach()), (x.detach(), weight.detach()))
    assert output.shape == tangent.shape == x.shape


# --- The raw op, below the wrapper that looks for tangents and functorch levels


def raw(input: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.bnext.batch_norm(
        input, weight, None, None, None, None, None, True, 0.1, EPS, "silu", None
    )[0]


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[[Tensor, Tensor], object]]] = {
    "grad": lambda f: grad(lambda x, w: f(x, w).square().sum(), (0, 1)),
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (x.cos(), w.cos()))[1],
    "jvp of the weight": lambda f: lambda x, w: jvp(lambda v: f(x, v), (w,), (w.cos(),))[1],
    "vmap": lambda f: lambda x, w: vmap(f, (0, None))(torch.stack([x, x * 2]), w),
    "vmap of the weight": lambda f: lambda x, w: vmap(f, (None, 0))(x, torch.stack([w, w * 2])),
    "jacrev": lambda f: jacrev(f, (0, 1)),
    "hessian": lambda f: hessian(lambda x, w: f(x, w).square().sum()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_raw_op_is_right_or_refuses(transform: str) -> None:
    ours, theirs, (x, weight) = functions(Case("rows", "silu", False, "weight"))
    expected = TRANSFORMS[transform](theirs)(x, weight)
    try:
        actual = TRANSFORMS[transform](raw)(x, weight)
    except (RuntimeError, NotImplementedError) as error:
        assert str(error)
        return
    assert_all_close(actual, expected)
    assert ours is not None


def test_raw_op_with_a_dual_tensor_is_right_or_refuses() -> None:
    _, theirs, (x, weight) = functions(Case("rows", "silu", False, "weight"))
    tangent = x.cos()
    _, expected = jvp(lambda v: theirs(v, weight), (x,), (tangent,))
    with fwAD.dual_level():
        try:
            actual = fwAD.unpack_dual(raw(fwAD.make_dual(x, tangent), weight)).tangent
        except (RuntimeError, NotImplementedError):
            return
        assert actual is not None, "the tangent was dropped"
        assert_all_close(actual, expected)


def test_untracked_input_under_a_transform() -> None:
    """What does not depend on the transformed argument is computed all the same."""
    x = torch.randn(5, 4)
    layer, twin = bnext.BatchNorm1d(4).eval(), nn.BatchNorm1d(4).eval()
    ours = torch.func.grad(lambda a: (layer(x) * a).sum())(torch.ones(5, 4))
    torch.testing.assert_close(ours, twin(x))
    ours = torch.vmap(lambda a: layer(x) * a)(torch.ones(3))
    torch.testing.assert_close(ours, twin(x).expand(3, 5, 4))


def test_cumulative_momentum_in_eval() -> None:
    x = torch.randn(5, 4)
    layer, twin = (m.BatchNorm1d(4, momentum=None).eval() for m in (bnext, nn))
    ours = torch.func.grad(lambda x: layer(x).pow(3).sum())(x)
    torch.testing.assert_close(ours, torch.func.grad(lambda x: twin(x).pow(3).sum())(x))


def test_trace_runs_the_op_once() -> None:
    layer = bnext.BatchNorm1d(4)
    traced = torch.jit.trace(layer, torch.randn(5, 4), check_trace=False)
    before = int(layer.num_batches_tracked)
    x = torch.randn(5, 4, requires_grad=True)
    traced(x).pow(3).sum().backward()
    assert int(traced.num_batches_tracked) == before + 1
    assert x.grad is not None and x.grad.abs().sum() > 0
