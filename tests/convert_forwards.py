"""Small forwards for bnext.convert: which norms shall be fused, and with what."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Layers for the forwards of `FOLLOWED`, which `block` gives it."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.conv, self.bn = conv(4, 4, 3, padding=1), norm(4)
        self.relu, self.silu = nn.ReLU(), nn.SiLU()
        self.leaky, self.steep = nn.LeakyReLU(), nn.LeakyReLU(0.2)
        self.identity, self.tanh = nn.Identity(), nn.Tanh()
        self.narrow = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.layers = nn.ModuleList([nn.ReLU()])
        self.again = nn.Sequential(self.conv, self.bn, self.tanh)
        self.inplace, self.nothing, self.scale = True, None, 2.0
        self.relu_in_place = nn.ReLU(inplace=True)

    def expand(self, x: Tensor) -> Tensor:
        return x * self.bn.num_batches_tracked

    def twice(self, x: Tensor) -> Tensor:
        return x * 2


FOLLOWED: dict[str, tuple[Callable[..., Any], tuple[str | None, bool] | None]] = {}


def followed(activation: str | None, residual: bool = False) -> Callable[..., Any]:
    """A forward whose norm shall be fused with that."""

    def add(forward: Callable[..., Any]) -> Callable[..., Any]:
        FOLLOWED[forward.__name__] = forward, (activation, residual)
        return forward

    return add


def not_followed(forward: Callable[..., Any]) -> Callable[..., Any]:
    FOLLOWED[forward.__name__] = forward, None
    return forward


def block_class(name: str) -> type[Block]:
    """Always the same, and to be found by pickle."""
    cls = type(f"Block_{name}", (Block,), {"forward": FOLLOWED[name][0]})
    return globals().setdefault(cls.__name__, cls)


@followed("relu")
def module(self, x):
    return self.relu(self.bn(self.conv(x)))


@followed("relu")
def statements(self, x):
    x = self.conv(x)
    x = self.bn(x)
    x = self.relu(x)
    return x


@followed("relu")
def other_names(self, x):
    a = self.conv(x)
    b = self.bn(a)
    c = self.relu(b)
    return c + a


@followed("silu")
def silu(self, x):
    return self.silu(self.bn(self.conv(x)))


@followed("leaky_relu")
def leaky(self, x):
    return self.leaky(self.bn(self.conv(x)))


@followed("relu")
def identity(self, x):
    return self.relu(self.identity(self.bn(self.conv(x))))


@followed("relu")
def functional(self, x):
    return F.relu(self.bn(self.conv(x)))


@followed("relu")
def functional_in_place(self, x):
    return F.relu(self.bn(self.conv(x)), inplace=True)


@followed("relu")
def in_place_as_configured(self, x):
    return nn.functional.relu(self.bn(self.conv(x)), inplace=self.inplace)


@followed("relu")
def torch_relu(self, x):
    return torch.relu(self.bn(self.conv(x)))


@followed("relu")
def method(self, x):
    return self.bn(self.conv(x)).relu_()


@followed("relu")
def method_of_a_variable(self, x):
    y = self.bn(self.conv(x))
    return y.relu()


@followed("silu")
def functional_silu(self, x):
    return F.silu(self.bn(self.conv(x)))


@followed("leaky_relu")
def functional_leaky(self, x):
    return F.leaky_relu(self.bn(self.conv(x)), 0.01)


@followed("relu", True)
def sum_first(self, x):
    return self.relu(self.bn(self.conv(x)) + x)


@followed("relu", True)
def sum_second(self, x):
    return F.relu(x + self.bn(self.conv(x)))


@followed("relu", True)
def sum_of_what_changes_the_input(self, x):
    x = x.clone()
    return F.relu(x.mul_(2) + self.bn(x))


@followed("relu", True)
def sum_in_place(self, x):
    y = self.bn(self.conv(x))
    y += x
    return self.relu(y)


@followed("relu", True)
def input_that_changes_what_is_added(self, x):
    x = x * 1
    y = self.bn(self.relu_in_place(x))
    return self.relu(torch.mean(x, (2, 3), keepdim=True) + y)


@followed("relu")
def input_that_changes_another_operand(self, x):
    x = x * 1
    y = self.bn(self.relu_in_place(x))
    return torch.mean(x, (2, 3), keepdim=True) * self.relu(y)


@followed("relu", True)
def sum_method(self, x):
    return self.relu(self.bn(self.conv(x)).add_(x))


@followed("silu", True)
def torch_add(self, x):
    return self.silu(torch.add(self.bn(self.conv(x)), x))


@followed("relu", True)
def operator_add(self, x):
    return self.relu(operator.add(x, self.bn(self.conv(x))))


@followed("relu", True)
def broadcast(self, x):
    return self.relu(self.bn(self.conv(x)) + torch.mean(x, (2, 3), keepdim=True))


@followed("relu", True)
def promotion(self, x):
    return self.relu(x.double() + self.bn(self.conv(x)))


@followed(None, True)
def sum_alone(self, x):
    return x + self.bn(self.conv(x))


@followed(None, True)
def sum_and_tanh(self, x):
    y = self.bn(self.conv(x))
    y = y + x
    return self.tanh(y)


@followed("relu", True)
def shortcut_between(self, x):
    y = self.bn(self.conv(x))
    shortcut = self.narrow(x) if self.inplace else x
    y = y + shortcut
    y = self.relu(y)
    return y


@followed("relu", True)
def optional_attribute(self, x):
    y = self.conv(x)
    y = self.bn(y)
    if self.nothing is not None:
        y = self.nothing(y)
    if not self.inplace:
        return y
    return self.relu(y + x)


@followed("relu")
def attribute_by_getattr(self, x):
    y = self.bn(self.conv(x))
    drop = getattr(self, "no_such_layer", None)
    if drop is not None:
        y = drop(y)
    return self.relu(y)


@followed("relu")
def inside_other_statements(self, x):
    found = []
    for _ in range(2):
        with torch.no_grad():
            scale = x.abs().max()
        y = self.bn(self.conv(x / scale))
        y = self.relu(y)
        found.append(y)
    return torch.cat(found)


@followed("relu")
def in_a_list(self, x):
    return self.layers[0](self.bn(self.conv(x)))


@followed("relu")
def in_a_comprehension(self, x):
    return torch.cat([self.relu(self.bn(self.conv(part))) for part in (x, x * 2)])


@followed("silu")
def by_training(self, x):
    y = self.bn(self.conv(x))
    if self.training:
        y = F.silu(y)
    else:
        return self.relu(y)
    return y
