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
        self.inplace, self.nothing, self.scale = True, None, 2.0
        self.relu_in_place = nn.ReLU(inplace=True)

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
    return self.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))


@followed("relu", True)
def promotion(self, x):
    return self.relu(self.bn(self.conv(x)) + x.double())


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
    shortcut = self.narrow(x) if x.dim() == 4 else x
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


@not_followed
def used_twice(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) * torch.sigmoid(y)


@not_followed
def used_later(self, x):
    y = self.bn(self.conv(x))
    z = self.relu(y)
    return z * 2 + y


@not_followed
def used_in_the_next_round(self, x):
    y = x
    for _ in range(2):
        z = y.abs()
        y = self.bn(self.conv(x))
        x = self.relu(y) + z
    return x


@not_followed
def used_by_a_function(self, x):
    y = self.bn(self.conv(x))
    later = lambda: y  # noqa: E731
    z = self.relu(y)
    return z + later()


@not_followed
def another_name(self, x):
    y = same = self.bn(self.conv(x))
    return self.relu(y) + same


@not_followed
def kept(self, x):
    self.output = self.bn(self.conv(x))
    return self.relu(self.output) - self.output


@not_followed
def steep_leaky(self, x):
    return self.steep(self.bn(self.conv(x)))


@not_followed
def steep_functional(self, x):
    return F.leaky_relu(self.bn(self.conv(x)), negative_slope=0.2)


@not_followed
def tanh(self, x):
    return self.tanh(self.bn(self.conv(x)))


@not_followed
def returned(self, x):
    return self.bn(self.conv(x))


@not_followed
def alpha(self, x):
    return self.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


@not_followed
def number(self, x):
    return self.relu(self.bn(self.conv(x)) + 1)


@not_followed
def doubled(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y + y)


@not_followed
def attribute_as_number(self, x):
    return self.relu(self.bn(self.conv(x)) + self.scale)


# torch too refuses to train with the input of a norm, or its statistics, changed in place.
WITHOUT_GRAD = [
    "input_changed_between",
    "input_changed_by_what_is_added",
    "input_changed_by_a_module",
    "statistics_read_between",
]


@not_followed
def input_changed_between(self, x):
    y = x * 1
    z = self.bn(y)
    y.mul_(2)
    return torch.relu(z + y)


@not_followed
def input_changed_by_what_is_added(self, x):
    y = x * 1
    return torch.relu(self.bn(y) + y.mul_(2))


@not_followed
def input_changed_by_a_module(self, x):
    y = x * 1
    z = self.bn(y)
    shortcut = self.relu_in_place(y)
    return torch.relu(z + shortcut)


@not_followed
def mode_changed_between(self, x):
    y = self.bn(self.conv(x))
    previous = torch.is_grad_enabled()
    torch.set_grad_enabled(previous)
    z = self.twice(x)
    return self.relu(y + z)


@not_followed
def statistics_read_between(self, x):
    y = self.bn(self.conv(x))
    bias = self.bn.running_mean.clone().view(1, -1, 1, 1).expand_as(x)
    self.bn.reset_running_stats()
    return self.relu(y + bias)


@not_followed
def output_caught(self, x):
    y = x
    try:
        y = self.bn(self.conv(x))
        y = self.relu(y)
    except RuntimeError:
        pass
    return y


def block(name: str, dims: int = 2) -> Block:
    torch.manual_seed(0)
    return block_class(name)(dims)


def small(seed: int = 0) -> nn.Module:
    """A stem, a block that is rewritten, and a head, with what a training run may have changed."""
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(stem, block("sum_in_place"), nn.BatchNorm2d(4, affine=False))
    model[1].bn.eps, model[1].bn.momentum = 1e-3, None
    model[1].bn.eval()
    model[1].bn.weight.requires_grad_(False)
    return model
