"""Builds of the programs in tests/simt/kernels, from csrc or from a changed copy of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import simt_build

FOLDER = simt_build.SIMT / "kernels"
CSRC = simt_build.ROOT / "csrc"
# What the launches keep between them.
LAUNCH_STATE = CSRC / "cuda" / "launch_state.cpp"
PROGRAMS = ("forward", "backward", "fold")
# One instance of every kernel and layout: seconds to compile.
FEW = ("-DBNEXT_FEW_KERNELS",)
QUIET = ("-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-unused")
VARIANTS = {
    "plain": (),
    "address": tuple(simt_build.ADDRESS),
    "thread": tuple(simt_build.THREAD),
}


def kernel_headers(csrc: Path) -> list[Path]:
    return sorted(p for f in ("cuda", "core") for p in (csrc / f).glob("*.*h"))


def build(
    program: str, variant: str, name: str = "clean", csrc: Path = CSRC, flags: Sequence[str] = FEW
) -> Path:
    """`name`: tells builds of other sources or flags apart."""
    headers = [*FOLDER.glob("*.h"), *kernel_headers(csrc), *(csrc / "cuda").glob("*.cu")]
    return simt_build.program(
        f"kernels_{name}_{variant}_{program}",
        [FOLDER / f"{program}_checks.cpp", LAUNCH_STATE],
        [f"-I{csrc}", *flags, *QUIET, *VARIANTS[variant]],
        headers,
        first=FOLDER / "common.h",
    )


def run(
    program: Path, *arguments: str, timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    # Kernels that are ended by an error leave what they own.
    settings = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1", **environment}
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **settings},
    )


def verdict(result: subprocess.CompletedProcess[str]) -> str:
    """What found fault with the kernels, or clean."""
    for report, name in (
        ("AddressSanitizer", "address"),
        ("runtime error", "undefined"),
        ("ThreadSanitizer: data race", "race"),
    ):
        if report in result.stderr:
            return name
    if result.returncode == 0 and "cases pass" in result.stdout:
        return "clean"
    words = result.stdout.split(": ")
    return words[1] if len(words) > 1 else f"crash {result.returncode}"
