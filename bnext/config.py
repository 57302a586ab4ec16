"""What this installation of bnext was built for and runs on."""

from typing import Any

import torch

from bnext import _build_info
from bnext._version import __version__
from bnext.ops import batch_norm as _loaded  # noqa: F401  (registers the ops)


def build_info() -> dict[str, Any]:
    """Version, torch versions (built for, running), instruction sets, CUDA and why (not).

    ``cuda_toolkit`` and ``cuda_archs`` are None without CUDA.
    """
    return {
        "version": __version__,
        "torch_built": _build_info.torch,
        "torch": torch.__version__,
        "isas": list(torch.ops.bnext.cpu_isas()),
        "isa": torch.ops.bnext.cpu_isa(),
        "cuda": _build_info.cuda,
        "cuda_reason": _build_info.cuda_reason,
        "cuda_toolkit": _build_info.cuda_toolkit,
        "cuda_archs": _build_info.cuda_archs,
    }


def show_config() -> None:
    """Prints :func:`build_info`."""
    info = build_info()
    print(f"bnext {info['version']}")
    print(f"  torch: built for {info['torch_built']}, running {info['torch']}")
    print(f"  CPU instruction sets: {', '.join(info['isas'])}; in use: {info['isa']}")
    print(f"  CUDA: {'yes' if info['cuda'] else 'no'} ({info['cuda_reason']})")
    if info["cuda"]:
        print(f"  GPU architectures: {info['cuda_archs'].replace(';', ', ')}")


__all__ = ["build_info", "show_config"]
