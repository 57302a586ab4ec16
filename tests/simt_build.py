"""Builds with the executor of tests/simt: CUDA kernels compiled by the host's compiler.

Objects and programs go into build/tests, named after a digest of all that they come from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIMT = ROOT / "tests" / "simt"
BUILD = ROOT / "build" / "tests"

EXECUTOR = [
    SIMT / f"{name}.cpp"
    for name in (
        *("fiber", "memory", "runtime", "runtime_api"),
        *("scheduler", "shadow", "shared_memory", "sync"),
    )
]
EXECUTOR_HEADERS = sorted(
    path for path in [*SIMT.glob("*.h"), *SIMT.glob("include/**/*")] if path.is_file()
)

# Blocks are run by one OS thread: thread_local variables are their shared memory, and need no
# initialisation. Kernels look at one memory as several types.
FLAGS = [
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-fno-strict-aliasing", "-fno-extern-tls-init", "-Wall", "-Wextra"),
]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
THREAD = ["-fsanitize=thread", "-g"]


def cuda_include() -> Path | None:
    """The folder with cuda_fp16.h that comes with the CUDA wheels, if it is there."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include"
    return folder if (folder / "cuda_fp16.h").exists() else None


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def includes() -> list[str]:
    cuda = cuda_include()
    assert cuda, "no cuda_fp16.h"
    return [f"-I{SIMT / 'include'}", f"-I{SIMT}", "-isystem", str(cuda)]


def _make(command: list[str], inputs: Iterable[Path], target: str) -> Path:
    """Runs `command -o path` unless that is there; `target`: a name with a {} for a digest."""
    digest = hashlib.sha256(repr(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    path = BUILD / target.format(digest.hexdigest()[:16])
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{target.format('lock')}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist build for each other
        if path.exists():
            return path
        unfinished = path.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
        for old in BUILD.glob(target.format("?" * 16)):
            old.unlink(missing_ok=True)
        unfinished.replace(path)
    return path


def precompiled(header: Path, flags: Sequence[str]) -> list[str]:
    """Flags that include `header` first, compiled by g++ once for all with the same flags."""
    if "clang" in compiler()[0]:
        return []
    flags = [flag for flag in flags if not flag.startswith("-I")]
    digest = hashlib.sha256(repr((header.read_text(), flags)).encode()).hexdigest()[:16]
    copy = BUILD / f"precompiled-{digest}" / header.name
    # g++ takes any file of such a folder that fits.
    copy.with_suffix(".h.gch").mkdir(parents=True, exist_ok=True)
    if not copy.exists():
        copy.write_text(header.read_text())
    command = [*compiler(), *FLAGS, *flags, *includes(), "-x", "c++-header", str(header)]
    _make(command, [header, *EXECUTOR_HEADERS], f"{copy.parent.name}/{header.name}.gch/{{}}")
    return ["-include", str(copy)]


def objects(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    headers: Sequence[Path] = (),
    first: Path | None = None,
) -> list[Path]:
    """Compiled with the executor's include folders; `name` tells builds with other flags apart,
    `first` is a header to be precompiled."""
    if first is not None:
        flags = [*flags, *precompiled(first, flags)]

    def compile_one(source: Path) -> Path:
        command = [*compiler(), *FLAGS, *flags, *includes(), "-x", "c++", "-c", str(source)]
        inputs = [source, *EXECUTOR_HEADERS, *headers]
        return _make(command, inputs, f"{name}-{source.stem}-{{}}.o")

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def executor_objects(name: str = "executor", flags: Sequence[str] = ()) -> list[Path]:
    """The executor itself, which is never to be compiled with -fsanitize=thread."""
    return objects(name, EXECUTOR, ["-O2", *flags])


def link(target: str, parts: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """`target`: the file's name, with a {} for a digest."""
    return _make([*compiler(), *map(str, parts), *flags], parts, target)


def program(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    headers: Sequence[Path] = (),
    executor: Sequence[Path] | None = None,
    first: Path | None = None,
) -> Path:
    """A C++ program of kernels and their launches, linked with the executor."""
    # Compiled for longer than they run.
    parts = objects(name, sources, ["-O0", *flags], headers, first)
    parts += executor_objects() if executor is None else executor
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    return link(f"{name}-{{}}.exe", parts, [*sanitizers, "-pthread"])
