"""``python -m benchmarks.scaling``: the kernels from 1 MiB to 1 GiB, on 1 and 2 threads.

Time over bytes is to be flat once the input has left the caches, and the second thread is to help
as much as it helps a copy.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from benchmarks import results
from benchmarks.grid import RUNS, THREADS, Cell
from benchmarks.report import machine_line, table
from benchmarks.results import Measurement
from benchmarks.worker import spawn
from bnext.measure.bench import PASSES

MEBIBYTES = (1, 4, 16, 64, 256, 1024)
ROW = {"rows": (256,), "planes": (64, 56, 56), "channels_last": (64, 56, 56)}  # of one sample


def cells(most: int) -> list[Cell]:
    found = []
    for layout, row in ROW.items():
        for mebibytes in (m for m in MEBIBYTES if m <= most):
            samples = max(1, (mebibytes << 20) // (4 * math.prod(row)))
            shape = (samples, *row)
            found += [Cell(shape, layout, "float32", threads) for threads in THREADS]
    return found


def rows(measurements: list[Measurement]) -> list[list[str]]:
    """A line for each shape and mode: GB/s and copies on 1 and 2 threads, and the speed-up."""
    by_key = {(m.cell.shape, m.cell.layout, m.mode, m.cell.threads): m for m in measurements}
    lines = []
    for (shape, layout, mode, threads), one in by_key.items():
        if threads != 1:
            continue
        two = by_key[shape, layout, mode, 2]

        def speed(m: Measurement) -> str:
            return f"{PASSES[m.mode] * m.cell.nbytes / m.us['bnext'].median / 1e3:.1f}"

        def gain(variant: str, one: Measurement = one, two: Measurement = two) -> str:
            return f"{one.us[variant].median / two.us[variant].median:.2f}"

        copies = [str(m.ratios["bnext"]["copy"]) for m in (one, two)]
        cells = [layout, f"{one.cell.nbytes / 2**20:.0f}", mode, speed(one), copies[0]]
        lines.append([*cells, speed(two), copies[1], gain("bnext"), gain("copy")])
    return lines


HEADING = [
    *("layout", "MiB", "mode", "GB/s, 1 thread", "in copies"),
    *("GB/s, 2 threads", "in copies", "1 to 2 threads", "copy's"),
]


def main(
    output: Annotated[Path, typer.Option(help="Folder for scaling.json and scaling.md.")] = Path(
        "docs/bench"
    ),
    minutes: Annotated[float, typer.Option(help="For all sizes.")] = 4,
    most: Annotated[
        int, typer.Option(help="MiB of the largest input; 7 GiB of memory for 1024.")
    ] = 1024,
) -> None:
    """Measure, print the table and write it down."""
    grid = cells(most)
    measuring = spawn("kernel", grid, 60 * minutes, "none", variants=("copy", "bnext"))
    found = list(
        track(measuring, total=len(grid) * len(RUNS["kernel"]), console=Console(stderr=True))
    )
    machine = results.machine() | results.thread_settings()
    output.mkdir(parents=True, exist_ok=True)
    results.save(results.Results(machine, found), output / "scaling.json")
    lines = ["# From 1 MiB to 1 GiB", "", machine_line(machine), ""]
    lines += [
        "float32, kernels alone. GB/s: of the bytes that must move where no cache helps.",
        "",
    ]
    lines += [*table(HEADING, rows(found)), "", "Written by `python -m benchmarks.scaling`."]
    text = "\n".join(lines) + "\n"
    (output / "scaling.md").write_text(text, encoding="utf-8")
    Console(width=140).print(Markdown(text))


if __name__ == "__main__":
    typer.run(main)
