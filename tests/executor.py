"""torch.ops.bnext_simt: the CUDA kernels and launchers of csrc/cuda, run by the executor of
tests/simt on CPU tensors, and which GPU it stands for."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import simt_build
import torch
from torch.utils import cpp_extension

from bnext import ops

CUDA = simt_build.ROOT / "csrc" / "cuda"
KERNEL_SOURCES = sorted(CUDA.glob("*.cu"))
HEADERS = sorted(
    p
    for folder in ("csrc/cuda", "csrc/core", "csrc/ops", "csrc")
    for p in (simt_build.ROOT / folder).glob("*.h")
) + sorted(CUDA.glob("*.cuh"))
# In one file with the launchers, which it includes.
LAUNCHERS = simt_build.SIMT / "launchers_simt.cpp"
LAUNCHER_PARTS = [
    *sorted((simt_build.ROOT / "csrc").glob("*.cpp")),
    *sorted((simt_build.ROOT / "csrc" / "ops").glob("*.cpp")),
    *sorted(CUDA.glob("*.cpp")),
    *(simt_build.SIMT / name for name in ("device_simt.cpp", "ops_simt.cpp")),
]


class Gpu(NamedTuple):
    """What the launch configuration looks at; offsets are 32-bit up to ``narrow_elements``."""

    num_sms: int
    shared_per_sm: int
    shared_per_block: int
    narrow_elements: int = 1 << 30


# From a GPU on which everything fits on chip to one on which next to nothing does, so that small
# tensors take every path: lone blocks, teams, two passes with and without splits, 64-bit offsets.
GPUS = {
    "h100": Gpu(132, 228 << 10, 227 << 10),
    "a100_quarter": Gpu(27, 164 << 10, 163 << 10),
    "t4_fifth": Gpu(8, 64 << 10, 64 << 10),
    "two_sms": Gpu(2, 40 << 10, 18 << 10),
    "no_cache": Gpu(6, 40 << 10, 1 << 10),
    "wide_index": Gpu(6, 64 << 10, 64 << 10, narrow_elements=0),
}
UNLIMITED = Gpu(1 << 30, 1 << 30, 1 << 30)


def torch_flags() -> list[str]:
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    return [flag for folder in folders for flag in ("-isystem", folder)]


def build(name: str = "bnext_simt", flags: tuple[str, ...] = ("-O1",)) -> Path:
    """The library; `flags` are for the kernels and the executor."""
    quiet = ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    parts = simt_build.objects(name, KERNEL_SOURCES, [*flags, *quiet], HEADERS)
    parts += simt_build.objects(
        name, [LAUNCHERS], ["-O0", *quiet, *torch_flags()], [*HEADERS, *LAUNCHER_PARTS]
    )
    parts += simt_build.executor_objects(f"{name}_executor", flags)
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    libraries += ["-ltorch_cpu", "-ltorch", "-lc10"]
    sanitizers = [flag for flag in flags if flag.startswith(("-fsanitize", "--coverage"))]
    return simt_build.link(f"{name}-{{}}.so", parts, ["-shared", *sanitizers, *libraries])


@functools.cache
def simt() -> object:
    """The namespace torch.ops.bnext_simt, built and loaded."""
    torch.ops.load_library(str(build()))
    return torch.ops.bnext_simt


@contextmanager
def limited_to(gpu: Gpu) -> Iterator[None]:
    """Launches on CUDA are planned as for `gpu`, where the real one has no less."""
    torch.ops.bnext.limit_cuda_device(*gpu)
    try:
        yield
    finally:
        torch.ops.bnext.limit_cuda_device(*UNLIMITED)


@contextmanager
def running_on(gpu: Gpu, seed: int = 0) -> Iterator[object]:
    """bnext's layers and functions run the CUDA kernels, on an executor that stands for `gpu`."""
    library = simt()
    library.limit_cuda_device(*gpu)
    library.set_seed(seed)
    ops.bind(library)
    try:
        yield library
    finally:
        ops.bind(torch.ops.bnext)
