"""Loads the C++ extension, which registers ``torch.ops.bnext``; docs/ops.md documents each op."""

import importlib

import torch

try:
    from bnext import _build_info

    importlib.import_module("bnext._C")  # registers the ops
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

batch_norm = torch.ops.bnext.batch_norm.default
batch_norm_backward = torch.ops.bnext.batch_norm_backward.default
