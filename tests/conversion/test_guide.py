"""docs/guide.md: its code runs, and what it links to is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import bnext

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def test_the_code_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    (tmp_path / "guide.py").write_text(code)
    scope = runpy.run_path(str(tmp_path / "guide.py"))
    assert len(bnext.conversion_report(scope["model"]).fused) == 2


def test_the_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", GUIDE.read_text())
    assert len(links) > 10
    assert [link for link in links if not (GUIDE.parent / link).exists()] == []


def test_every_function_is_in_the_guide() -> None:
    functions = {name for name in bnext.__all__ if name.islower() and not name.startswith("_")}
    unnamed = {name for name in functions if f"bnext.{name}" not in GUIDE.read_text()}
    assert unnamed <= {"batch_norm", "reference", "show_config", "is_batch_norm", "convert_sync"}
