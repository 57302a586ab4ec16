"""What `make gpu` does, as far as it can be tried without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.gpu_report import ROOT, Step, report, steps


def test_steps_with_and_without_a_sanitizer(tmp_path: Path) -> None:
    names = [step.name for step in steps("python", tmp_path, None)]
    assert names == ["suite", "accuracy", "benchmarks"]
    found = steps("python", tmp_path, "compute-sanitizer")
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    assert [s.name for s in found[1:-2]] == [f"sanitizer-{tool}" for tool in tools]
    for step in found[:-1]:
        assert list(step.command).count("--device") == 1 and "cuda" in step.command


def test_the_sanitized_selection_names_tests(tmp_path: Path) -> None:
    step = next(s for s in steps(sys.executable, tmp_path, "x") if "memcheck" in s.name)
    selection = list(step.command)[list(step.command).index("cuda") + 1 :]
    command = [sys.executable, "-m", "pytest", "--co", "-q", "--device", "cpu", *selection]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0 and "33x13" in listed.stdout, listed.stdout + listed.stderr


def test_a_failing_step_does_not_hide_the_later_ones(tmp_path: Path) -> None:
    ok = [sys.executable, "-c", "print('fine')"]
    found = [Step("one", ok), Step("two", [sys.executable, "-c", "raise SystemExit(3)"]),
             Step("three", ["no-such-program"]), Step("four", ok)]  # fmt: skip
    assert not report(found, tmp_path, ["- a fact"])
    index = (tmp_path / "index.md").read_text()
    assert "[one](one.log) | passed" in index and "[four](four.log) | passed" in index
    assert "[two](two.log) | **failed** (3)" in index
    assert "[three](three.log) | **failed** (127)" in index
    assert "- a fact" in index and "fine" in (tmp_path / "four.log").read_text()
    assert report(found[:1], tmp_path, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once() -> None:
    for command in (["-m", "tools.gpu_report"], ["-m", "benchmarks.gpu", "--output", "unused"]):
        result = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 1 and "no CUDA device here" in result.stderr


def test_the_benchmark_on_the_clock(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--rounds", "3"]
    result = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["machine"]["torch"] == torch.__version__
    modes = {(r["mode"], r["variant"]) for r in data["rows"]}
    assert modes >= {(m, v) for m in ("forward", "forward_backward", "eval")
                     for v in ("copy", "eager", "eager in-place", "bnext")}  # fmt: skip
    for row in data["rows"]:
        assert row["us"] > 0 and row["gb_per_s"] > 0
        assert row["variant"] != "eager" or row["ratio_to_eager"] == 1
    assert "| (32, 50) | rows | float32 | forward | bnext |" in (tmp_path / "gpu.md").read_text()
