"""The executor of tests/simt: its primitives, what it detects, and its sanitizer builds.

The kernels are small ones of its own, in tests/simt/cases; those of csrc/cuda are tested elsewhere.
What csrc/cuda keeps between launches is tested here, with several streams and host threads.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import simt_build

CASES_FOLDER = simt_build.SIMT / "cases"
HEADERS = sorted(CASES_FOLDER.glob("*.h"))
STATE = simt_build.ROOT / "csrc" / "cuda" / "launch_state.cpp"
HEADERS.append(STATE.with_suffix(".h"))
NAMES = ("between_launches", "errors", "main", "primitives")
SOURCES = [STATE, *(CASES_FOLDER / f"{name}.cpp" for name in NAMES)]
# The rows of the lists in the sources. Collecting tests needs no compiler.
CASES = [name for path in SOURCES for name in re.findall(r'^ +\{"(\w+)", ', path.read_text(), re.M)]

# As enum Mutant in kernels.h.
MUTANTS = (
    "clean",
    "no_barrier_in_sum",
    "no_release",
    "no_acquire",
    "no_barrier_before",
    "no_barrier_after",
    "swapped_fence",
)

pytestmark = pytest.mark.skipif(
    simt_build.cuda_include() is None, reason="no cuda_fp16.h: install the CUDA headers' wheel"
)


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def check(result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode != 0:
        pytest.fail(f"{result.stdout}\n{result.stderr[:4000]}", pytrace=False)


@pytest.fixture(scope="module")
def plain() -> Path:
    return simt_build.program("executor_cases", SOURCES, headers=HEADERS)


@pytest.mark.parametrize("name", CASES)
def test_case(plain: Path, name: str) -> None:
    check(run(plain, name))


def test_every_case_is_run(plain: Path) -> None:
    assert f"{len(CASES)} run, 0 failed" in run(plain).stdout


def test_seed_from_the_environment(plain: Path) -> None:
    check(run(plain, "barriers", "last_block_reduction", BNEXT_SIMT_SEED="7"))


def test_without_our_switch_of_stacks() -> None:
    parts = simt_build.objects("executor_cases", SOURCES, ["-O1"], HEADERS)
    parts += [path for path in simt_build.executor_objects() if "-fiber-" not in path.name]
    fiber = [simt_build.SIMT / "fiber.cpp"]
    parts += simt_build.objects("executor_ucontext", fiber, ["-O2", "-DSIMT_UCONTEXT"])
    check(run(simt_build.link("ucontext_cases-{}.exe", parts, ["-pthread"])))


@pytest.fixture(scope="module")
def address() -> Path:
    flags = simt_build.ADDRESS
    sources = [*SOURCES, CASES_FOLDER / "outside.cpp"]
    return simt_build.program("address_cases", sources, flags, HEADERS)


def test_address_sanitizer_has_no_objection(address: Path) -> None:
    # Writing behind shared memory is its own affair, below.
    names = [name for name in CASES if name != "behind_dynamic_shared_memory"]
    # Kernels that are ended by an error leave what they own.
    check(run(address, *names, ASAN_OPTIONS="detect_leaks=0"))


@pytest.mark.parametrize(
    ("where", "report"),
    [
        ("outside_of_dynamic_shared", "AddressSanitizer: use-after-poison"),
        ("outside_of_static_shared", "out of bounds for type 'float [32]'"),
        ("outside_of_global", "AddressSanitizer: heap-buffer-overflow"),
        ("outside_of_local", "AddressSanitizer: stack-buffer-overflow"),
    ],
)
def test_address_sanitizer_objects(address: Path, where: str, report: str) -> None:
    result = run(address, where)
    assert result.returncode != 0
    assert report in result.stderr, result.stderr[:4000]
    assert "outside.cpp" in result.stderr


@pytest.fixture(scope="module")
def races() -> Path:
    return simt_build.program("races", [CASES_FOLDER / "races.cpp"], simt_build.THREAD, HEADERS)


@pytest.mark.parametrize("seed", ["0", "3"])
@pytest.mark.parametrize(
    ("kernel", "mutants"),
    [
        ("last_block", "no_barrier_in_sum no_release no_acquire no_barrier_after swapped_fence"),
        ("grid_barrier", "no_release no_acquire no_barrier_before no_barrier_after"),
        ("through_shared", "no_barrier_before"),
    ],
)
def test_thread_sanitizer(races: Path, kernel: str, mutants: str, seed: str) -> None:
    for mutant in ["clean", *mutants.split()]:
        result = run(races, kernel, str(MUTANTS.index(mutant)), BNEXT_SIMT_SEED=seed)
        assert "done" in result.stdout, result.stderr[:4000]
        found = "WARNING: ThreadSanitizer: data race" in result.stderr
        assert found == (mutant != "clean"), f"{mutant}\n{result.stderr[:4000]}"
        assert found == (result.returncode != 0)
