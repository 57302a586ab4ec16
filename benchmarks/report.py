"""Results as markdown, and as a picture of bars against the floor."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.grid import DTYPES, RUNS
from benchmarks.results import Measurement, Results
from benchmarks.targets import THREADS, Verdict, kept_floats_per_channel, verdicts
from bnext.measure.bench import PASSES

# The least that must move, in copies, where no cache helps; below, memory is not the limit.
FLOORS = {"forward": PASSES["forward"] / 2, "backward": PASSES["backward"] / 2}
COLORS = {
    "bnext": "#0072b2",
    "bnext ghosts": "#56b4e9",
    "eager": "#d55e00",
    "eager in-place": "#e69f00",
    "compiled": "#cc79a7",
    "onednn": "#009e73",
    "ghost loop": "#999999",
}


def table(heading: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def machine_line(machine: Mapping[str, Any]) -> str:
    return f"Machine: {', '.join(f'{key} {value}' for key, value in machine.items())}."


def _where(verdict: Verdict) -> str:
    m = verdict.measurement
    other = f", against {verdict.other}" if len(verdict.target.others) > 1 else ""
    return f"{m.cell.shape} {m.cell.layout} {m.cell.dtype} {m.mode}{other}"


def target_rows(results: Results) -> list[list[str]]:
    """Target, limit, cells that meet it, median and worst value, and where the worst is."""
    rows = []
    for target, values in verdicts(results).items():
        if not values:
            rows.append([target.name, f"{target.limit:.2f}", "not measured", "", "", ""])
            continue
        worst = max(values, key=lambda v: v.value.median)
        met = sum(v.met for v in values)
        median = statistics.median(v.value.median for v in values)
        rows.append([
            target.name, f"{target.limit:.2f}",
            "met" if met == len(values) else f"**not met** ({met} of {len(values)})",
            f"{median:.2f}", str(worst.value), _where(worst),
        ])  # fmt: skip
    kept = [
        (floats, allowed, m, name)
        for m in results.measurements
        for name, (floats, allowed) in kept_floats_per_channel(m).items()
    ]
    if kept:
        met = sum(floats <= allowed for floats, allowed, _, _ in kept)
        floats, allowed, m, name = max(kept, key=lambda k: k[0] / k[1])
        rows.append([
            "kept for backward, floats per channel beyond input and output",
            "C-sized", "met" if met == len(kept) else f"**not met** ({met} of {len(kept)})",
            "", f"{floats:.1f} of {allowed}", f"{name}, {m.cell.shape} {m.cell.layout}",
        ])  # fmt: skip
    return rows


TARGET_HEADING = ["target", "limit", f"{THREADS} threads", "median", "worst (quartiles)", "where"]


def _gb_per_s(m: Measurement, name: str) -> float:
    passes = PASSES["copy" if name == "copy" else m.mode]
    return passes * m.cell.nbytes / (m.us[name].median * 1e-6) / 1e9


def _detail(results: Results, run: str, mode: str) -> Iterator[str]:
    found = [m for m in results.measurements if (m.run, m.mode) == (run, mode)]
    names = list(dict.fromkeys(name for m in found for name in m.us if name != "bnext"))
    yield f"\n## {run}: {mode.replace('_', ' + ')}\n"
    heading = ["shape", "layout", "dtype", "threads", "bnext us", "GB/s", "copy GB/s"]
    heading += [f"bnext / {name}" for name in names] + ["disturbed"]
    rows = []
    for m in found:
        paired = m.ratios["bnext"]
        cells = [str(m.cell.shape), m.cell.layout, m.cell.dtype, str(m.cell.threads)]
        cells += [f"{m.us['bnext'].median:.1f}", f"{_gb_per_s(m, 'bnext'):.1f}"]
        cells.append(f"{_gb_per_s(m, 'copy'):.1f}")
        cells += [str(paired[name]) if name in paired else "" for name in names]
        rows.append([*cells, f"{m.disturbed:.0%}"])
    yield from table(heading, rows)


def _missing(results: Results) -> list[str]:
    failed = [v for values in verdicts(results).values() for v in values if not v.met]
    failed.sort(key=lambda v: (v.target.name, -v.value.median / v.target.limit))
    rows = [
        [v.target.name, _where(v), str(v.value), f"{v.target.limit:.2f}",
         f"{v.measurement.disturbed:.0%}"]
        for v in failed
    ]  # fmt: skip
    return table(["target", "where", "value", "limit", "disturbed"], rows)


def markdown(results: Results) -> str:
    """Targets, what misses them, and every measurement."""
    disturbed = statistics.mean(m.disturbed for m in results.measurements)
    lines = [
        "# Benchmarks: BatchNorm + ReLU",
        "",
        "Made by `make bench`; [how it is measured](../performance.md). Ratios are medians of the "
        "rounds' ratios, with quartiles; below 1 bnext is faster. *whole*: through the layer, "
        "fresh outputs (oneDNN: without autograd); *kernel*: the ops alone, outputs reused. GB/s "
        "are of the bytes that must move where no cache helps.",
        "",
        machine_line(results.machine)
        + f" Other programs took a core in {disturbed:.0%} of the samples.",
        "",
        "![Times in units of copy](results.png)",
        "",
        "## Targets",
        "",
        *table(TARGET_HEADING, target_rows(results)),
    ]
    for run, modes in RUNS.items():
        for mode in modes:
            lines += _detail(results, run, mode)
    lines += ["\n## Not met\n", *_missing(results)]
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Path) -> None:
    """Bars of every variant in units of ``copy``, on a logarithmic axis, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [("whole", "forward_backward"), ("kernel", "forward"), ("kernel", "backward")]
    figure, axes = plt.subplots(len(panels), 1, figsize=(15, 12), squeeze=False)
    threads = max(m.cell.threads for m in results.measurements)
    for axis, (run, mode) in zip(axes[:, 0], panels, strict=True):
        found = [
            m for m in results.measurements
            if (m.run, m.mode, m.cell.threads, m.cell.dtype) == (run, mode, threads, DTYPES[0])
        ]  # fmt: skip
        names = [name for name in COLORS if any(name in m.us for m in found)]
        width = 0.85 / max(1, len(names))
        for i, name in enumerate(names):
            bars = [
                (at, m.us[name].median / m.us["copy"].median)
                for at, m in enumerate(found)
                if name in m.us
            ]
            axis.bar(
                [at + (i - (len(names) - 1) / 2) * width for at, _ in bars],
                [value for _, value in bars],
                width,
                label=name,
                color=COLORS[name],
            )
        if mode in FLOORS:
            axis.axhline(FLOORS[mode], color="black", ls="--", lw=1, label="floor, out of cache")
        axis.set_yscale("log")
        axis.set_ylabel("time / copy")
        axis.set_title(f"{run}: {mode.replace('_', ' + ')}, {DTYPES[0]}, {threads} threads")
        labels = [f"{'x'.join(map(str, m.cell.shape))}\n{m.cell.layout}" for m in found]
        axis.set_xticks(range(len(found)), labels, fontsize=6)
        axis.legend(fontsize=8, ncols=4)
    info = results.machine
    figure.suptitle(f"{info['processor']}, {info['isa']}, torch {info['torch']}, {info['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
