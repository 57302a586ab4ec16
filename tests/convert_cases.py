"""Small modules for bnext.convert: which norms shall be fused, and with what."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
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


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.BatchNorm1d(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x)) + 1))


class OptionalSkip(nn.Module):
    """Another way for every way of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.bn(x)
        if skip is not None:
            x = x + skip
        return self.relu(x)


class Reaching(nn.Module):
    """A container that calls the norm inside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.inner[0](x)


class Counting(OptionalSkip):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.relu(self.bn(x))


class Noisy(OptionalSkip):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(x)) + torch.rand(4)


class Methods(OptionalSkip):
    """A norm that another method calls."""

    def features(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Branching(OptionalSkip):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(x))
        return y if y.sum() > 0 else -y


class ListOrTensor(nn.Module):
    """As a layer of DenseNet: the same pair for both."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return self.relu(self.bn(torch.cat(parts, 1)))


class TwoNorms(nn.Module):
    """A sum of two norms' outputs is the residual sum of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.first(x) + self.second(x))


class OptionalPlaces(nn.Module):
    """As a block of DLA: one activation module in two places, and what was not given is made up."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2, self.relu = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor | None = None, scale: float | None = 0.5) -> Tensor:
        if skip is None:
            skip = x
        y = self.bn2(self.relu(self.bn1(x)))
        y = self.relu(y + skip)
        return y if scale is None else y * scale


class ConvNorm(nn.Module):
    """Returns a norm's output, with what may follow it or not."""

    def __init__(self, act: nn.Module | None = None, dims: int = 1) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), act

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if scale != 1.0:
            return self.bn(self.conv(x * scale)) * 0.5
        x = self.conv(x)
        x = self.bn(x)
        if self.act is not None:
            x = self.act(x)
        return x


class ThroughSubmodules(nn.Module):
    """Activations and additions after what returns a norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(), ConvNorm(nn.ReLU())
        self.third = nn.Sequential(ConvNorm(), nn.Identity())
        self.fourth = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y = self.second(y)
        y = self.third(y) + x
        return self.relu(self.fourth(y) + x)


# What a trace of these would not see, or would change; beside a pair that is to be fused.


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu, self.fc = nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)
        self.kept: list[Any] = []
        self.table: dict[str, Any] = {}
        self.register_buffer("seen", torch.zeros(()))


def doubled_output(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) * 2

    return wrapper


class Autocast(_Odd):
    def forward(self, x):
        h = self.relu(self.bn(x))
        with torch.autocast("cpu", enabled=False):
            return self.fc(h)


class GradMode(_Odd):
    def forward(self, x):
        h = self.relu(self.bn(x))
        with torch.no_grad():
            scale = h.abs().mean()
        return h * scale if torch.is_grad_enabled() else h * scale + 100


class Decorated(_Odd):
    @doubled_output
    def forward(self, x):
        return self.relu(self.bn(x))


class WithoutGrad(_Odd):
    @torch.no_grad()
    def forward(self, x):
        return self.relu(self.bn(x))


class Appends(_Odd):
    def forward(self, x):
        y = self.relu(self.bn(x) + x)
        self.kept.append(y)
        self.table["last"] = y
        return y


class Aliased(_Odd):
    def forward(self, x):
        x = x * 1
        same = x
        x += self.bn(x)
        return torch.relu(x) + same


class CountsByAlias(_Odd):
    def forward(self, x):
        n = self.seen
        n += 1
        return self.relu(self.bn(x)) * n


class AssignsData(_Odd):
    def forward(self, x):
        self.fc.weight.data = self.fc.weight.data.clamp(min=0)
        return self.fc(self.relu(self.bn(x)))


class Dictionary(_Odd):
    def forward(self, x):
        return OrderedDict(out=self.relu(self.bn(x)))


class Raises(_Odd):
    def forward(self, x):
        y = self.relu(self.bn(x))
        try:
            return y + x.no_such_attribute
        except AttributeError:
            return y


class Super(Decorated):
    def forward(self, x):
        return self.fc(super().forward(self.relu(self.bn(x))))


class KeywordOnly(_Odd):
    def forward(self, *inputs, scale=2.0, **options):
        return self.relu(self.bn(inputs[0])) * scale


class Walrus(_Odd):
    def forward(self, x):
        if (y := self.relu(self.bn(x))).sum() > 0:
            return y
        return -y


class Loops(_Odd):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))

    def forward(self, x):
        for norm in self.norms:
            x = F.relu(norm(x) + x)
        return self.relu(self.bn(x))


class Registers(_Odd):
    """Whose subclasses are written down."""

    made: list[type] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        Registers.made.append(cls)
        super().__init_subclass__(**kwargs)

    def forward(self, x):
        return self.relu(self.bn(x))


class HalfNone(_Odd):
    def forward(self, x, flag=False):
        y = self.bn(x)
        if flag:
            y = y + x
        elif self.training:
            y = y * 2
        return self.relu(y)


ODD = [
    Autocast, GradMode, Decorated, WithoutGrad, Appends, Aliased, CountsByAlias, AssignsData,
    Dictionary, Raises, Super, KeywordOnly, Walrus, Loops, Registers, HalfNone,
]  # fmt: skip
