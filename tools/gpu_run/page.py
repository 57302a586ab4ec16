"""``python -m tools.gpu_run.page``: the tables of docs/gpu.md, from the reports in docs/gpu."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tools.gpu_run import records, summary
from tools.gpu_run.records import Record
from tools.gpu_run.stages import ROOT, Options, stages

PAGE, REPORTS = ROOT / "docs" / "gpu.md", ROOT / "docs" / "gpu"
PICTURE = "measured.png"
NOT_YET = "not yet run"
OPS = ("forward", "backward")
Key = tuple[tuple[int, ...], str, str, str]


def reports(folder: Path = REPORTS) -> dict[str, list[Record]]:
    """By name, the newest last."""
    return {path.name: list(records.read(path)) for path in sorted(folder.glob("*.jsonl"))}


def card(found: Sequence[Record]) -> str:
    known = summary.facts(found)
    day = datetime.datetime.fromtimestamp(found[0]["time"], datetime.timezone.utc).date()
    return f"{known.get('gpu', 'a GPU')}, torch {known.get('torch', '?')}, {day.isoformat()}"


def measured(found: Iterable[Record], variant: str = "bnext") -> dict[Key, float]:
    """Microseconds of the raw ops."""
    return {
        (tuple(r["shape"]), r["layout"], r["dtype"], r["op"]): r["us"]
        for r in found
        if r["kind"] == "kernel" and r["variant"] == variant
    }


def compiled(found: Iterable[Record]) -> dict[Key, float]:
    """Of the layers: torch.compile's time over bnext's, for what trains and for forward."""
    times: dict[Key, dict[str, float]] = {}
    for r in found:
        if r["kind"] == "module":
            key = (tuple(r["shape"]), r["layout"], r["dtype"], r["mode"])
            times.setdefault(key, {})[r["variant"]] = r["us"]
    return {
        k: v["compiled"] / v["bnext"] for k, v in times.items() if {"compiled", "bnext"} <= {*v}
    }


def rows(found: Sequence[Record]) -> list[list[str]]:
    """Of every cell and op: the floor, what was predicted and what was measured."""
    from benchmarks.gpu.shapes import CELLS

    own, eager, ratios = measured(found), measured(found, "eager"), compiled(found)
    lines = []
    for cell in CELLS:
        dtype = str(cell.dtype).removeprefix("torch.")
        for op in OPS:
            key = (cell.shape, cell.layout, dtype, op)
            us = own.get(key)
            at = OPS.index(op)
            against = (
                f"{cell.eager[at] / cell.bnext[at]:.1f}, {cell.compiled[at] / cell.bnext[at]:.1f}"
            )
            if us is None:
                seen, others = NOT_YET, ""
            else:
                seen = f"{us:.1f}"
                others = f"{eager[key] / us:.1f}" if key in eager else ""
                mode = (cell.shape, cell.layout, dtype, "forward")
                if op == "forward" and mode in ratios:
                    others += f", {ratios[mode]:.1f}"
            lines.append([
                "x".join(map(str, cell.shape)), cell.layout, dtype, op,
                f"{cell.floor_us(op):.1f}", f"{cell.bnext[at]:.0f}", seen, against, others,
            ])  # fmt: skip
    return lines


HEADING = ["shape", "layout", "dtype", "op", "floor, us", "predicted, us", "measured, us"]
HEADING += ["eager, compiled / bnext: predicted", "measured"]


def parts(found: Mapping[str, list[Record]]) -> dict[str, list[str]]:
    """What stands between the marks of the page."""
    last = list(found.values())[-1] if found else []
    status = [
        f"**{NOT_YET.capitalize()} on a GPU.** What stands here is derived, or was rehearsed."
    ]
    outcomes: dict[str, Record] = {}
    if last:
        status = ["Ran on " + "; ".join(card(one) for one in found.values()) + "."]
        status += ["", f"![Measured beside predicted]({REPORTS.name}/{PICTURE})"]
        outcomes = {r["stage"]: r for r in summary.stages(last)}
    table = summary.table(
        ["stage", "shows", "at most, s", "expected, s", "last run"],
        [
            [s.name, s.shows, f"{s.limit:.0f}", f"{s.expected:.0f}", _outcome(outcomes.get(s.name))]
            for s in stages(Options())
        ],
    )
    return {"status": status, "stages": table, "cells": summary.table(HEADING, rows(last))}


def _outcome(r: Record | None) -> str:
    return NOT_YET if r is None else f"{r['outcome']}, {r['seconds']} s"


def text(page: str, found: Mapping[str, list[Record]]) -> str:
    """The page with its parts written anew."""
    for name, lines in parts(found).items():
        marks = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
        part = "\n".join([marks[0], "", *lines, "", marks[1]])
        page, replaced = re.subn(pattern, lambda _, part=part: part, page, flags=re.DOTALL)  # type: ignore[misc]
        assert replaced == 1, f"{name}: {replaced} places"
    return page


def draw(found: Sequence[Record], path: Path) -> None:
    """Measured, predicted and floor of every cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [line for line in rows(found) if line[6] != NOT_YET]
    figure, axis = plt.subplots(figsize=(12, 0.25 * len(lines) + 2))
    places = range(len(lines))
    series: list[tuple[str, int, dict[str, Any]]] = [
        ("measured", 6, {"color": "#0072b2", "marker": "o"}),
        ("predicted", 5, {"color": "#d55e00", "marker": "x"}),
        ("floor", 4, {"color": "black", "marker": "|", "s": 80}),
    ]
    for name, column, style in series:
        axis.scatter([float(line[column]) for line in lines], places, label=name, **style)
    axis.set_yticks(places, [" ".join(line[:4]) for line in lines], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("us")
    axis.set_title(card(found))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(
    folder: Annotated[Path, typer.Option("--reports", help="Folder of the reports.")] = REPORTS,
) -> None:
    """Write the page, and the picture of the last report."""
    found = reports(folder)
    PAGE.write_text(text(PAGE.read_text(), found))
    if found:
        draw(list(found.values())[-1], folder / PICTURE)
    print(f"{PAGE.relative_to(ROOT)}: {len(found)} reports")


if __name__ == "__main__":
    typer.run(main)
