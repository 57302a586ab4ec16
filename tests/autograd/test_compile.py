"""torch.compile(fullgraph=True): the fused op is in the graph, and the results are eager's."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from graphs import recording_backend
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import bnext


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randn(*shape: int, seed: int = 0, channels_last: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.5
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


class Block(nn.Module):
    """One layer, with the residual passed where the layer takes one."""

    def __init__(
        self, activation: str | None = "relu", residual: bool = False, **options: object
    ) -> None:
        super().__init__()
        self.norm = bnext.BatchNormAct2d(5, activation=activation, **options)
        self.residual = residual

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(x, residual if self.residual else None)


def step(model: nn.Module, module: nn.Module, seed: int, **options: object) -> dict[str, Tensor]:
    """A forward and backward of `model`; `module` owns its parameters and buffers."""
    x = randn(6, 5, 3, 4, seed=seed, **options).requires_grad_()
    residual = randn(6, 5, 3, 4, seed=seed + 100, **options).requires_grad_()
    module.zero_grad()
    output = model(x, residual)
    (output * randn(*output.shape, seed=seed + 200)).sum().backward()
    found = {"output": output.detach(), "grad x": x.grad, "grad residual": residual.grad}
    found |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
    found |= {name: b.clone() for name, b in module.named_buffers()}
    return {name: t for name, t in found.items() if t is not None}


def assert_same_steps(
    eager: nn.Module, compiled_module: nn.Module, *, exact: bool, steps: int = 3, **options: object
) -> None:
    backend = options.pop("backend", "aot_eager")
    compiled = torch.compile(compiled_module, fullgraph=True, backend=backend)
    for seed in range(steps):
        expected = step(eager, eager, seed, **options)
        actual = step(compiled, compiled_module, seed, **options)
        assert actual.keys() == expected.keys()
        for name, e in expected.items():
            # The same op on the same values: exact, where nothing else is in the graph.
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(
                actual[name], e, **tolerance, msg=lambda m, n=name, s=seed: f"step {s} {n}: {m}"
            )


VARIANTS = {
    "plain": {"activation": None},
    "relu": {"activation": "relu"},
    "silu-residual": {"activation": "silu", "residual": True},
    "relu-residual-ghost": {"activation": "relu", "residual": True, "ghost_batch_size": 4},
    "leaky-momentum-None": {"activation": "leaky_relu", "momentum": None},
    "no-affine": {"affine": False},
    "no-bias": {"bias": False},
    "untracked": {"track_running_stats": False},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_eager_over_three_steps(variant: str, training: bool) -> None:
    eager = Block(**VARIANTS[variant]).train(training)
    # Statistics that are not the initial ones, so that eval has something to normalise with.
    with torch.no_grad():
        for name, b in eager.named_buffers():
            if name.endswith("running_var"):
                b.uniform_(0.5, 2.0)
    assert_same_steps(eager, copy.deepcopy(eager), exact=True)


def test_channels_last() -> None:
    eager = Block("relu", True, ghost_batch_size=4)
    compiled = copy.deepcopy(eager)
    assert_same_steps(eager, compiled, exact=True, channels_last=True)
    out = torch.compile(compiled, backend="aot_eager")(*[randn(6, 5, 3, 4, channels_last=True)] * 2)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_plain_layers_of_every_rank() -> None:
    shapes = ((6, 5), (6, 5, 3), (6, 5, 3, 2), (6, 5, 3, 2, 2))
    layers = (bnext.BatchNorm1d, bnext.BatchNorm1d, bnext.BatchNorm2d, bnext.BatchNorm3d)
    for layer, shape in zip(layers, shapes, strict=True):
        module = layer(5)
        twin = copy.deepcopy(module)
        x = randn(*shape)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), twin(x))
        assert torch.equal(module.running_var, twin.running_var)
        assert module.num_batches_tracked == 1


class Network(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        # No bias: batch norm makes its true gradient 0, so that only rounding would be compared.
        self.convolution = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.norm1 = bnext.BatchNormAct2d(5, activation="relu", **options)
        self.norm2 = bnext.BatchNormAct2d(5, activation="silu", **options)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm2(self.convolution(self.norm1(x)), residual)


@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 3, "momentum": None}], ids=str)
def test_inductor(options: dict) -> None:
    """The default backend, train and eval: kernels of its own around ours."""
    torch.manual_seed(0)
    eager = Network(**options)
    compiled = copy.deepcopy(eager)
    # Inductor may order the sums of the convolution's gradients as it likes: float32 rounding.
    assert_same_steps(eager, compiled, exact=False, backend="inductor", steps=2)
    if not options:
        assert_same_steps(eager.eval(), compiled.eval(), exact=False, backend="inductor", steps=1)


def test_inductor_hands_a_convolution_to_the_op_without_a_copy() -> None:
    """Inductor lays out convolutions channels_last, where the trace was contiguous: an op without
    the tag flexible_layout gets a copy in the traced layout."""
    model = nn.Sequential(nn.Conv2d(5, 7, 3, bias=False), bnext.BatchNormAct2d(7))
    x = randn(4, 5, 6, 6)
    expected = copy.deepcopy(model)(x)
    output, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    convolved = re.findall(r"(\w+) = extern_kernels.convolution\(", code)
    normalized = re.findall(r"torch.ops.bnext.batch_norm.default\((\w+),", code)
    assert convolved == normalized


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_graph_holds_each_fused_op_once_per_layer(training: bool) -> None:
    forward: list[Counter[str]] = []
    backward: list[Counter[str]] = []
    model = Network().train(training)
    compiled = torch.compile(model, fullgraph=True, backend=recording_backend(forward, backward))
    x = randn(4, 5, 3, 3).requires_grad_()
    compiled(x, x * 2).sum().backward()
    assert [f["batch_norm"] for f in forward] == [2]
    assert [b["batch_norm_backward"] for b in backward] == [2]
    assert sum(f["batch_norm_backward"] for f in forward) == 0
    assert sum(b["batch_norm"] for b in backward) == 0, "the forward is not run twice"


def test_nothing_else_is_in_the_graph_of_one_layer() -> None:
    """relu, the residual, the buffers and num_batches_tracked are all inside the op. What is left
    is bookkeeping: unpacking of tuples, and the copies back to the mutated buffers."""
    forward: list[Counter[str]] = []
    backward: list[Counter[str]] = []
    compiled = torch.compile(
        Block("relu", True), fullgraph=True, backend=recording_backend(forward, backward)
    )
    x, residual = (randn(4, 5, 3, 3, seed=s).requires_grad_() for s in (0, 1))
    compiled(x, residual).backward(randn(4, 5, 3, 3, seed=2))
    assert forward[0]["batch_norm"] == 1 and backward[0]["batch_norm_backward"] == 1
    bookkeeping = {"getitem", "detach.default", "alias.default", "copy_.default"}
    assert forward[0].keys() - {"batch_norm"} <= bookkeeping
    assert backward[0].keys() - {"batch_norm_backward"} <= bookkeeping


@pytest.mark.parametrize("ghost", [None, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_a_new_batch_size_is_no_recompilation(how: str, training: bool, ghost: int | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    eager = bnext.BatchNormAct2d(5, ghost_batch_size=ghost).train(training)
    module = copy.deepcopy(eager)
    compiled = torch.compile(
        module, fullgraph=True, backend=counter, dynamic=True if how == "dynamic=True" else None
    )
    first = 0
    # Around the ghost size: ghosts of equal and of unequal sizes, more ghosts, fewer.
    for n in (7, 9, 16, 5, 4) if ghost else (6, 9, 4):
        x = randn(n, 5, 3, 2, seed=n)
        xs = [x.clone().requires_grad_() for _ in "12"]
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(xs[0], 0)
        outputs = [m(v) for m, v in zip((compiled, eager), xs, strict=True)]
        assert torch.equal(*outputs)
        for output in outputs:
            (output * x.cos()).sum().backward()
        assert torch.equal(xs[0].grad, xs[1].grad)
        for (name, a), e in zip(module.named_buffers(), eager.buffers(), strict=True):
            assert torch.equal(a, e), name
        # Not "== 1": with dynamic=True Dynamo may call the backend twice for the first call, when
        # it finds that a float (eps) need not be symbolic (torch 2.14.1).
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_new_spatial_sizes_and_automatic_dynamic_shapes() -> None:
    """Dynamo's own way: the second size recompiles once with a symbol, the third not at all."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = bnext.BatchNormAct2d(5)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for n, size in ((4, 3), (6, 5), (7, 6), (8, 9)):
        compiled(randn(n, 5, size, size).requires_grad_()).sum().backward()
    assert counter.frame_count == 2
    assert layer.num_batches_tracked == 4


