"""Whether setup.py builds the CUDA kernels, with which toolkit, and why not."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Turing to Blackwell, as torch's own CUDA 13 wheels. The machine code of several architectures is
# made from one PTX, which halves the time of the build: the kernels use nothing that Ampere has
# not, and of that only conversions to bfloat16 are missing on Turing. The last PTX is kept for what
# comes after all of them.
DEFAULT_ARCHS = {"75": ("75",), "80": ("80", "86", "89", "90", "100", "120", "PTX")}


class Toolkit(NamedTuple):
    home: Path
    version: str  # "13.0"
    origin: str  # where it was found, for messages


class Decision(NamedTuple):
    toolkit: Toolkit | None  # None: the build is for the CPU alone
    reason: str


def wheels_folder(torch_folder: Path, torch_cuda: str | None) -> Path:
    """Where torch's dependencies and the wheel nvidia-cuda-nvcc install CUDA from version 13 on."""
    return torch_folder.parent / "nvidia" / f"cu{(torch_cuda or '').split('.')[0]}"


def nvcc_version(nvcc: Path) -> str | None:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else None


def find_toolkits(environ: Mapping[str, str], wheels: Path) -> list[Toolkit]:
    """Every toolkit with an nvcc that answers, the preferred one first."""
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    places: dict[str, str | Path | None] = {
        "CUDA_HOME": environ.get("CUDA_HOME"),
        "the wheel nvidia-cuda-nvcc": wheels,
        "PATH": Path(on_path).resolve().parents[1] if on_path else None,
    }
    found = []
    for origin, home in places.items():
        version = nvcc_version(Path(home, "bin", "nvcc")) if home else None
        if home and version:
            found.append(Toolkit(Path(home), version, origin))
    return found


def decide(
    torch_version: str, torch_cuda: str | None, toolkits: Sequence[Toolkit], force: str | None
) -> Decision:
    """`force` is BNEXT_CUDA: "0" and "1" force, None and "" do not."""
    if force not in (None, "", "0", "1"):
        raise SystemExit(f"BNEXT_CUDA must be 0 or 1, not {force!r}")
    if force == "0":
        return Decision(None, "BNEXT_CUDA=0")

    major = (torch_cuda or "").split(".")[0]
    fitting = [t for t in toolkits if t.version.split(".")[0] == major]
    if torch_cuda is None:
        decision = Decision(None, f"torch {torch_version} is not a CUDA build")
    elif fitting:
        decision = Decision(fitting[0], f"toolkit {fitting[0].version} of {fitting[0].origin}")
    elif toolkits:
        others = ", ".join(f"{t.version} of {t.origin}" for t in toolkits)
        decision = Decision(
            None, f"torch {torch_version} needs a CUDA {major} toolkit, found only {others}"
        )
    else:
        decision = Decision(
            None,
            f"torch {torch_version} needs a CUDA {major} toolkit, found none: "
            "no CUDA_HOME, no wheel nvidia-cuda-nvcc, no nvcc on PATH",
        )
    if force == "1" and decision.toolkit is None:
        raise SystemExit(f"BNEXT_CUDA=1, but {decision.reason}")
    return decision


def arch_flags(environ: Mapping[str, str]) -> tuple[list[str], str]:
    """The flags of nvcc, and the architectures for people: those of TORCH_CUDA_ARCH_LIST, or the
    default.

    Machine code of Ampere and later comes from Ampere's PTX also where it is asked for alone: from
    Hopper's own, kernels of bfloat16 would spill registers. Names ("Hopper") and architectures with
    a suffix ("9.0a") are left to torch, which makes flags where it is given none.
    """
    wanted = environ.get("TORCH_CUDA_ARCH_LIST")
    sources = DEFAULT_ARCHS
    if wanted:
        parsed = _parse(wanted)
        if parsed is None:
            return [], wanted
        sources = parsed
    flags, names = [], []
    for virtual, real in sources.items():
        codes = [f"compute_{virtual}" if arch == "PTX" else f"sm_{arch}" for arch in real]
        flags.append(f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]")
        names += [f"{virtual}+PTX" if arch == "PTX" else arch for arch in real]
    return flags, wanted or " ".join(names)


def _parse(wanted: str) -> dict[str, tuple[str, ...]] | None:
    """Of TORCH_CUDA_ARCH_LIST, as DEFAULT_ARCHS; None where an entry is more than a number."""
    sources: dict[str, list[str]] = {}
    for entry in re.split(r"[;\s]+", wanted.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", entry)
        if not found:
            return None
        arch = found[1] + found[2]
        codes = sources.setdefault("80" if int(arch) >= 80 else arch, [])
        codes += [code for code in (arch, found[3] and "PTX") if code and code not in codes]
    return {virtual: tuple(codes) for virtual, codes in sources.items()}


def standalone_command(toolkit: Toolkit, arch: str, source: Path, target: Path) -> list[str]:
    """nvcc's, for a program without torch that runs on other machines too: ``arch`` as in
    TORCH_CUDA_ARCH_LIST."""
    command = [str(toolkit.home / "bin" / "nvcc"), "-std=c++20", "-O1", "--fmad=false", "-lineinfo"]
    command += [*arch_flags({"TORCH_CUDA_ARCH_LIST": arch})[0], str(source), "-o", str(target)]
    # Of a toolkit from wheels nvcc does not know the folder.
    return [*command, "-Xcompiler=-Wall", "-cudadevrt=none", f"-L{toolkit.home / 'lib'}"]


def link_cudart(wheels: Path, folder: Path) -> list[str]:
    """Library folders for -lcudart: wheels bring libcudart.so.13, without the linker's name of it.

    At run time torch, imported first, has loaded it.
    """
    libraries = sorted((wheels / "lib").glob("libcudart.so.*"))
    if not libraries:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(libraries[0])
    return [str(folder)]
