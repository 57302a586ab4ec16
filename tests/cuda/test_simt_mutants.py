"""The checks of the kernels find the mistakes of kernel_mutants.py, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import kernel_checks
import pytest
import simt_build
from kernel_mutants import HARMLESS, MUTANTS, REDUNDANT, Mutant

pytestmark = pytest.mark.skipif(
    simt_build.cuda_include() is None, reason="no cuda_fp16.h: install the CUDA headers' wheel"
)

# Every CUDA thread is one of ThreadSanitizer's: only these are small enough.
FEW_THREADS = "chip_rows team_rows"


def patched(name: str, mutants: Sequence[Mutant]) -> Path:
    """The copy of csrc with the mistakes, at a place that depends on nothing else."""
    copy = simt_build.BUILD / "mutants" / name
    for folder in ("cuda", "core"):
        shutil.copytree(kernel_checks.CSRC / folder, copy / folder, dirs_exist_ok=True)
    for mutant in mutants:
        text = (copy / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: not once in {mutant.file}"
        (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    return copy


def build(mutant: Mutant, variant: str) -> Path:
    return kernel_checks.build(mutant.program, variant, mutant.name, patched(mutant.name, [mutant]))


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Path]]]:
    """Builds of the mutants selected, ahead of their tests; the workers of xdist share them."""
    with ThreadPoolExecutor(2) as pool:
        futures = {}
        if "PYTEST_XDIST_WORKER" not in os.environ:
            for item in request.session.items:
                mutant = getattr(item, "callspec", None) and item.callspec.params.get("mutant")
                if mutant in MUTANTS:
                    futures[mutant.name] = pool.submit(build, mutant, mutant.variant)
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_found(mutant: Mutant, builds: dict[str, Future[Path]]) -> None:
    future = builds.get(mutant.name)
    program = future.result() if future else build(mutant, mutant.variant)
    result = kernel_checks.run(program, *mutant.cases.split(), timeout=60)
    found = kernel_checks.verdict(result)
    report = f"{mutant.name}: {found}\n{result.stdout}{result.stderr[:2000]}"
    print(report)
    assert found == mutant.found_by, report


@pytest.mark.parametrize("mutant", HARMLESS, ids=lambda m: m.name)
def test_harmless_change_is_not(mutant: Mutant) -> None:
    result = kernel_checks.run(build(mutant, "plain"))
    assert kernel_checks.verdict(result) == "clean", result.stdout + result.stderr[:2000]


@pytest.mark.parametrize("program", ["forward", "backward"])
def test_there_is_no_race_without_what_is_redundant(program: str) -> None:
    mutants = [mutant for mutant in REDUNDANT if mutant.program == program]
    folder = patched(f"redundant_{program}", mutants)
    executable = kernel_checks.build(program, "thread", f"redundant_{program}", folder)
    result = kernel_checks.run(executable, "--seeds=1", *FEW_THREADS.split())
    assert kernel_checks.verdict(result) == "clean", result.stdout + result.stderr[:2000]
