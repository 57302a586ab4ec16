"""What edited forwards call: one fused layer where that is the same function, else as written.

Decided at each call, because a model may change after it was converted: hooks come, modules are
replaced, a norm is parametrized. Nothing here is remembered.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules import module as nn_module

from bnext import activations
from bnext.activations import relu_method, relu_method_in_place  # noqa: F401
from bnext.compat import is_exporting
from bnext.modules import _FusedBatchNorm

_DISABLED = torch._C._disabled_torch_function_impl
# Ways to add, by the name that an edited forward gives: of (the norm's output, the other).
ADDITIONS = {
    "left": operator.add,
    "right": lambda value, other: other + value,
    "in_place": operator.iadd,
}


class Rest(NamedTuple):
    """What follows a norm: an addition, then an activation; each may be None."""

    add: str | None = None  # of ADDITIONS
    residual: Any = None
    activation: Any = None  # a module or a function
    options: dict[str, Any] | None = None  # of the function


_NOTHING = Rest()


def call(
    norm: Any,
    input: Any,
    activation: Any = None,
    options: dict[str, Any] | None = None,
    *,
    residual: Any = None,
    add: str | None = None,
) -> Any:
    """``activation(norm(input) + residual)``; ``norm`` may be any callable, and one call where it
    is a layer of bnext, or a module whose forward ends with one."""
    return follow(norm, input, Rest(add, residual, activation, options))


def follow(norm: Any, input: Any, rest: Rest) -> Any:
    """The same, of what follows as one value."""
    if rest is _NOTHING or not _is_ordinary(input) or not isinstance(norm, nn.Module):
        return finish(norm(input), rest)
    name = None if rest.activation is None else _name(rest.activation, rest.options)
    if (name is None and rest.activation is not None) or is_watched(norm):
        return finish(norm(input), rest)
    if not is_plain_norm(norm):
        tail = getattr(type(norm), "_bnext_tail", None)
        return finish(norm(input), rest) if tail is None else tail(norm, rest, input)
    layer: Any = norm
    if rest.add is None:
        if not _may_keep_output(name) and not layer._trains() and torch.is_grad_enabled():
            return finish(layer._fused(input, None, None), rest)
        return layer._fused(input, None, name)
    if not _fits(rest.residual, input):
        return finish(norm(input), rest)
    if name is None or (name in activations.FROM_OUTPUT and _may_keep_output(name)):
        return layer._fused(input, rest.residual, name)
    # Backward would need the residual or the output as it is now; torch's own keeps the sum, and
    # leaves both to be changed in place.
    return finish(layer._fused(input, rest.residual, None), rest._replace(add=None))


def finish(value: Any, rest: Rest) -> Any:
    """What follows, as it was written."""
    if rest.add is not None:
        value = ADDITIONS[rest.add](value, rest.residual)
    if rest.activation is None:
        return value
    return rest.activation(value, **rest.options) if rest.options else rest.activation(value)


def in_order(todo: list[nn.Module], input: Any, rest: Rest = _NOTHING) -> Any:
    """``nn.Sequential``'s forward, and what follows it."""
    at = 0
    while at < len(todo):
        module = todo[at]
        at += 1
        if ends_in_norm(module):
            following = at
            while following < len(todo) and is_identity(todo[following]):
                following += 1
            if following == len(todo):
                return follow(module, input, rest)
            if module_activation(todo[following]) is not None:
                input = follow(module, input, Rest(activation=todo[following]))
                at = following + 1
                continue
        input = module(input)
    return finish(input, rest)


def ends_in_norm(module: nn.Module) -> bool:
    """Whether ``follow`` may have a better way than to call it."""
    return is_plain_norm(module) or hasattr(type(module), "_bnext_tail")


def is_plain_norm(module: nn.Module) -> bool:
    """Whether its forward is a batch norm of bnext and no more."""
    return isinstance(module, _FusedBatchNorm) and module._is_plain()


def is_identity(module: Any) -> bool:
    """Whether calling it does nothing."""
    return type(module) is nn.Identity and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether others see, or have changed, what a module gets or returns."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or type(module).__call__ is not nn.Module.__call__
        or nn_module._has_any_global_hook()
        # The graph shall have every module.
        or is_fx_symbolic_tracing()
        or is_exporting()
    )


def module_activation(module: Any) -> str | None:
    """The name of the activation that bnext fuses for a module."""
    name = activations.of_module(module)
    return None if name is None or is_watched(module) else name


def _name(activation: Any, options: dict[str, Any] | None) -> str | None:
    if isinstance(activation, nn.Module):
        return None if options else module_activation(activation)
    return activations.of_function(activation, options or {})


def _may_keep_output(name: str | None) -> bool:
    """Whether backward may need the output as it is now: torch's own does, or bnext's does not."""
    return (
        name is None
        or name not in activations.FROM_OUTPUT
        or activations.ACTIVATIONS[name].torch_keeps_output
    )


def _is_ordinary(value: Any) -> bool:
    """Whether it is a tensor, and none that sees additions and activations by itself."""
    kind = type(value)
    return (
        kind is Tensor
        or kind is nn.Parameter
        or (isinstance(value, Tensor) and kind.__torch_function__ is _DISABLED)
    )


def _fits(residual: Any, input: Tensor) -> bool:
    """Whether the sum neither broadcasts nor promotes, nor has another layout."""
    return (
        _is_ordinary(residual)
        and residual.shape == input.shape
        and residual.stride() == input.stride()
        and residual.dtype == input.dtype
        and residual.device == input.device
    )