def test_one_graph_serves_every_value_of_the_counter() -> None:
    """momentum None must not read num_batches_tracked into Python (pytorch#194504)."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = bnext.BatchNorm1d(5, momentum=None)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    seen = []
    for seed in range(4):
        seen.append(randn(8, 5, seed=seed))
        compiled(seen[-1])
    assert counter.frame_count == 1
    mean = torch.stack([x.double().mean(0) for x in seen]).mean(0)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)


def test_functional_without_buffers_and_without_grad() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: Tensor) -> Tensor:
        return bnext.batch_norm(x, None, None, training=True, activation="silu")

    x = randn(6, 5)
    expected = bnext.batch_norm(x, None, None, training=True, activation="silu")
    assert torch.equal(function(x), expected)
    with torch.no_grad():
        assert torch.equal(function(x.requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.equal(function(x), expected)


def test_autocast() -> None:
    module = Network()
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = randn(4, 5, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compiled(x, x.bfloat16()), twin(x, x.bfloat16())
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_double_backward_is_an_error() -> None:
    """AOTAutograd has none (torch 2.14.1): what matters is that it says so."""
    compiled = torch.compile(bnext.BatchNormAct1d(5), fullgraph=True, backend="aot_eager")
    x = randn(6, 5).requires_grad_()
    (first,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first.sum(), x)


def function_of(x: Tensor) -> Tensor:
    return bnext.batch_norm(x, None, None, training=True, eps=0.1, activation="silu").pow(3).sum()


TRANSFORMS = {
    "grad": lambda x: torch.func.grad(function_of)(x),
    "vmap": lambda x: torch.func.vmap(
        lambda v: bnext.batch_norm(v, None, None, training=True, activation="relu")
    )(torch.stack([x, 2 * x])),
    "jvp": lambda x: torch.func.jvp(function_of, (x,), (x.cos(),))[1],
    "grad of grad": lambda x: torch.func.grad(
        lambda v: torch.func.grad(function_of)(v).square().sum()
    )(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_transforms_are_right_or_an_error(transform: str) -> None:
    x = randn(6, 5).double()
    expected = TRANSFORMS[transform](x)
    try:
        actual = torch.compile(TRANSFORMS[transform], fullgraph=True, backend="aot_eager")(x)
    except Exception as error:  # Dynamo has error types of its own
        assert str(error).strip()
        return
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_bad_calls_stay_errors() -> None:
    compiled = torch.compile(bnext.BatchNorm1d(5), backend="aot_eager")
    with pytest.raises(Exception, match="Expected more than 1 value per channel"):
        compiled(randn(1, 5))
    with pytest.raises(Exception, match="weight|running_mean|5"):
        compiled(randn(4, 6))
