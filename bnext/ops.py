"""Loads the C++ extension, which registers ``torch.ops.bnext``; docs/ops.md documents each op."""

import importlib
from collections.abc import Callable
from typing import Any

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


batch_norm: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
# Below autograd, and without what torch.ops does to the arguments.
batch_norm_below_autograd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
batch_norm_backward_below_autograd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def bind(namespace: Any) -> None:
    """Makes the ops of a namespace of ``torch.ops`` those that functions and layers call."""
    global batch_norm, batch_norm_below_autograd, batch_norm_backward_below_autograd
    batch_norm = namespace.batch_norm.default
    batch_norm_below_autograd = _C.batch_norm_below_autograd(batch_norm)
    batch_norm_backward_below_autograd = _C.batch_norm_backward_below_autograd(
        namespace.batch_norm_backward.default
    )


bind(torch.ops.bnext)
