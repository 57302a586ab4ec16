"""Does float32 bnext agree with float64 nn.BatchNorm?

Two float32 training runs drift apart within some hundred steps whatever computes them, so nothing
is compared along a run. Snapshots of a run are taken (parameters, buffers, batch), and each is
loaded into both networks: same state, same batch, one step. Two kinds of comparison:

*Layers.* Each normalisation layer gets the very input, residual and output gradient that it had in
the float32 network. The tolerance is a first-order rounding bound per element (Higham, Accuracy and
Stability of Numerical Algorithms, 2002, sections 3.1 and 4.2): ``_ELEMENTWISE`` roundings of each
term of a sum of a few terms, ``_SUMMATION`` roundings of the terms' absolute values for sums over
the batch, as blocks of at most that many values, merged in a wider type, guarantee. It does not
grow with the offset of the input. Where the input of a ReLU is closer to 0 than the tolerance, its
derivative is undecided in float32: the gradient is set to 0 there, for both.

*The whole network.* The tolerance is the network's own sensitivity, measured: the float64 network
is run again with noise of 2^-18 (64 float32 roundings) of its rms on the output and on the output
gradient of every layer (Monte Carlo arithmetic: Parker, 1997), and may differ by as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnext.demo.models import NormFactory, norm_layers, torch_norm
from bnext.demo.training import Batch, Snapshot, predict

ROUNDING = 2.0**-24  # half the distance of float32 numbers near 1
NOISE = 64 * ROUNDING
_ELEMENTWISE = 16  # subtract, scale, shift; 4 in mean and invstd; half of the variance's 1e-6
_SUMMATION = 64
_NOISE_RUNS = 2

ModelFactory = Callable[[NormFactory], nn.Module]


@dataclass(frozen=True)
class Comparison:
    """One quantity of one snapshot. Differences are to float64, in units of the tolerance."""

    kind: str  # "layer" or "network"
    quantity: str
    difference: float  # float32 bnext
    torch_difference: float  # float32 nn.BatchNorm, for comparison only

    @property
    def passed(self) -> bool:
        return self.difference <= 1  # false for nan


# --- layers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LayerCall:
    input: Tensor
    residual: Tensor | None
    grad_output: Tensor


def _record_calls(model: nn.Module, batch: Batch) -> dict[str, _LayerCall]:
    """The inputs and output gradients of every normalisation layer in one training step."""
    inputs: dict[str, tuple[Tensor, ...]] = {}
    gradients: dict[str, Tensor] = {}
    handles = []
    for name, layer in norm_layers(model).items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            inputs[name] = tuple(arg.detach().clone() for arg in args)
            output.register_hook(lambda grad: gradients.__setitem__(name, grad.detach().clone()))

        handles.append(layer.register_forward_hook(hook))
    F.cross_entropy(model.train()(batch.x), batch.y).backward()
    for handle in handles:
        handle.remove()
    return {
        name: _LayerCall(args[0], args[1] if len(args) > 1 else None, gradients[name])
        for name, args in inputs.items()
    }


def _layer_step(layer: Any, call: _LayerCall, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One training step and one eval forward of a layer that starts from ``state``."""
    dtype = next(layer.parameters()).dtype
    layer.load_state_dict(state)
    layer.zero_grad()
    input = call.input.to(dtype).requires_grad_()
    residual = None if call.residual is None else call.residual.to(dtype).requires_grad_()
    args = (input,) if residual is None else (input, residual)
    output = layer.train()(*args)
    output.backward(call.grad_output.to(dtype))
    results = {
        "output": output.detach(),
        "grad_input": input.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        "running_mean": layer.running_mean.clone(),
        "running_var": layer.running_var.clone(),
    }
    if residual is not None:
        results["grad_residual"] = residual.grad
    layer.load_state_dict(state)
    with torch.no_grad():
        results["output, eval"] = layer.eval()(*(arg.detach() for arg in args))
    return {name: value.double() for name, value in results.items() if value is not None}


