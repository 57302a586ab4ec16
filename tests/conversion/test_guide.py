"""docs/guide.md: its code runs, and what it links to is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import bnext

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def test_the_code_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    (tmp_path / "guide.py").write_text(code)
    scope = runpy.run_path(str(tmp_path / "guide.py"))
    assert len(bnext.conversion_report(scope["model"]).fused) == 2


def leads_somewhere(link: str, page: Path) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    if not anchor or not target.exists():
        return target.exists()
    headings = re.findall(r"^#+ (.*)", target.read_text(), flags=re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "docs/guide.md", "docs/tour.md", "docs/design.md",
     "docs/accuracy.md", "docs/performance.md", "docs/diary.md", "docs/cuda.md", "docs/gpu.md"],
)  # fmt: skip
def test_the_links_lead_somewhere(name: str) -> None:
    page = GUIDE.parents[1] / name
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    links = [link for link in links if not link.startswith("http")]
    assert [link for link in links if not leads_somewhere(link, page)] == []


def test_every_function_is_in_the_guide() -> None:
    functions = {name for name in bnext.__all__ if name.islower() and not name.startswith("_")}
    unnamed = {name for name in functions if f"bnext.{name}" not in GUIDE.read_text()}
    assert unnamed <= {"batch_norm", "reference", "show_config", "is_batch_norm", "convert_sync"}
