"""The benchmarks of a run on a GPU, on the CPU: every result is recorded, a wrong one as such."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import kernels, modules, shapes, timing, training
from tools.gpu_run import records, summary


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "report.jsonl"
    monkeypatch.setenv(records.REPORT, str(path))
    monkeypatch.setenv(records.STAGE, "a stage")
    return path


def of_kind(report: Path, kind: str) -> list[records.Record]:
    return summary.of_kind(list(records.read(report)), kind)


def test_kernels(report: Path) -> None:
    kernels.main("cpu", seconds=60, quick=True)
    assert {r["outcome"] for r in of_kind(report, "check")} == {"passed"}
    found = of_kind(report, "kernel")
    wanted = {("forward", v) for v in ("bnext", "eager", "copy", "ghosts of 8")}
    wanted |= {("backward", v) for v in ("bnext", "eager")}
    wanted |= {("reduce", "bnext"), ("grad_reduce", "bnext")}
    for cell in shapes.QUICK:
        own = [r for r in found if tuple(r["shape"]) == cell.shape]
        assert {(r["op"], r["variant"]) for r in own} == wanted
    for r in found:
        assert math.isfinite(r["us"]) and r["us"] > 0 and r["gb_per_s"] > 0
    assert len(summary.kernel_rows(found)) == 8


def test_a_wrong_kernel_is_recorded_as_wrong(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.Tensors.forward

    def wrong(self: kernels.Tensors, ghost: int | None = None) -> Any:
        output, *rest = right(self, ghost)
        output[:, -1] *= 1.001
        return output, *rest

    monkeypatch.setattr(kernels.Tensors, "forward", wrong)
    kernels.check(shapes.QUICK[0], kernels.Tensors(shapes.QUICK[0], "cpu", 0))
    outcomes = {r["name"].split()[0]: r["outcome"] for r in of_kind(report, "check")}
    assert outcomes == {"forward": "failed", "backward": "passed"}


def test_a_result_that_is_not_finite_is_wrong(
    report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(self: kernels.Tensors) -> list[Tensor]:
        return [torch.full_like(self.x, math.nan)]

    monkeypatch.setattr(kernels.Tensors, "backward", poisoned)
    kernels.check(shapes.QUICK[0], kernels.Tensors(shapes.QUICK[0], "cpu", 0))
    assert [r["outcome"] for r in of_kind(report, "check")] == ["passed", "failed"]


def test_no_time_is_said(report: Path) -> None:
    kernels.main("cpu", seconds=-1, quick=True)
    modules.main("cpu", seconds=-1, rounds=3, quick=True, warm_one=None)
    left_out = [r["what"] for r in of_kind(report, "left out")]
    assert [len(what) for what in left_out] == [2, 2]
    assert not of_kind(report, "kernel") and not of_kind(report, "module")


def test_modules(report: Path) -> None:
    modules.main("cpu", seconds=60, rounds=3, quick=True, warm_one=None)
    found = of_kind(report, "module")
    assert {(r["mode"], r["variant"]) for r in found} == {
        (mode, variant)
        for mode in ("forward", "forward_backward", "eval")
        for variant in ("copy", "bnext", "eager", "eager in-place")
    }
    for r in found:
        assert r["us"] > 0 and (r["variant"] != "eager" or r["ratio_to_eager"] == 1)


def test_some_shapes_are_compiled() -> None:
    chosen = [shape for i, shape in enumerate(modules.SHAPES) if modules.compiles(shape, i)]
    assert len(chosen) == modules.COMPILED and len({shape[0] for shape in chosen}) == 3


def test_training(report: Path) -> None:
    pytest.importorskip("torchvision", reason="extra bench is not installed")
    training.main("cpu", seconds=60, quick=True)
    found = {r["variant"]: r for r in of_kind(report, "training")}
    assert found["plain"]["ratio"] == 1 and found["bnext"]["ms"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", [kernels.main, modules.main, training.main])
def test_without_a_gpu_it_says_so(main: Any) -> None:
    with pytest.raises(SystemExit, match="no CUDA device here"):
        main("cuda")


def test_the_calls_of_a_graph_leave_the_cache() -> None:
    assert timing.copies(100 << 20, "cuda") == 3
    assert timing.copies(10 << 20, "cuda") * (10 << 20) >= 256 << 20
    assert timing.copies(100, "cuda") == 64
