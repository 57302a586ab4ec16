"""The demo's networks, and the normalisation layers that are put into them.

Every layer is ``activation(batch_norm(input) + residual)``. PyTorch's and bnext's versions have the
same ``state_dict``, so that one network's weights and buffers load into the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

import bnext

NormFactory = Callable[[int, int, "str | None"], nn.Module]
"""(spatial kind: 1 for BatchNorm1d or 2 for BatchNorm2d, channels, activation) -> a layer."""


def _then_relu(output: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if residual is not None:
        output = output + residual
    return F.relu(output) if activation == "relu" else output


class TorchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d, then the residual, then the activation: three eager PyTorch operations."""

    def __init__(self, num_features: int, activation: str | None) -> None:
        super().__init__(num_features)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return _then_relu(super().forward(input), residual, self.activation)


class TorchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, then the residual, then the activation: three eager PyTorch operations."""

    def __init__(self, num_features: int, activation: str | None) -> None:
        super().__init__(num_features)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return _then_relu(super().forward(input), residual, self.activation)


def torch_norm(kind: int, channels: int, activation: str | None) -> nn.Module:
    return (TorchNorm1d if kind == 1 else TorchNorm2d)(channels, activation)


def bnext_norm(
    kind: int, channels: int, activation: str | None, ghost_batch_size: int | None = None
) -> nn.Module:
    if activation is None:
        plain = bnext.BatchNorm1d if kind == 1 else bnext.BatchNorm2d
        return plain(channels, ghost_batch_size=ghost_batch_size)
    fused = bnext.BatchNormAct1d if kind == 1 else bnext.BatchNormAct2d
    return fused(channels, activation=activation, ghost_batch_size=ghost_batch_size)


def ghost_norm(ghost_batch_size: int) -> NormFactory:
    return partial(bnext_norm, ghost_batch_size=ghost_batch_size)


class DigitsCNN(nn.Module):
    """A residual network for 8x8 images: 1 -> 32 -> 64 channels, then a linear classifier."""

    def __init__(self, norm: NormFactory, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.norm1 = norm(2, 32, "relu")
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm2 = norm(2, 32, "relu")
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.norm3 = norm(2, 64, "relu")
        self.head = nn.Linear(64, n_classes)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(input))
        hidden = self.norm2(self.conv2(hidden), hidden)
        hidden = self.norm3(self.conv3(hidden))
        return self.head(hidden.mean((2, 3)))


class FlightsMLP(nn.Module):
    """A residual perceptron; with ``input_norm`` the raw features go through a batch norm first."""

    def __init__(
        self, norm: NormFactory, n_features: int, input_norm: bool, n_classes: int = 2
    ) -> None:
        super().__init__()
        self.norm0 = norm(1, n_features, None) if input_norm else None
        self.linear1 = nn.Linear(n_features, 128, bias=False)
        self.norm1 = norm(1, 128, "relu")
        self.linear2 = nn.Linear(128, 128, bias=False)
        self.norm2 = norm(1, 128, "relu")
        self.head = nn.Linear(128, n_classes)

    def forward(self, input: Tensor) -> Tensor:
        hidden = input if self.norm0 is None else self.norm0(input)
        hidden = self.norm1(self.linear1(hidden))
        hidden = self.norm2(self.linear2(hidden), hidden)
        return self.head(hidden)


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layers of a network, by name, in the order of the forward pass."""
    return {name: child for name, child in model.named_children() if name.startswith("norm")}
