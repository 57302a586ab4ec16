"""Lines of the kernels that tests/simt/kernels runs, of those that were compiled: all instances for
float and half. A line counts as run if any instance of its template has run it."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_checks
import pytest
import simt_build

LEAST = 0.95

pytestmark = [
    pytest.mark.skipif(
        simt_build.cuda_include() is None, reason="no cuda_fp16.h: install the CUDA headers' wheel"
    ),
    pytest.mark.skipif(shutil.which("gcov") is None, reason="no gcov"),
]


def lines_run(program: str, folder: Path) -> list[tuple[str, int, bool]]:
    """(file, line, whether it was run) for the headers of csrc/cuda."""
    source = kernel_checks.FOLDER / f"{program}_checks.cpp"
    target = folder / program
    command = [*simt_build.compiler(), *simt_build.FLAGS, *kernel_checks.QUIET, "-O0", "--coverage"]
    command += [f"-I{kernel_checks.CSRC}", *simt_build.includes(), "-c", str(source)]
    subprocess.run([*command, "-o", f"{target}.o"], check=True)
    others = simt_build.objects("coverage", [kernel_checks.LAUNCH_STATE], ["-O0"])
    parts = [f"{target}.o", *map(str, [*others, *simt_build.executor_objects()])]
    link = [*simt_build.compiler(), *parts, "--coverage", "-pthread", "-o", str(target)]
    subprocess.run(link, check=True)
    result = kernel_checks.run(target, "--seeds=1")
    assert kernel_checks.verdict(result) == "clean", result.stdout + result.stderr[:2000]
    report = ["gcov", "--json-format", "--stdout", f"{target}.gcda"]
    output = subprocess.run(report, cwd=folder, capture_output=True, check=True).stdout
    if output[:2] == b"\x1f\x8b":
        output = gzip.decompress(output)
    return [
        (Path(file["file"]).name, line["line_number"], line["count"] > 0)
        for file in json.loads(output)["files"]
        if file["file"].endswith(".cuh") and Path(file["file"]).parent.name == "cuda"
        for line in file["lines"]
    ]


def test_lines_of_the_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simt_build.executor_objects()
    run: dict[str, dict[int, bool]] = defaultdict(dict)
    with ThreadPoolExecutor(2) as pool:
        for lines in pool.map(lambda p: lines_run(p, tmp_path), kernel_checks.PROGRAMS):
            for file, number, was_run in lines:
                run[file][number] = run[file].get(number, False) or was_run
    with capsys.disabled():
        print()
        for file, lines in sorted(run.items()):
            missed = [number for number, was_run in sorted(lines.items()) if not was_run]
            print(f"{file:24} {sum(lines.values()):4} of {len(lines):4}  missed: {missed}")
    total = sum(len(lines) for lines in run.values())
    share = sum(sum(lines.values()) for lines in run.values()) / total
    with capsys.disabled():
        print(f"{share:.1%} of {total} lines")
    assert total > 400
    assert share >= LEAST
