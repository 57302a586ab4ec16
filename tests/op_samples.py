"""Calls of the raw ops: one list of situations, from which the arguments of every op follow.

The ops are those of the CPU; on another device (a fixture of conftest.py) `using` says whose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cases import lay_out
from torch import Tensor

import bnext


class Ops:
    """torch.ops.bnext, or within `using` the namespace of another device; a name's op is looked up
    when it is asked for."""

    namespace: Any = torch.ops.bnext
    device = "cpu"

    @property
    def on_cpu_kernels(self) -> bool:
        return self.device == "cpu" and self.namespace is torch.ops.bnext

    def __getattr__(self, name: str) -> Any:
        return getattr(self.namespace, name)


ops = Ops()


@contextmanager
def using(device: str, namespace: Any = torch.ops.bnext) -> Iterator[None]:
    """Samples make tensors of `device` and call the ops of `namespace`."""
    before = ops.namespace, ops.device
    ops.namespace, ops.device = namespace, device
    try:
        yield
    finally:
        ops.namespace, ops.device = before


def assert_same_parts(
    actual: Tensor, expected: Tensor, input_dtype: torch.dtype, *, rounded: bool = False
) -> None:
    """On the CPU the fused op does the same sums in the same order, unless they were ``rounded`` on
    the way. The CUDA kernels cut a tensor into other pieces where they keep it on chip: what is
    summed in float differs by some roundings.
    """
    if ops.on_cpu_kernels and not rounded:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        return
    acc_t = torch.float64 if input_dtype == torch.float64 else torch.float32  # of the sums
    eps = max(torch.finfo(actual.dtype).eps, torch.finfo(acc_t).eps)
    torch.testing.assert_close(actual, expected, rtol=8 * eps, atol=8 * eps)


class Saved(NamedTuple):
    mean: Tensor
    mean_lo: Tensor
    invstd: Tensor


@dataclass(frozen=True)
class Sample:
    """A call of torch.ops.bnext.batch_norm, and what the other ops need to do the same."""

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    residual: bool = False
    affine: str = "both"
    tracked: bool = True
    counted: bool = True
    momentum: float | None = 0.1
    ghost: int | None = None
    training: bool = True

    def __str__(self) -> str:
        return self.name

    def _randn(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64) * 1.5 + 0.25
        return lay_out(values.to(ops.device, self.dtype), self.layout)

    @property
    def input(self) -> Tensor:
        return self._randn(0)

    @property
    def grad_output(self) -> Tensor:
        return self._randn(1)

    @property
    def residual_tensor(self) -> Tensor | None:
        return self._randn(2) if self.residual else None

    @property
    def param_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _linspace(self, low: float, high: float) -> Tensor:
        return torch.linspace(low, high, self.shape[1], dtype=self.param_dtype, device=ops.device)

    @property
    def weight(self) -> Tensor | None:
        return self._linspace(-0.5, 1.5) if self.affine in ("both", "weight") else None

    @property
    def bias(self) -> Tensor | None:
        return self._linspace(-0.2, 0.4) if self.affine in ("both", "bias") else None

    def running(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Fresh running_mean, running_var, num_batches_tracked."""
        mean, var = (self._linspace(-1, 1), self._linspace(0.5, 2)) if self.tracked else (None,) * 2
        return (
            mean,
            var,
            torch.tensor(3, device=ops.device) if self.counted and self.training else None,
        )

    def forward_args(self) -> tuple[Any, ...]:
        return (self.input, self.weight, self.bias, *self.running(), self.residual_tensor,
                self.training, self.momentum, 1e-3, self.activation, self.ghost)  # fmt: skip

    def forward(self) -> tuple[Tensor, Saved]:
        output, *saved = ops.batch_norm(*self.forward_args())
        return output, Saved(*saved)

    def derivative_args(self, output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The arguments output and residual of the backward ops: one of them, with a residual."""
        if not self.residual or self.activation is None:
            return None, None
        from_output = self.activation in bnext.activations.FROM_OUTPUT
        return (output, None) if from_output else (None, self.residual_tensor)

    def grad_reduce_args(self) -> tuple[Any, ...]:
        output, saved = self.forward()
        return (self.grad_output, self.input, self.weight, self.bias,
                *self.derivative_args(output), *saved, self.activation)  # fmt: skip

    def backward_args(self, mask: tuple[bool, bool] = (True, True)) -> tuple[Any, ...]:
        *args, activation = self.grad_reduce_args()
        return (*args, self.training, activation, list(mask))

    def grad_apply_args(self, mask: tuple[bool, bool] = (True, True)) -> tuple[Any, ...]:
        *args, activation = self.grad_reduce_args()
        sums = (None, None, None)
        if self.training:
            count = ops.batch_norm_reduce(self.input, self.ghost)[0]
            sums = (count, *ops.batch_norm_grad_reduce(*args, activation))
        return (*args, *sums, activation, list(mask))

    def apply_args(self) -> tuple[Any, ...]:
        _, saved = self.forward()
        return (self.input, self.weight, self.bias, self.residual_tensor, *saved, self.activation)

    def fold_args(self) -> tuple[Any, ...]:
        moments = ops.batch_norm_reduce(self.input, self.ghost)
        return (*moments, *self.running(), self.momentum, 1e-3, self.dtype)

    def args(self, op: str) -> tuple[Any, ...]:
        """The arguments of any op in this situation."""
        return {
            "batch_norm": self.forward_args,
            "batch_norm_backward": self.backward_args,
            "batch_norm_reduce": lambda: (self.input, self.ghost),
            "batch_norm_merge": lambda: ops.batch_norm_reduce(self.input, self.ghost),
            "batch_norm_fold": self.fold_args,
            "batch_norm_apply": self.apply_args,
            "batch_norm_grad_reduce": self.grad_reduce_args,
            "batch_norm_grad_apply": self.grad_apply_args,
        }[op]()


SAMPLES = [
    Sample("rows", (6, 5)),
    Sample("rows-relu-ghosts", (7, 5), activation="relu", ghost=3),
    Sample("rows-transposed", (6, 5), "transposed", activation="leaky_relu"),
    Sample("planes-silu", (4, 5, 3, 2), activation="silu", momentum=None),
    Sample("planes-residual-ghosts", (5, 3, 2, 2), activation="relu", residual=True, ghost=2),
    Sample("channels_last", (4, 5, 3, 2), "channels_last", activation="relu"),
    Sample("channels_last-silu-residual", (5, 3, 2, 2), "channels_last", activation="silu",
           residual=True, ghost=3),
    Sample("sequence", (4, 3, 5), activation="leaky_relu", residual=True),
    Sample("volume", (2, 3, 2, 2, 2), "channels_last", affine="none"),
    Sample("weight-only", (6, 5), affine="weight", activation="silu"),
    Sample("bias-only", (6, 5), affine="bias", residual=True),
    Sample("untracked", (6, 5), tracked=False, counted=False),
    Sample("uncounted", (6, 5), counted=False),
    Sample("bfloat16", (6, 5, 3), dtype=torch.bfloat16, activation="silu", residual=True),
    Sample("float16", (7, 5), dtype=torch.float16, activation="relu", ghost=4),
    Sample("float64", (6, 5), dtype=torch.float64, activation="silu", ghost=3),
    Sample("wide", (65, 33), activation="relu", ghost=32),
    Sample("eval", (6, 5), training=False, activation="relu"),
    Sample("eval-residual", (4, 5, 3, 2), "channels_last", training=False, activation="silu",
           residual=True),
    Sample("eval-one-value", (1, 5), training=False),
]  # fmt: skip
EMPTY = [
    Sample("empty-batch", (0, 5), activation="relu"),
    Sample("empty-plane", (2, 5, 0), training=False),
]
