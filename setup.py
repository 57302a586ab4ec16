"""Builds bnext._C, the C++ extension. Everything else about the package is in pyproject.toml."""

import os
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # a build by pip does not start here

from tools import cuda_build  # noqa: E402

# -ffp-contract=off: the kernels say where they want a fused multiply-add, so that forward and
# backward recompute the same pre-activation. -fopenmp only compiles: at::parallel_for's pool is
# the one that libtorch_cpu already links. -fno-math-errno: square roots in loops as vectors; no
# result depends on it. max-inline-insns-single: g++ would call at::vec's half-precision conversions
# as functions, through memory. -std: torch 2.11 would say c++17, later ones c++20.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "--param=max-inline-insns-single=5000",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
]
# --fmad=false is nvcc's -ffp-contract=off. --threads: two architectures at once, which shortens
# the tail of the build, where one file is left. -U: torch's own flags take away the conversions
# between __half, __nv_bfloat16 and float, since ATen has types of its own; the kernels have not.
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "--fmad=false",
    "--threads=2",
    "-Xcompiler=-fvisibility=hidden",
]


def decide() -> cuda_build.Decision:
    toolkits = cuda_build.find_toolkits(os.environ, WHEELS)
    force = os.environ.get("BNEXT_CUDA")
    return cuda_build.decide(torch.__version__, torch.version.cuda, toolkits, force)


def files(*patterns: str) -> list[str]:
    paths = [path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def write_build_info(decision: cuda_build.Decision) -> None:
    """Records what the extension was built for, so that a mismatch can be told to the user."""
    toolkit = decision.toolkit
    info = {
        "torch": torch.__version__,
        "cuda": toolkit is not None,
        "cuda_reason": decision.reason,
        "cuda_toolkit": toolkit.version if toolkit else None,
        "cuda_archs": cuda_build.arch_flags(os.environ)[1] if toolkit else None,
    }
    lines = [f"{key} = {value!r}" for key, value in info.items()]
    target = ROOT / "bnext" / "_build_info.py"
    target.write_text('"""Written by setup.py."""\n\n' + "\n".join(lines) + "\n")
    print(f"bnext: CUDA {'yes' if toolkit else 'no'} ({decision.reason})", flush=True)


def extension(toolkit: cuda_build.Toolkit | None) -> Extension:
    sources = files("*.cpp", "ops/*.cpp", "cpu/*.cpp")
    options = {
        "depends": files("**/*.h", "**/*.cuh"),
        "extra_compile_args": {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    }
    if toolkit is None:
        return cpp_extension.CppExtension("bnext._C", sources, **options)
    cpp_extension.CUDA_HOME = str(toolkit.home)
    options["extra_compile_args"]["nvcc"] = NVCC_FLAGS + cuda_build.arch_flags(os.environ)[0]
    built = cpp_extension.CUDAExtension(
        "bnext._C",
        [*sources, *files("cuda/*.cpp", "cuda/*.cu")],
        define_macros=[("BNEXT_WITH_CUDA", None)],
        **options,
    )
    # After the toolkit's own, which may be only a part: torch's headers ask for cusparse.h, ...
    built.include_dirs.append(str(WHEELS / "include"))
    built.library_dirs += cuda_build.link_cudart(WHEELS, ROOT / "build" / "cudart")
    return built


class BuildExtension(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # `pip install -e` would have a temporary folder here. In one that stays, ninja compiles
        # only what changed.
        self.build_temp = "build/objects"


WHEELS = cuda_build.wheels_folder(Path(torch.__file__).parent, torch.version.cuda)
# The ninja of this environment, which is on PATH only where it is activated.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))  # ninja's own default is two more
decision = decide()
write_build_info(decision)
setup(
    ext_modules=[extension(decision.toolkit)],
    cmdclass={"build_ext": BuildExtension},
)
