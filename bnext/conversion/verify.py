"""Whether a converted model computes what the plain one does: both run, on copies."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]

# Relative to the largest value of a tensor. In double, rounding of a deep network in training grows
# by at most 1e3 or so a layer that sees few values per channel; other dtypes round at 1e-7 to 1e-3.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.5}


@dataclass
class _Run:
    """What a model did.

    Attributes:
        values: outputs, gradients, buffers and random states, by what they are.
        calls: the modules that were called, and their outputs, in order; if asked for.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    calls: list[tuple[str, list[Tensor]]] = field(default_factory=list)


def verify(plain: nn.Module, converted: nn.Module, inputs: Inputs) -> None:
    """Raises a RuntimeError that names the first difference; changes neither model.

    In double where the plain model can be run so, else as the model is.
    """
    for training in (True, False):
        mode = "training" if training else "eval"
        models, arguments = _in_double(plain, converted, inputs, training)
        runs = [_run(model, arguments, training) for model in models]
        what = _difference(runs[0].values, runs[1].values)
        if what is not None:
            runs = [_run(model, arguments, training, record=True) for model in models]
            layer = _first_layer(*runs)
            place = f"; the first layer that differs is {layer}" if layer else ""
            raise RuntimeError(f"bnext.convert would change the model: in {mode}, {what}{place}")


def _in_double(
    plain: nn.Module, converted: nn.Module, inputs: Inputs, training: bool
) -> tuple[list[nn.Module], Inputs]:
    double = pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )
    models = [copy.deepcopy(m).double() for m in (plain, converted)]
    try:
        _run(models[0], double, training)
    except Exception:  # a dtype in its code
        return [plain, converted], inputs
    return models, double


def _run(model: nn.Module, inputs: Inputs, training: bool, record: bool = False) -> _Run:
    model = copy.deepcopy(model).train(training)
    inputs = pytree.tree_map(_leaf, inputs)
    run = _Run()
    with _same_random_numbers(), _recorded(model, run.calls if record else None):
        if isinstance(inputs, dict):
            output = model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            output = model(*inputs)
        else:
            output = model(inputs)
        outputs = _tensors(output)
        run.values = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        wanted = [t for t in outputs if t.requires_grad]
        if wanted:
            torch.autograd.backward(
                wanted, [torch.linspace(-1, 2, t.numel()).to(t).view_as(t) for t in wanted]
            )
        state = torch.get_rng_state(), torch.tensor([hash(random.getstate()) % 2**31])
    for i, tensor in enumerate(_tensors(inputs)):
        run.values[f"input {i}, which may be changed in place,"] = tensor.detach()
        if tensor.grad is not None:
            run.values[f"the gradient of input {i}"] = tensor.grad
    for name, parameter in model.named_parameters():
        run.values[f"the parameter {name}"] = parameter.detach()
        if parameter.grad is not None:
            run.values[f"the gradient of {name}"] = parameter.grad
    run.values |= {f"the buffer {name}": b for name, b in model.named_buffers()}
    run.values |= {"the state of torch's random numbers": state[0], "that of Python's": state[1]}
    return run


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)


@contextmanager
def _recorded(model: nn.Module, calls: list[tuple[str, list[Tensor]]] | None) -> Iterator[None]:
    """Adds what modules return to ``calls``; not by hooks, which keep norms from being
    fused."""
    if calls is None:
        yield
        return
    names = {module: name for name, module in model.named_modules()}
    original = nn.Module.__call__

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if self in names:
            calls.append((names[self], [t.detach().clone() for t in _tensors(output)]))
        return output

    with mock.patch.object(nn.Module, "__call__", wrapper):
        yield


def _first_layer(plain: _Run, converted: _Run) -> str | None:
    """Of those that both models called, in order; the others are part of a fused call."""
    left: dict[str, list[list[Tensor]]] = {}
    for name, outputs in plain.calls:
        left.setdefault(name, []).append(outputs)
    for name, outputs in converted.calls:
        expected = left.get(name)
        if not expected:
            return name or "the model itself"
        of = expected.pop(0)
        pairs = {str(i): t for i, t in enumerate(of)}, {str(i): t for i, t in enumerate(outputs)}
        if _difference(*pairs) is not None:
            return name or "the model itself"
    return None


def _difference(plain: dict[str, Tensor], converted: dict[str, Tensor]) -> str | None:
    # The gradient of a bias before a batch norm is 0 but for rounding: of that of the others.
    largest = max((_scale(t) for name, t in plain.items() if "gradient" in name), default=0.0)
    for name in plain.keys() ^ converted.keys():
        return f"{name} is there in one of the models only"
    for name, expected in plain.items():
        found = converted[name]
        if (found.shape, found.dtype, found.device) != (
            expected.shape, expected.dtype, expected.device,
        ):  # fmt: skip
            return f"{name} is {_described(found)}, and was {_described(expected)}"
        if not expected.is_floating_point():
            if not torch.equal(found, expected):
                return f"{name} differs"
            continue
        tolerance = _TOLERANCE.get(expected.dtype, 1e-2)
        scale = _scale(expected)
        least = 1e-3 * largest if "gradient" in name else 0.0
        atol = tolerance * max(scale, least)
        if not torch.allclose(found, expected, rtol=0, atol=atol, equal_nan=True):
            worst = float((found - expected).abs().nan_to_num().max())
            return f"{name} differs by {worst:.2g}, where its largest value is {scale:.2g}"
    return None


def _scale(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
