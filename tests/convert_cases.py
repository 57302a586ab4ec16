"""Small modules for bnext.convert, whose forwards do what a trace would not see."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import convert_not_fused  # noqa: F401
import torch
from convert_forwards import Block, block_class
from torch import Tensor, nn
from torch.nn import functional as F


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


class OwnCall(_Odd):
    """With a module that does more when it is called than its forward."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def __call__(self, x):
            return super().__call__(x) * 2

        def forward(self, x):
            return self.bn(x)

    def __init__(self) -> None:
        super().__init__()
        self.inner = OwnCall.Twice()

    def forward(self, x):
        return self.relu(self.bn(F.relu(self.inner(x) + x)))


class TailInPlace(_Odd):
    """What is added reads what the module that ends in the norm has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        x = self.relu(self.bn(x)) - 1
        return F.relu(self.inner(x) + self.fc(x))


class AsksForClass(_Odd):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.other = nn.BatchNorm1d(4), Decorated()

    def forward(self, x):
        x = self.other(x)
        return self.child(x) * (2 if type(self.child) is nn.BatchNorm1d else 3)


ODD = [
    Autocast, GradMode, Decorated, WithoutGrad, Appends, Aliased, CountsByAlias, AssignsData,
    Dictionary, Raises, Super, KeywordOnly, Walrus, Loops, Registers, HalfNone,
    OwnCall, TailInPlace, AsksForClass,
]  # fmt: skip


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
