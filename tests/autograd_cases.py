"""Small float64 cases for the derivative tests, and an oracle made of torch.nn.functional alone.

Finite differences want few elements, values away from the kinks of relu and leaky_relu, and a
well-conditioned variance even in a ghost of two values: hence the tiny shapes and the large EPS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from cases import ACTIVATIONS
from op_samples import ops
from oracle import KINKS, activate
from torch import Tensor

import bnext

EPS = 0.1
# Five samples in ghosts of three: pieces of 3 and 2, so that the sizes differ by one.
GHOST = 3
SHAPES = {"rows": (5, 3), "planes": (5, 2, 1, 2), "channels_last": (5, 2, 1, 2)}
# A central difference moves the pre-activation by about 1e-6: anything well above will do.
KINK_DISTANCE = 1e-2


def torch_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    ghost_batch_size: int | None = None,
) -> Tensor:
    """bnext.batch_norm out of F.batch_norm and tensor_split; leaves the running buffers alone."""
    if not training:
        z = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    else:
        ghosts = 1 if ghost_batch_size is None else -(-len(input) // ghost_batch_size)
        pieces = input.tensor_split(ghosts) if ghosts > 1 else (input,)
        z = torch.cat([F.batch_norm(p, None, None, weight, bias, True, 0.0, eps) for p in pieces])
    return activate(z if residual is None else z + residual, activation)


@dataclass(frozen=True)
class Case:
    """One way to call bnext.batch_norm, with its inputs on op_samples.ops.device."""

    layout: str = "planes"
    activation: str | None = None
    residual: bool = False
    affine: str = "both"  # "both", "weight", "bias" or "none"
    ghost: int | None = None
    training: bool = True

    def __str__(self) -> str:
        return "-".join(
            [
                self.layout,
                self.activation or "linear",
                *(["residual"] if self.residual else []),
                self.affine,
                *([f"ghost{self.ghost}"] if self.ghost else []),
                "train" if self.training else "eval",
            ]
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.layout]

    def buffers(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        channels = self.shape[1]
        like = {"dtype": dtype, "device": ops.device}
        return torch.linspace(-0.5, 0.7, channels, **like), torch.linspace(
            0.6, 1.7, channels, **like
        )

    def _draw(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(ops.device)

        channels = self.shape[1]
        tensors = {"input": randn(*self.shape) * 1.5 + 0.3}
        if self.affine in ("both", "weight"):
            tensors["weight"] = randn(channels) * 0.5 + 1.0
        if self.affine in ("both", "bias"):
            tensors["bias"] = randn(channels) * 0.5
        if self.residual:
            tensors["residual"] = randn(*self.shape)
        if self.layout == "channels_last":
            for name in ("input", "residual"):
                if name in tensors:
                    tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
        return tensors

    def tensors(self, dtype: torch.dtype = torch.float64, grad: bool = True) -> dict[str, Tensor]:
        """The differentiable arguments by name; the first seed that keeps away from the kinks."""
        for seed in range(1000):
            tensors = self._draw(seed)
            linear = self.call(torch_batch_norm, tensors, activation=None)
            kinks = KINKS.get(self.activation, ())
            if all((linear - kink).abs().min() > KINK_DISTANCE for kink in kinks):
                break
        else:
            raise AssertionError(f"no seed keeps {self} away from its kinks")
        return {k: v.to(dtype).detach().requires_grad_(grad) for k, v in tensors.items()}

    def call(
        self, function: Callable[..., Tensor], tensors: dict[str, Tensor], **overrides: object
    ) -> Tensor:
        """`function` (bnext.batch_norm or a stand-in for it) on this case."""
        mean, var = (None, None) if self.training else self.buffers(tensors["input"].dtype)
        keywords = {
            "activation": self.activation,
            "ghost_batch_size": self.ghost if self.training else None,
            "residual": tensors.get("residual"),
        }
        keywords.update(overrides)
        return function(
            tensors["input"],
            mean,
            var,
            tensors.get("weight"),
            tensors.get("bias"),
            self.training,
            0.1,
            EPS,
            **keywords,
        )

    def function(self, names: tuple[str, ...]) -> Callable[..., Tensor]:
        """bnext.batch_norm as a function of the tensors in `names` alone, for gradcheck."""
        rest = self.tensors(grad=False)

        def call(*values: Tensor) -> Tensor:
            return self.call(bnext.batch_norm, {**rest, **dict(zip(names, values, strict=True))})

        return call


def all_cases(
    layouts: tuple[str, ...] = ("rows", "planes", "channels_last"),
    activations: tuple[str | None, ...] = ACTIVATIONS,
    residuals: tuple[bool, ...] = (False, True),
    affines: tuple[str, ...] = ("both", "weight", "none"),
    modes: tuple[tuple[bool, int | None], ...] = ((True, None), (True, GHOST), (False, None)),
) -> list[Case]:
    return [
        Case(layout, activation, residual, affine, ghost, training)
        for layout, activation, residual, affine, (training, ghost) in product(
            layouts, activations, residuals, affines, modes
        )
    ]
