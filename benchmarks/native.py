"""Builds the C++ sources of the benchmarks into build/benchmarks, when they are first asked for."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "benchmarks"
PREFIX = Path(sysconfig.get_path("data"))  # where wheels put their include and lib folders


def build(name: str, includes: Sequence[str | Path], lib: Path, libraries: Sequence[str]) -> Path:
    """The shared library of ``name``.cpp, named after a digest of what it comes from."""
    source = HERE / f"{name}.cpp"
    command = [
        *shlex.split(os.environ.get("CXX", "g++")),
        *("-std=c++20", "-O2", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden"),
        *(f"-I{folder}" for folder in includes),
        str(source),
        *(f"-L{lib}", f"-Wl,-rpath,{lib}", *(f"-l{library}" for library in libraries)),
    ]
    digest = hashlib.sha256(f"{command} {torch.__version__}".encode() + source.read_bytes())
    path = BUILD / f"{name}-{digest.hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds for all
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            command += ["-o", str(unfinished)]
            built = subprocess.run(command, capture_output=True, text=True)
            if built.returncode != 0:
                raise RuntimeError(f"{shlex.join(command)}\n{built.stderr}")
            unfinished.replace(path)
    return path
