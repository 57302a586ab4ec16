"""torch.export: operators of torch alone, but for what torch has not: ghosts, and momentum=None in
training. The exported module runs, trains and can be saved."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from graphs import ops_in
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import bnext

N = Dim("n", min=4, max=1024)


class Network(nn.Module):
    """Both kinds of layer, with an activation, a residual and (maybe) ghosts."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = bnext.BatchNormAct1d(5, activation="silu", **options)
        self.second = nn.Linear(5, 5)
        self.plain = bnext.BatchNorm1d(5, **options)
        self.last = bnext.BatchNormAct1d(5, activation="relu", **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.last(self.plain(self.second(x)), x)


def network(**options: object) -> Network:
    torch.manual_seed(0)
    return Network(**options)


def batch(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def n_ops(training: bool, options: dict) -> int:
    """How many layers keep the op."""
    only_bnext = "ghost_batch_size" in options or "momentum" in options
    return 3 if training and only_bnext else 0


def rounding(training: bool, options: dict) -> float:
    """Of a comparison with eager: the same op has the same bits; torch's operators in its place, of
    float32, differ by a few roundings in each of three layers."""
    return 0 if n_ops(training, options) else 1e-5


def assert_same_buffers(module: nn.Module, eager: nn.Module, tolerance: float) -> None:
    buffers = dict(module.named_buffers())
    for name, b in eager.named_buffers():
        torch.testing.assert_close(buffers[name], b, rtol=tolerance, atol=tolerance, msg=name)


def exported(model: nn.Module) -> ExportedProgram:
    return export(model, (batch(8),), dynamic_shapes=({0: N},))


OPTIONS = [{}, {"ghost_batch_size": 3}, {"momentum": None}, {"affine": False}, {"bias": False},
           {"track_running_stats": False}]  # fmt: skip


def ids(options: dict) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "default"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_runs_with_any_batch_size(options: dict, training: bool) -> None:
    eager = network(**options).train(training)
    program = exported(copy.deepcopy(eager))
    assert ops_in(program.graph_module)["batch_norm"] == n_ops(training, options)
    module = program.module()
    tolerance = rounding(training, options)
    for n in (8, 5, 12, 4):
        found, expected = module(batch(n, n)), eager(batch(n, n))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert_same_buffers(module, eager, tolerance)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_trains_like_the_eager_module(options: dict, training: bool) -> None:
    """The op carries its own derivative into the exported graph: gradients, parameters after three
    steps of SGD, and buffers are eager's."""
    eager = network(**options).train(training)
    module = exported(copy.deepcopy(eager)).module()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (eager, module)]
    for step, n in enumerate((8, 5, 12)):
        inputs = [batch(n, step).requires_grad_() for _ in "12"]
        for model, optimizer, x in zip((eager, module), optimizers, inputs, strict=True):
            optimizer.zero_grad()
            (model(x) * torch.linspace(-1, 2, 5)).square().sum().backward()
            optimizer.step()
        tolerance = 100 * rounding(training, options)  # of sums of squares, after up to three steps
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **close)
    parameters = dict(module.named_parameters())
    for name, p in eager.named_parameters():
        torch.testing.assert_close(parameters[name].grad, p.grad, **close)
        torch.testing.assert_close(parameters[name], p, **close)
    assert_same_buffers(module, eager, tolerance)


def test_double_backward_of_the_exported_module() -> None:
    """A gradient penalty on the exported module: eager's, or an error."""
    eager = network().double()
    module = export(copy.deepcopy(eager), (batch(8).double(),), dynamic_shapes=({0: N},)).module()
    results = []
    for model in (eager, module):
        x = batch(7, 3).double().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_save_and_load(training: bool) -> None:
    options = {"ghost_batch_size": 3}
    eager = network(**options).train(training)
    file = io.BytesIO()
    torch.export.save(exported(copy.deepcopy(eager)), file)
    file.seek(0)
    program = torch.export.load(file)
    assert ops_in(program.graph_module)["batch_norm"] == n_ops(training, options)
    module = program.module()
    x = batch(7)
    grads = []
    for model in (eager, module):
        loss = model(x).square().sum()
        loss.backward()
        grads.append([p.grad for _, p in sorted(model.named_parameters())])
    tolerance = 100 * rounding(training, options)
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)
    assert program.state_dict.keys() == eager.state_dict().keys()


def test_decomposed_program_keeps_the_op() -> None:
    """run_decompositions functionalises: the buffers become outputs, the op stays one op."""
    eager = network(ghost_batch_size=3)
    program = exported(copy.deepcopy(eager)).run_decompositions()
    assert ops_in(program.graph_module)["batch_norm"] == 3
    module = program.module()
    x = batch(9)
    assert torch.equal(module(x), eager(x))
    assert_same_buffers(module, eager, 0)


def test_planes_and_channels_last() -> None:
    layer = bnext.BatchNormAct2d(5, ghost_batch_size=3)
    x = torch.randn(8, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    program = export(copy.deepcopy(layer), (x, x.cos()), dynamic_shapes=({0: N}, {0: N}))
    smaller = x[:5]
    output, expected = program.module()(smaller, smaller.sin()), layer(smaller, smaller.sin())
    assert torch.equal(output, expected)
    assert output.stride() == expected.stride()


def test_compile_of_an_exported_module() -> None:
    eager = network()
    module = exported(copy.deepcopy(eager)).module()
    compiled = torch.compile(module, backend="aot_eager")
    x = batch(6)
    for model in (compiled, eager):
        model(x).square().sum().backward()
    parameters = dict(module.named_parameters())
    for name, p in eager.named_parameters():
        torch.testing.assert_close(parameters[name].grad, p.grad, rtol=1e-5, atol=1e-5)


def test_a_batch_too_small_is_refused() -> None:
    module = exported(network()).module()
    before = {name: b.clone() for name, b in module.named_buffers()}
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        module(batch(1))
    for name, b in module.named_buffers():
        assert torch.equal(b, before[name]), name
