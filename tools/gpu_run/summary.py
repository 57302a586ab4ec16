"""The table a reader needs, from the records of a report: printed last, kept in summary.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

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
    parts += [f"{what} left out" for r in own if r["kind"] == "left out" for what in r["what"]][:2]
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


def _beside(found: Sequence[Record], keys: Sequence[str]) -> list[tuple[list[str], Record, str]]:
    """Of every combination of ``keys``: its values, bnext's record, and the others' times in units
    of bnext's."""
    cells: dict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
    for r in found:
        key = ("x".join(map(str, r["shape"])), *(str(r[k]) for k in keys))
        cells[key][r["variant"]] = r
    rows = []
    for key, variants in cells.items():
        if own := variants.pop("bnext", None):
            others = [f"{name} {r['us'] / own['us']:.2f}" for name, r in variants.items()]
            rows.append(([*key], own, ", ".join(others)))
    return rows


KERNEL_HEADING = ["shape", "layout", "dtype", "op", "us", "predicted", "floor", "GB/s"]
KERNEL_HEADING += ["others / bnext"]


def kernel_rows(found: Sequence[Record]) -> list[list[str]]:
    """Raw ops, measured beside predicted."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"

    return [
        [*key, f"{own['us']:.1f}", number(own.get("predicted_us")), number(own.get("floor_us")),
         number(own["gb_per_s"]), others]
        for key, own, others in _beside(of_kind(found, "kernel"), ("layout", "dtype", "op"))
    ]  # fmt: skip


def module_rows(found: Sequence[Record]) -> list[list[str]]:
    return [
        [*key, f"{own['us']:.1f}", others]
        for key, own, others in _beside(of_kind(found, "module"), ("layout", "dtype", "mode"))
    ]


def _measured(found: Sequence[Record], kind: str, value: str, keys: Sequence[str]) -> list[str]:
    records = of_kind(found, kind)
    if not records:
        return []
    rows = [[*(r.get(k, "") for k in keys), f"{r[value]:.1f}", r.get("ratio", "")] for r in records]
    return ["", *table([*keys, value, "ratio"], rows)]


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
    if rows := module_rows(found):
        heading = ["shape", "layout", "dtype", "mode", "us", "others / bnext"]
        lines += ["", *table(heading, rows)]
    lines += _measured(found, "training", "ms", ["network", "variant", "compiled", "peak_mb"])
    if rows := kernel_rows(found):
        lines += ["", *table(KERNEL_HEADING, rows)]
    lines += ["", *table(["stage", "outcome", "seconds", "expected", "results"], stage_rows(found))]
    if failures := _failures(found):
        lines += ["", *failures]
    if any(r["kind"] == "run" for r in found):
        lines += ["", "The run was interrupted."]
    return "\n".join(lines) + "\n"
