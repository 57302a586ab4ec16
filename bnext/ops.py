"""Loads the C++ extension, which registers ``torch.ops.bnext``; docs/ops.md documents each op."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from bnext import _build_info

    _C = importlib.import_module("bnext._C")  # registers the ops
except ImportError as error:
    try:
        built_for = _build_info.torch
    except NameError:
        raise ImportError(
            "bnext is not built: run `pip install --no-build-isolation .` in its source folder"
        ) from error
    if built_for != torch.__version__:
        raise ImportError(
            f"bnext was built for torch {built_for}, but torch {torch.__version__} is installed: "
            "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps bnext`"
        ) from error
    raise


class ForwardCall(NamedTuple):
    """The arguments of ``torch.ops.bnext.batch_norm``, in its order (csrc/ops/calls.h)."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    residual: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    activation: str | None
    ghost_batch_size: int | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:7]


batch_norm: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
batch_norm_reduce: Callable[..., tuple[Tensor, Tensor, Tensor]]
batch_norm_merge: Callable[..., tuple[Tensor, Tensor, Tensor]]
batch_norm_fold: Callable[..., tuple[Tensor, Tensor, Tensor]]
batch_norm_apply: Callable[..., Tensor]
batch_norm_grad_reduce: Callable[..., tuple[Tensor, Tensor]]
batch_norm_grad_apply: Callable[..., tuple[Tensor, Tensor]]
# Below autograd, and without what torch.ops does to the arguments.
batch_norm_below_autograd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
batch_norm_backward_below_autograd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def bind(namespace: Any) -> None:
    """Makes the ops of a namespace of ``torch.ops`` those that functions and layers call."""
    global batch_norm, batch_norm_below_autograd, batch_norm_backward_below_autograd
    global batch_norm_reduce, batch_norm_merge, batch_norm_fold, batch_norm_apply
    global batch_norm_grad_reduce, batch_norm_grad_apply
    batch_norm = namespace.batch_norm.default
    batch_norm_reduce = namespace.batch_norm_reduce.default
    batch_norm_merge = namespace.batch_norm_merge.default
    batch_norm_fold = namespace.batch_norm_fold.default
    batch_norm_apply = namespace.batch_norm_apply.default
    batch_norm_grad_reduce = namespace.batch_norm_grad_reduce.default
    batch_norm_grad_apply = namespace.batch_norm_grad_apply.default
    batch_norm_below_autograd = _C.batch_norm_below_autograd(batch_norm)
    batch_norm_backward_below_autograd = _C.batch_norm_backward_below_autograd(
        namespace.batch_norm_backward.default
    )


bind(torch.ops.bnext)


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0
