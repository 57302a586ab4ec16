"""Every activation that a layer can fuse: how torch computes it, and how models write it.

A new one is an entry here and a functor in csrc/core/activation.h.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# torch.nn.LeakyReLU's default, as in csrc/core/activation.h.
_SLOPE = nn.LeakyReLU().negative_slope


class Activation(NamedTuple):
    function: Callable[[Tensor], Tensor]
    # (grad, z) -> grad times the derivative at z, itself differentiable. With `from_output` the
    # output may stand for z, and backward keeps it in place of a residual.
    gradient: Callable[[Tensor, Tensor], Tensor]
    from_output: bool
    # How models write it: a module, and functions with the names of what they take beside the
    # input, in order; with these settings, if they are given any.
    module: type[nn.Module]
    functions: dict[Any, tuple[str, ...]]
    settings: dict[str, Any] = {}
    # Whether torch's own backward keeps the output too: whoever changes that later in place
    # gets the same error.
    torch_keeps_output: bool = False


def _relu_gradient(grad: Tensor, z: Tensor) -> Tensor:
    return torch.where(z <= 0, torch.zeros_like(grad), grad)


def _relu6_gradient(grad: Tensor, z: Tensor) -> Tensor:
    return torch.where((z <= 0) | (z >= 6), torch.zeros_like(grad), grad)


def _leaky_relu_gradient(grad: Tensor, z: Tensor) -> Tensor:
    return torch.where(z > 0, grad, grad * _SLOPE)


def _silu_gradient(grad: Tensor, z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return grad * sigmoid * (1 + z * (1 - sigmoid))


def relu_method(value: Any) -> Any:
    return value.relu()


def relu_method_in_place(value: Any) -> Any:
    return value.relu_()


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(
        F.relu,
        _relu_gradient,
        from_output=True,
        module=nn.ReLU,
        functions={
            F.relu: ("inplace",),
            F.relu_: (),
            torch.relu: (),
            torch.relu_: (),
            relu_method: (),
            relu_method_in_place: (),
        },
        torch_keeps_output=True,
    ),
    "relu6": Activation(
        F.relu6,
        _relu6_gradient,
        from_output=False,
        module=nn.ReLU6,
        functions={F.relu6: ("inplace",)},
    ),
    "leaky_relu": Activation(
        F.leaky_relu,
        _leaky_relu_gradient,
        from_output=True,
        module=nn.LeakyReLU,
        functions={F.leaky_relu: ("negative_slope", "inplace"), F.leaky_relu_: ("negative_slope",)},
        settings={"negative_slope": _SLOPE},
    ),
    "silu": Activation(
        F.silu,
        _silu_gradient,
        from_output=False,
        module=nn.SiLU,
        functions={F.silu: ("inplace",)},
    ),
}


# Those whose derivative backward takes from the output.
FROM_OUTPUT = frozenset(name for name, a in ACTIVATIONS.items() if a.from_output)


def apply(name: str | None, z: Tensor) -> Tensor:
    """The activation in torch's operators; of no name, ``z``."""
    return z if name is None else ACTIVATIONS[name].function(z)


def gradient(name: str | None, grad: Tensor, z: Tensor) -> Tensor:
    """The gradient before the activation, from that after it."""
    return grad if name is None else ACTIVATIONS[name].gradient(grad, z)


def check(name: str | None) -> str | None:
    """Returns the name of an activation, or raises what a constructor raises for an unknown one."""
    if name is not None and name not in ACTIVATIONS:
        known = ", ".join(repr(a) for a in (None, *ACTIVATIONS))
        raise ValueError(f"activation must be one of {known}, got {name!r}")
    return name


_BY_MODULE = {a.module: (name, a.settings) for name, a in ACTIVATIONS.items()}
# By id, since a callable may have no hash.
_BY_FUNCTION = {
    id(function): (name, accepted, a.settings)
    for name, a in ACTIVATIONS.items()
    for function, accepted in a.functions.items()
}


def of_module(module: Any) -> str | None:
    """The name of the activation that a module is, if bnext has it."""
    name, settings = _BY_MODULE.get(type(module), (None, {}))
    return name if all(getattr(module, k) == v for k, v in settings.items()) else None


def of_function(function: Any, options: dict[str, Any]) -> str | None:
    """The name of the activation that a call of ``function`` with ``options`` is."""
    name, accepted, settings = _BY_FUNCTION.get(id(function), (None, (), {}))
    fits = all(options.get(k, v) == v for k, v in settings.items())
    return name if fits and all(key in accepted for key in options) else None


def options_of(function: Any) -> tuple[str, ...] | None:
    """The names of what ``function`` takes beside its input, in order; None if it is unknown."""
    found = _BY_FUNCTION.get(id(function))
    return None if found is None else found[1]
