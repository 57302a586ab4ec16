"""The table a reader needs, from the records of a report: printed last, kept in summary.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from tools.gpu_run.records import Record

_FAILURES = 12  # told one by one
_LINE = 160


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [list(heading), ["---"] * len(heading), *(list(map(str, row)) for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def of_kind(found: Sequence[Record], kind: str) -> list[Record]:
    return [r for r in found if r["kind"] == kind]


def facts(found: Sequence[Record]) -> dict[str, object]:
    return {r["name"]: r["value"] for r in of_kind(found, "fact")}


def stages(found: Sequence[Record]) -> list[Record]:
    """The last record of every stage; one that only began was cut off with the whole run."""
    last: dict[str, Record] = {}
    for r in found:
        if r["kind"] == "start":
            last[r["stage"]] = {**r, "outcome": "cut off", "seconds": "", "message": ""}
        elif r["kind"] == "stage":
            last[r["stage"]] = r
    return list(last.values())


def _results(found: Sequence[Record], stage: str) -> str:
    own = [r for r in found if r["stage"] == stage]
    tests = Counter(r["outcome"] for r in own if r["kind"] in ("test", "check"))
    parts = [f"{n} {outcome}" for outcome, n in tests.items()]
    measured = sum(r["kind"] in ("kernel", "module", "training", "counter", "copy") for r in own)
    if measured:
        parts.append(f"{measured} measured")
    return ", ".join(parts)


def _failures(found: Sequence[Record]) -> list[str]:
    failed = [r for r in found if r["kind"] in ("test", "check") and r["outcome"] == "failed"]
    lines = []
    for r in failed[:_FAILURES]:
        message = " ".join(str(r.get("message", "")).split())[-_LINE:]
        lines.append(f"- {r['stage']}: {r.get('id', r.get('name'))}: {message}")
    if len(failed) > _FAILURES:
        lines.append(f"- and {len(failed) - _FAILURES} more")
    return lines


def kernel_rows(found: Sequence[Record]) -> list[list[str]]:
    """A row each shape, layout, dtype and op: bnext's time beside the prediction, and the others'
    in units of bnext's."""
    cells: dict[tuple[Any, ...], dict[str, Record]] = defaultdict(dict)
    for r in of_kind(found, "kernel"):
        key = ("x".join(map(str, r["shape"])), r["layout"], r["dtype"], r["op"])
        cells[key][r["variant"]] = r
    rows = []
    for key, variants in cells.items():
        own = variants.get("bnext")
        if own is None:
            continue
        others = [
            f"{name} {r['us'] / own['us']:.2f}" for name, r in variants.items() if name != "bnext"
        ]
        predicted = own.get("predicted_us")
        floor = own.get("floor_us")
        rows.append([
            *key, f"{own['us']:.1f}", "" if predicted is None else f"{predicted:.0f}",
            "" if floor is None else f"{floor:.0f}", f"{own['gb_per_s']:.0f}", ", ".join(others),
        ])  # fmt: skip
    return rows


KERNEL_HEADING = ["shape", "layout", "dtype", "op", "us", "predicted", "floor", "GB/s"]
KERNEL_HEADING += ["others / bnext"]


def _measured(found: Sequence[Record], kind: str, value: str, keys: Sequence[str]) -> list[str]:
    records = of_kind(found, kind)
    if not records:
        return []
    rows = [[*(r.get(k, "") for k in keys), f"{r[value]:.1f}", _ratio(r)] for r in records]
    return ["", *table([*keys, value, "ratio"], rows)]


def _ratio(r: Record) -> str:
    found = r.get("ratio_to_eager", r.get("ratio"))
    return "" if found is None else f"{found:.2f}"


def stage_rows(found: Sequence[Record]) -> list[list[object]]:
    return [
        [r["stage"], f"{r['outcome']} {r['message']}".strip(), r["seconds"], r.get("expected", ""),
         _results(found, r["stage"])]
        for r in stages(found)
    ]  # fmt: skip


def text(found: Sequence[Record]) -> str:
    known = facts(found)
    lines = [f"# {known.get('gpu', 'no GPU known')}, torch {known.get('torch', '?')}", ""]
    lines += _measured(found, "copy", "gb_per_s", ["bytes"])
    lines += _measured(found, "module", "us", ["shape", "layout", "dtype", "mode", "variant"])
    lines += _measured(found, "training", "ms", ["network", "variant", "compiled", "peak_mb"])
    if rows := kernel_rows(found):
        lines += ["", *table(KERNEL_HEADING, rows)]
    lines += ["", *table(["stage", "outcome", "seconds", "expected", "results"], stage_rows(found))]
    if failures := _failures(found):
        lines += ["", *failures]
    if any(r["kind"] == "run" for r in found):
        lines += ["", "The run was interrupted."]
    return "\n".join(lines) + "\n"