def _layer_tolerances(
    layer: Any, call: _LayerCall, state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Tolerance of each result of ``_layer_step``, and the mask of decided ReLUs.

    ``layer`` is the float64 layer; only its activation and constants are used.
    """
    x, grad = call.input.double(), call.grad_output.double()
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    weight, bias, old_mean, old_var = (
        state[name].double().view(shape)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    residual = torch.zeros(()) if call.residual is None else call.residual.double()
    mean = x.mean(dims, keepdim=True)
    var = x.var(dims, keepdim=True)
    unit, total = _ELEMENTWISE * ROUNDING, _SUMMATION * ROUNDING

    def output(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hat = (x - mean) * (var + layer.eps).rsqrt()
        before = hat * weight + bias + residual
        bound = unit * (weight.abs() * (hat.abs() + 1) + bias.abs() + residual.abs())
        return hat, before, bound

    _, _, eval_bound = output(old_mean, old_var)
    hat, before, bound = output(mean, x.var(dims, unbiased=False, keepdim=True))
    decided = before.abs() > bound
    if layer.activation == "relu":
        grad = grad * (decided & (before > 0))
    else:
        decided = torch.ones_like(decided)
    # What the gradient sums add up; "+ 1" stands for the rounding of hat near 0.
    magnitude = grad.abs() * (hat.abs() + 1)
    scale = weight.abs() * (x.var(dims, unbiased=False, keepdim=True) + layer.eps).rsqrt()
    momentum = layer.momentum
    tolerances = {
        "output": bound,
        "output, eval": eval_bound,
        "grad_input": total
        * scale
        * (
            grad.abs()
            + grad.abs().mean(dims, keepdim=True)
            + (hat.abs() + 1) * magnitude.mean(dims, keepdim=True)
        ),
        "grad_weight": total * magnitude.sum(dims),
        "grad_bias": total * grad.abs().sum(dims),
        "grad_residual": ROUNDING * grad.abs(),
        "running_mean": (
            4 * ROUNDING * ((1 - momentum) * old_mean.abs() + momentum * mean.abs())
            + unit * momentum * var.sqrt()
        ).flatten(),
        "running_var": (unit * ((1 - momentum) * old_var + momentum * var)).flatten(),
    }
    return tolerances, decided


def _share(difference: Tensor, tolerance: Tensor) -> float:
    """Largest difference in units of its tolerance; 0 where both are 0, inf or nan kept."""
    share = difference.abs() / tolerance
    return torch.where(difference == 0, torch.zeros_like(share), share).max().item()


def _sub_state(state: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    prefix = f"{layer}."
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _compare_layers(
    model: nn.Module, torch_model: nn.Module, exact_model: nn.Module, snapshot: Snapshot
) -> list[Comparison]:
    model.load_state_dict(snapshot.state)
    comparisons = []
    for name, call in _record_calls(model, snapshot.batch).items():
        state = _sub_state(snapshot.state, name)
        exact_layer = exact_model.get_submodule(name)
        tolerances, decided = _layer_tolerances(exact_layer, call, state)
        call = _LayerCall(call.input, call.residual, call.grad_output * decided)
        exact = _layer_step(exact_layer, call, state)
        own = _layer_step(model.get_submodule(name), call, state)
        other = _layer_step(torch_model.get_submodule(name), call, state)
        for quantity, truth in exact.items():
            own_share, other_share = (
                _share(result[quantity] - truth, tolerances[quantity]) for result in (own, other)
            )
            comparisons.append(Comparison("layer", quantity, own_share, other_share))
    return comparisons


# --- the whole network --------------------------------------------------------------------------


def _network_step(
    model: nn.Module, snapshot: Snapshot, held_out: Tensor
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Results of one step from the snapshot, each as a list of (values, scale)."""
    dtype = next(model.parameters()).dtype
    batch = snapshot.batch.to(dtype)
    model.load_state_dict(snapshot.state)
    model.zero_grad()
    logits = model.train()(batch.x)
    F.cross_entropy(logits, batch.y).backward()
    # All gradients as one vector: single elements jump where a ReLU is undecided, and the gradient
    # of a bias that the next batch norm takes out again is 0, nothing to be relative to.
    gradient = torch.cat(
        [each.grad.double().flatten() for each in model.parameters() if each.grad is not None]
    )
    means, variances = (
        [
            getattr(layer, buffer).double().clone()
            for layer in norm_layers(model).values()
        ]
        for buffer in ("running_mean", "running_var")
    )  # fmt: skip
    model.load_state_dict(snapshot.state)
    eval_logits = predict(model, held_out.to(dtype)).double()
    logits = logits.detach().double()
    return {
        "logits": [(logits, logits.square().mean().sqrt())],
        "logits, eval": [(eval_logits, eval_logits.square().mean().sqrt())],
        "gradient": [(gradient, gradient.norm())],
        "running_mean": [
            (mean, mean.abs() + var.sqrt()) for mean, var in zip(means, variances, strict=True)
        ],
        "running_var": [(var, var) for var in variances],
    }


def _distances(
    results: dict[str, list[tuple[Tensor, Tensor]]], truth: dict[str, list[tuple[Tensor, Tensor]]]
) -> dict[str, float]:
    """Largest difference of each result, relative to its scale."""
    distances = {}
    for quantity, pairs in truth.items():
        worst = []
        for (value, _), (exact, scale) in zip(results[quantity], pairs, strict=True):
            difference = value - exact
            if quantity == "gradient":
                difference = difference.norm()
            worst.append((difference.abs() / scale).max())
        distances[quantity] = torch.stack(worst).max().item()
    return distances


def _noisy(values: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
    return values + noise * (NOISE * values.detach().square().mean().sqrt())


def _noise_distances(
    model: nn.Module,
    truth: dict[str, list[tuple[Tensor, Tensor]]],
    snapshot: Snapshot,
    held_out: Tensor,
) -> dict[str, float]:
    """How far noise of 64 roundings on each layer moves the float64 network's results."""
    generator = torch.Generator().manual_seed(snapshot.step)

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output = _noisy(output, generator)
        if output.requires_grad:
            output.register_hook(lambda grad: _noisy(grad, generator))
        return output

    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if not any(True for _ in module.children())
    ]
    runs = [_distances(_network_step(model, snapshot, held_out), truth) for _ in range(_NOISE_RUNS)]
    for handle in handles:
        handle.remove()
    return {quantity: max(run[quantity] for run in runs) for quantity in truth}


def _compare_networks(
    model: nn.Module,
    torch_model: nn.Module,
    exact_model: nn.Module,
    snapshot: Snapshot,
    held_out: Tensor,
) -> list[Comparison]:
    truth = _network_step(exact_model, snapshot, held_out)
    noise = _noise_distances(exact_model, truth, snapshot, held_out)
    own = _distances(_network_step(model, snapshot, held_out), truth)
    other = _distances(_network_step(torch_model, snapshot, held_out), truth)
    comparisons = []
    for quantity in truth:
        # What enters a first layer carries no noise: 64 roundings of its results are allowed.
        tolerance = noise[quantity] + NOISE
        comparisons.append(
            Comparison("network", quantity, own[quantity] / tolerance, other[quantity] / tolerance)
        )
    return comparisons


def compare(
    make_model: ModelFactory, norm: NormFactory, snapshots: Sequence[Snapshot], held_out: Tensor
) -> list[Comparison]:
    """Compare the float32 network with layers ``norm`` against float64 nn.BatchNorm."""
    model, torch_model = make_model(norm), make_model(torch_norm)
    exact_model = make_model(torch_norm).double()
    comparisons = []
    for snapshot in snapshots:
        comparisons += _compare_layers(model, torch_model, exact_model, snapshot)
        comparisons += _compare_networks(model, torch_model, exact_model, snapshot, held_out)
    return comparisons
