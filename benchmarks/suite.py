"""``python -m benchmarks.suite``, or ``make bench``: the grid, measured and written down."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from rich.table import Table

from benchmarks import compare as comparison
from benchmarks import onednn, report, results
from benchmarks.grid import RUNS, THREADS, Cell, cells
from benchmarks.worker import spawn

SHARES = {"whole": 0.65, "kernel": 0.35}  # of the time; torch.compile is in the first
CHILDREN = 5  # for each run, each with small and large cells


def _measure(
    grid: list[Cell],
    path: Path,
    minutes: float,
    compiled: str,
    prefix: list[str],
    console: Console,
) -> results.Results:
    """Saved to ``path`` after each child: a long run that is cut off leaves what it has."""
    machine = results.machine() | results.thread_settings()
    order = {cell: i for i, cell in enumerate(grid)}
    found: list[results.Measurement] = []
    with Progress(console=console) as progress:
        for run, modes in RUNS.items():
            task = progress.add_task(run, total=len(grid) * len(modes))
            seconds = 60 * minutes * SHARES[run] / CHILDREN
            for child in range(CHILDREN):
                for measurement in spawn(run, grid[child::CHILDREN], seconds, compiled, prefix):
                    found.append(measurement)
                    progress.advance(task)
                found.sort(key=lambda m: (m.run, order[m.cell]))
                results.save(results.Results(machine, found), path)
    return results.Results(machine, found)


def main(
    output: Annotated[
        Path, typer.Option(help="Folder for results.json, results.md and results.png.")
    ] = Path("docs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A few small cells, 1 minute.")] = False,
    minutes: Annotated[float | None, typer.Option(help="For the whole grid; default 13.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Only the cells with so many threads: 1 or 2.")
    ] = None,
    compiled: Annotated[
        str, typer.Option(help="torch.compile in none, some (float32 training steps) or all.")
    ] = "some",
    prefix: Annotated[
        str, typer.Option(help="Runs each measuring process, as `taskset -c 0,1` or `flock FILE`.")
    ] = "",
    compare: Annotated[
        Path | None, typer.Option(help="An earlier results.json: say what got slower since.")
    ] = None,
    only: Annotated[
        Path | None, typer.Option(help="Measure nothing: report on this results.json.")
    ] = None,
) -> None:
    """Measure; write JSON, tables and a picture. With --compare: exit 1 if anything is slower."""
    console = Console()
    if compiled not in ("none", "some", "all"):
        raise typer.BadParameter(f"{compiled!r} is none of none, some, all")
    if threads is not None and threads not in THREADS:
        raise typer.BadParameter(f"{threads} is none of {THREADS}")
    old = results.load(compare) if compare else None  # now: it may lie in the output folder
    output.mkdir(parents=True, exist_ok=True)
    if only is not None:
        found = results.load(only)
    else:
        if reason := onednn.missing():
            console.print(f"[yellow]Left out: {reason}")
        minutes = minutes or (1 if quick else 13)
        compiled = "none" if quick else compiled
        path = output / "results.json"
        grid = [cell for cell in cells(quick) if threads in (None, cell.threads)]
        found = _measure(grid, path, minutes, compiled, shlex.split(prefix), console)
    (output / "results.md").write_text(report.markdown(found), encoding="utf-8")
    report.draw(found, output / "results.png")
    table = Table(title="Targets")
    for heading in report.TARGET_HEADING:
        table.add_column(heading)
    for row in report.target_rows(found):
        table.add_row(*(Markdown(text) for text in row))
    console.print(table)
    console.print(f"written: {output / 'results.json'}, .md, .png")
    if old is not None:
        lines = comparison.report(old, found)
        console.print("\n".join(lines), markup=False)
        raise typer.Exit(1 if any(line.startswith("slower") for line in lines) else 0)


if __name__ == "__main__":
    typer.run(main)
