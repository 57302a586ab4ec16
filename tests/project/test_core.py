"""The numeric core (csrc/core) and the launches that csrc/cuda plans, without tensors or a GPU:
each case of tests/cpp is a test here.

The cases are C++, since they compare with long double and count roundings of single operations.
They are built once, into build/tests, and again when a source or the compiler's command changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ["tests/cpp", "csrc/core", "csrc/cuda"]
SOURCES = sorted((ROOT / "tests" / "cpp").glob("*_cases.cpp"))
HEADERS = sorted(path for name in FOLDERS for path in (ROOT / name).glob("*.h"))

# The rows of the lists in the sources. Collecting tests needs no compiler.
CASES = [name for path in SOURCES for name in re.findall(r'^ +\{"(\w+)", ', path.read_text(), re.M)]


def compile_command() -> list[str]:
    return [
        *shlex.split(os.environ.get("CXX", "g++")),
        # As in setup.py: no fused multiply-add but where the source says so.
        *("-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"),
        *("-shared", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"),
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
        *map(str, SOURCES),
    ]


def build() -> Path:
    """The module's path; compiles unless it is there for the same sources and command."""
    command = compile_command()
    content = b"".join(path.read_bytes() for path in [*SOURCES, *HEADERS])
    digest = hashlib.sha256(repr(command).encode() + content).hexdigest()[:16]
    folder = ROOT / "build" / "tests"
    library = folder / f"core_cases-{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
        for old in folder.glob("core_cases-*.so"):
            old.unlink(missing_ok=True)
        unfinished.replace(library)
    return library


@pytest.fixture(scope="module")
def core() -> ModuleType:
    spec = importlib.util.spec_from_file_location("core_cases", build())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CASES)
def test_case(core: ModuleType, name: str) -> None:
    failure = ""
    try:
        core.run(name)
    except RuntimeError as error:  # file, line, what was found and what was expected
        failure = str(error)
    if failure:
        pytest.fail(failure, pytrace=False)


def test_every_case_is_run(core: ModuleType) -> None:
    assert sorted(core.names()) == sorted(CASES)
    assert len(set(CASES)) == len(CASES)
