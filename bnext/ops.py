"""Loads the C++ extension, which registers ``torch.ops.bnext``; docs/ops.md documents each op."""

import importlib
from typing import Any

import torch

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



def bind(namespace: Any) -> None:
    """Makes these the ops that functions and layers call. ``torch.ops.bnext`` is bound."""
    global batch_norm, batch_norm_below_autograd, batch_norm_backward_below_autograd
    batch_norm = namespace.batch_norm.default
    batch_norm_below_autograd = _C.batch_norm_below_autograd(batch_norm)
    batch_norm_backward_below_autograd = _C.batch_norm_backward_below_autograd(
        namespace.batch_norm_backward.default
    )


bind(torch.ops.bnext)
