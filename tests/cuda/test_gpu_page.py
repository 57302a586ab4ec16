"""docs/gpu.md is what the reports of runs on a GPU say, and "not yet run" where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import shapes
from tools.gpu_run import page, records


def test_the_page_is_up_to_date() -> None:
    """As `python -m tools.gpu_run.page` writes it."""
    written = page.PAGE.read_text()
    assert page.text(written, page.reports()) == written
    assert (page.NOT_YET in written) or page.reports()
    assert not page.reports() or (page.REPORTS / page.PICTURE).exists()


def test_a_report_fills_the_page(tmp_path: Path) -> None:
    cell = shapes.CELLS[0]
    common = {"stage": "kernels", "time": 1.8e9, "shape": list(cell.shape), "layout": cell.layout,
              "dtype": str(cell.dtype).removeprefix("torch.")}  # fmt: skip
    lines = [
        {"kind": "fact", "stage": "facts", "time": 1.8e9, "name": "gpu", "value": "NVIDIA H100"},
        {"kind": "stage", "stage": "kernels", "time": 1.8e9, "outcome": "passed", "seconds": 33.3,
         "message": ""},
        {"kind": "kernel", **common, "op": "forward", "variant": "bnext", "us": 100.0},
        {"kind": "kernel", **common, "op": "forward", "variant": "eager", "us": 250.0},
        {"kind": "module", **common, "mode": "forward", "variant": "bnext", "us": 100.0},
        {"kind": "module", **common, "mode": "forward", "variant": "compiled", "us": 120.0},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = page.reports(tmp_path)
    text = page.text(page.PAGE.read_text(), found)
    assert "Ran on NVIDIA H100, torch ?, 2027-01-15." in text
    assert "| passed, 33.3 s |" in text
    row = "| 32x256x56x56 | channels_last | float32 | forward | 68.5 | 109 | 100.0 | 2.0, 1.0 |"
    assert f"{row} 2.5, 1.2 |" in text
    assert text.count(f"| {page.NOT_YET} |") > 40
    page.draw(found["a.jsonl"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_without_marks_is_an_error() -> None:
    with pytest.raises(AssertionError, match="status: 0 places"):
        page.text("# On a GPU", {})


def test_predictions_are_of_the_bytes_that_must_move() -> None:
    """At the rate of the prediction: no prediction is below the floor."""
    assert len({(c.shape, c.layout, c.dtype) for c in shapes.CELLS}) == len(shapes.CELLS) == 26
    for cell in shapes.CELLS:
        for op in ("forward", "backward"):
            predicted = cell.predicted_us(op)
            assert predicted is not None and predicted >= cell.floor_us(op)
        assert cell.predicted_us("reduce") is None
    large = shapes.CELLS[0]
    assert large.nbytes == 32 * 256 * 56 * 56 * 4
    assert large.floor_us("backward") == pytest.approx(3 * large.nbytes / 3e12 * 1e6)


def test_records_of_a_stage_started_by_hand_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(records.REPORT, raising=False)
    records.record("fact", name="a", value=1)
    assert json.loads(capsys.readouterr().out)["value"] == 1
