"""Builds bnext._C, the C++ extension. Everything else about the package is in pyproject.toml."""

from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent

# -ffp-contract=off: the kernels say where they want a fused multiply-add, so that forward and
# backward recompute the same pre-activation. -fopenmp only compiles: at::parallel_for's pool is
# the one that libtorch_cpu already links. max-inline-insns-single: g++ would call at::vec's
# half-precision conversions as functions, through memory.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-ffp-contract=off",
    "--param=max-inline-insns-single=5000",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-DPy_LIMITED_API=0x030A0000",
]


def write_build_info() -> None:
    """Records what the extension was built for, so that a mismatch can be told to the user."""
    info = {
        "torch": torch.__version__,
        "cuda": False,
        "cuda_reason": "bnext has no CUDA kernels yet: this release is for the CPU",
    }
    lines = [f"{key} = {value!r}" for key, value in info.items()]
    target = ROOT / "bnext" / "_build_info.py"
    target.write_text('"""Written by setup.py."""\n\n' + "\n".join(lines) + "\n")


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))


def headers() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))


write_build_info()
setup(
    ext_modules=[
        CppExtension(
            "bnext._C",
            sources(),
            depends=headers(),
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
