"""The one list of cases (shapes, layouts, dtypes, modes) that every test file draws from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import bnext

ACTIVATIONS = (None, *bnext.activations.ACTIVATIONS)
# One of each kind, for products with many other factors: none, one whose derivative is taken from
# the output, one that needs the pre-activation.
KINDS = (None, "relu", "silu")

# (dtype of the input, dtype of the parameters and buffers)
DTYPES = (
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)

SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}

# What the shapes are for: one channel, fewer channels than a vector is wide (3, 5, 7), a count that
# is no multiple of the width (13, 50, 100, 257), exact multiples (64); spatial size 1, tiny (2, 7,
# 49) and large; a batch of one, two and many.
SHAPES = (
    (2, 1),
    (2, 5),
    (7, 3),
    (32, 50),
    (5, 100),
    (129, 64),
    (33, 257),
    (2000, 13),
    (1, 13, 11),
    (2, 1, 5),
    (8, 50, 1),
    (3, 64, 49),
    (1, 1, 1, 2),
    (2, 3, 2, 2),
    (4, 5, 7, 7),
    (3, 13, 1, 1),
    (1, 7, 3, 5),
    (2, 64, 7, 7),
    (2, 257, 3, 3),
    (2, 2, 56, 56),
    (2, 3, 2, 3, 2),
    (1, 5, 4, 7, 7),
    (2, 16, 3, 5, 5),
)

# One shape per rank and kind of kernel, for products with many other factors.
FEW_SHAPES = ((33, 13), (6, 5, 7), (4, 13, 7, 7), (5, 64, 3, 3), (2, 3, 2, 3, 5))

# What a layout is, is said in `lay_out`.
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded", "offset")


def layouts_of(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The layouts that a shape can have."""
    return tuple(x for x in LAYOUTS if x != "channels_last" or len(shape) > 2)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of the shape and (but for "expanded") the values of `values`, laid out as said."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":  # channels innermost; of 3-D, a transposed (N, L, C)
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":  # channels outermost
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":  # every second element of the last dimension
        storage = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), math.nan)
        view = storage[..., ::2]
        return view.copy_(values)
    if layout == "expanded":  # stride 0 in the last dimension (in a matrix: equal channels)
        return values[..., :1].expand(values.shape)
    if layout == "offset":  # contiguous, but one element off every alignment
        storage = values.new_full((values.numel() + 1,), math.nan)
        return storage[1:].view(values.shape).copy_(values)
    raise ValueError(f"unknown layout {layout!r}")


@dataclass(frozen=True)
class Case:
    """One input: its shape, layout and dtype, and the dtype of the parameters beside it."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype = torch.float32
    mean: float = 0.5
    std: float = 1.5
    seed: int = 0

    def __str__(self) -> str:
        dtypes = SHORT[self.dtype]
        if self.param_dtype != self.dtype:
            dtypes += "+" + SHORT[self.param_dtype]
        return f"{'x'.join(map(str, self.shape))}-{self.layout}-{dtypes}"

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def spatial_rank(self) -> int:
        """The d of BatchNorm<d>d."""
        return max(1, len(self.shape) - 2)

    def with_dtypes(self, dtype: torch.dtype, param_dtype: torch.dtype | None = None) -> Case:
        return replace(self, dtype=dtype, param_dtype=param_dtype or dtype)

    def input(self, device: str | torch.device = "cpu") -> Tensor:
        """The input: normal, with the mean and the standard deviation of the case."""
        return self._normal(0, device, self.mean, self.std)

    def residual(self, device: str | torch.device = "cpu") -> Tensor:
        """A second tensor like the input."""
        return self._normal(1, device, 0.0, 1.0)

    def grad_output(self, device: str | torch.device = "cpu") -> Tensor:
        """A gradient for the output. Its mean is not 0: a gradient that is centred already would
        hide an error in the terms that batch norm subtracts."""
        return self._normal(2, device, 0.25, 1.0)

    def parameters(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """weight (of both signs), bias, running_mean, running_var; nothing is 0 or 1."""
        generator = torch.Generator().manual_seed(self.seed * 4 + 3)

        def draw() -> Tensor:
            return torch.rand(self.channels, generator=generator, dtype=torch.float64)

        sign = torch.where(draw() < 0.25, -1.0, 1.0)
        values = {
            "weight": (draw() + 0.5) * sign,
            "bias": draw() * 2 - 1,
            "running_mean": draw() * 2 - 1,
            "running_var": draw() * 1.5 + 0.5,
        }
        return {name: v.to(device, self.param_dtype) for name, v in values.items()}

    def _normal(self, stream: int, device: str | torch.device, mean: float, std: float) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 4 + stream)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64) * std + mean
        return lay_out(values.to(device, self.dtype), self.layout)


@dataclass(frozen=True)
class Mode:
    """How a layer is built."""

    affine: bool = True
    bias: bool = True
    track_running_stats: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5

    def __str__(self) -> str:
        default = Mode()
        changed = [
            f"{name}={value}" for name, value in vars(self).items() if value != vars(default)[name]
        ]
        return ",".join(changed) or "default"


MODES = (
    Mode(),
    Mode(affine=False),
    Mode(bias=False),
    Mode(track_running_stats=False),
    Mode(affine=False, track_running_stats=False),
    Mode(momentum=None),
    Mode(momentum=1.0),
    Mode(momentum=-0.1),
    Mode(momentum=0.0),
    Mode(eps=1e-2),
)

CASES = tuple(
    Case(shape, layout, dtype, param_dtype)
    for shape in SHAPES
    for layout in layouts_of(shape)
    for dtype, param_dtype in DTYPES
    # The rarer layouts take the kernels of the others, after a copy or with other strides: two of
    # the dtype pairs are enough to see that.
    if layout in ("contiguous", "channels_last") or (dtype, param_dtype) in (DTYPES[1], DTYPES[3])
    # Expanded, these two hold one value per channel: of variance 0, so a test of eps only.
    if not (layout == "expanded" and shape in ((1, 13, 11), (1, 1, 1, 2)))
)

FEW_CASES = tuple(
    Case(shape, layout, dtype, param_dtype)
    for shape in FEW_SHAPES
    for layout in ("contiguous", "channels_last")
    if layout in layouts_of(shape)
    for dtype, param_dtype in DTYPES
)
