"""Small modules for bnext.convert: which norms shall be fused, and which not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A body between a convolution's batch norm and what follows it."""

    def __init__(self, follow: Callable[..., Tensor] | None = None, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.conv, self.bn = conv(4, 4, 3, padding=1), norm(4)
        self.relu, self.silu = nn.ReLU(), nn.SiLU()
        self.leaky, self.steep = nn.LeakyReLU(), nn.LeakyReLU(0.2)
        self.identity, self.tanh = nn.Identity(), nn.Tanh()
        self.follow = follow

    def forward(self, x: Tensor) -> Tensor:
        return self.follow(self, self.bn(self.conv(x)), x)


def in_place_sum(m: Block, y: Tensor, x: Tensor) -> Tensor:
    y += x
    return m.relu(y)


# What follows the norm y of a block with input x, and the (activation, residual) that it fuses.
FOLLOWED = {
    "module": (lambda m, y, x: m.relu(y), ("relu", False)),
    "silu": (lambda m, y, x: m.silu(y), ("silu", False)),
    "leaky": (lambda m, y, x: m.leaky(y), ("leaky_relu", False)),
    "identity": (lambda m, y, x: m.relu(m.identity(y)), ("relu", False)),
    "functional": (lambda m, y, x: F.relu(y), ("relu", False)),
    "functional in place": (lambda m, y, x: F.relu(y, inplace=True), ("relu", False)),
    "torch.relu": (lambda m, y, x: torch.relu(y), ("relu", False)),
    "method": (lambda m, y, x: y.relu_(), ("relu", False)),
    "F.silu": (lambda m, y, x: F.silu(y), ("silu", False)),
    "F.leaky_relu": (lambda m, y, x: F.leaky_relu(y, 0.01), ("leaky_relu", False)),
    "+": (lambda m, y, x: m.relu(y + x), ("relu", True)),
    "+ reversed": (lambda m, y, x: F.relu(x + y), ("relu", True)),
    "+=": (in_place_sum, ("relu", True)),
    "torch.add": (lambda m, y, x: m.silu(torch.add(y, x)), ("silu", True)),
    "broadcast": (lambda m, y, x: m.relu(y + x.mean((2, 3), keepdim=True)), ("relu", True)),
    "promotion": (lambda m, y, x: m.relu(y + x.double()), ("relu", True)),
    "used twice": (lambda m, y, x: m.relu(y) * torch.sigmoid(y), None),
    "steep leaky": (lambda m, y, x: m.steep(y), None),
    "steep F.leaky_relu": (lambda m, y, x: F.leaky_relu(y, 0.2), None),
    "tanh": (lambda m, y, x: m.tanh(y), None),
    "returned": (lambda m, y, x: y, None),
    "alpha": (lambda m, y, x: m.relu(torch.add(y, x, alpha=2)), None),
    "number": (lambda m, y, x: m.relu(y + 1), None),
    "doubled": (lambda m, y, x: m.relu(y + y), None),
    "called twice": (lambda m, y, x: m.relu(m.bn(m.relu(y))), None),
}


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


class ByTraining(OptionalSkip):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.relu(y) if self.training else F.silu(y)


class Reaching(nn.Module):
    """A container that calls the norm inside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner[0](x)


class Counting(OptionalSkip):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.relu(self.bn(x))


class Noisy(OptionalSkip):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(x)) + torch.rand(4)


class MutatingBranch(OptionalSkip):
    """Fused where the activation is, the norm would read what the branch has changed."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        x.mul_(2)
        return torch.relu(y) + x


class Methods(OptionalSkip):
    """A rewritten forward would leave `features` to relu twice."""

    def features(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Branching(OptionalSkip):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(x))
        return y if y.sum() > 0 else -y


class ListOrTensor(nn.Module):
    """As a layer of DenseNet: the same pair on both paths."""

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


class NoneInside(OptionalSkip):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(x))
        z = None if x.dim() == 3 else y
        return y if z is None else z


class AnotherUseInEval(OptionalSkip):
    """Its activation must stay a module for one of the ways."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(x))
        return y if self.training else y + self.relu(x)
