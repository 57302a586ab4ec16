"""oneDNN's fused BatchNorm + ReLU as a peer; its module is built when it is first asked for.

The library comes from PyPI (the extra ``bench``): PyTorch carries a oneDNN too, but does not export
it. Both use the OpenMP that torch has loaded, so ``torch.set_num_threads`` holds for both.
"""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import native
from bnext.measure.timing import Loop


def missing(dtype: torch.dtype = torch.float32) -> str | None:
    """Why oneDNN cannot be a peer here, for inputs of that dtype, or None."""
    if not (native.PREFIX / "include" / "oneapi" / "dnnl" / "dnnl.hpp").exists():
        return "no oneDNN here: pip install bnext[bench] brings onednn-devel-cpu-gomp"
    if importlib.util.find_spec("pybind11") is None:
        return "oneDNN needs pybind11 to be bound: pip install bnext[bench]"
    if dtype == torch.bfloat16 and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        return "oneDNN normalises bfloat16 only on a processor with AVX-512"
    return None


@functools.cache
def load() -> Any:
    """The module of onednn.cpp; ``RuntimeError`` says why there is none."""
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    import pybind11

    includes = (pybind11.get_include(), sysconfig.get_path("include"), native.PREFIX / "include")
    path = native.build("onednn", includes, native.PREFIX / "lib", ["dnnl"])
    spec = importlib.util.spec_from_file_location("bnext_onednn", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BatchNormRelu:
    """The primitive pair for inputs like ``x``; statistics and parameters are kept here.

    In training ``mean`` and ``variance`` are written (the biased ones), in eval they are read.
    """

    def __init__(self, x: Tensor, training: bool = True, eps: float = 1e-5) -> None:
        self._primitive = load().BatchNormRelu(
            list(x.shape),
            list(x.stride()),
            bfloat16=x.dtype == torch.bfloat16,
            training=training,
            eps=eps,
        )
        channels = x.size(1)
        self.training = training
        self.scale, self.shift = torch.ones(channels), torch.zeros(channels)
        self.mean, self.variance = torch.zeros(channels), torch.ones(channels)
        self.diff_scale, self.diff_shift = torch.empty(channels), torch.empty(channels)

    @property
    def implementations(self) -> list[str]:
        """The names of the kernels that oneDNN chose, forward (and backward)."""
        names: list[str] = self._primitive.implementations
        return names

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh memory for the output and for the bits of ReLU."""
        return torch.empty_like(x), torch.empty(self._primitive.workspace_bytes, dtype=torch.uint8)

    def forward(self, x: Tensor, output: Tensor, workspace: Tensor) -> Loop:
        """Writes ``output`` and ``workspace``."""
        tensors = {
            "src": x,
            "dst": output,
            "scale": self.scale,
            "shift": self.shift,
            "mean": self.mean,
            "variance": self.variance,
        }
        if self.training:
            tensors["workspace"] = workspace
        return _bind(self._primitive.forward, tensors)

    def backward(self, grad: Tensor, x: Tensor, workspace: Tensor, grad_input: Tensor) -> Loop:
        """Writes ``grad_input``, ``diff_scale`` and ``diff_shift``."""
        tensors = {
            "src": x,
            "diff_dst": grad,
            "scale": self.scale,
            "mean": self.mean,
            "variance": self.variance,
            "workspace": workspace,
            "diff_src": grad_input,
            "diff_scale": self.diff_scale,
            "diff_shift": self.diff_shift,
        }
        return _bind(self._primitive.backward, tensors)


def _bind(primitive: Any, tensors: dict[str, Tensor]) -> Loop:
    call = primitive({name: tensor.data_ptr() for name, tensor in tensors.items()})
    # The call knows addresses only: the loop holds the tensors, so that they outlive it.
    return lambda times, _tensors=tensors: call(times)  # type: ignore[misc]
