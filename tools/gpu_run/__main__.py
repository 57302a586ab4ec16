"""The command line of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tools.gpu_run import records, summary
from tools.gpu_run.runner import REPORT, Run
from tools.gpu_run.stages import Options, Stage, stages

_PRINTED = 11_000  # characters of the summary: its end is what matters


def chosen(found: list[Stage], names: str | None) -> list[Stage]:
    if names is None:
        return found
    wanted = [name for name in names.split(",") if name]
    if unknown := set(wanted) - {stage.name for stage in found}:
        known = ", ".join(stage.name for stage in found)
        raise SystemExit(f"--stages: no {', '.join(sorted(unknown))}; there are {known}")
    return [stage for stage in found if stage.name in wanted]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the report; a later run adds to it.")],
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all stages.")] = 480,
    only: Annotated[str | None, typer.Option("--stages", help="Of these, by comma.")] = None,
    prebuilt: Annotated[Path | None, typer.Option(help="An archive of tools.gpu_run.pack.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="No GPU: the executor and the CPU stand in.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="As little of each stage.")] = False,
) -> None:
    """Run all that needs a GPU, the most valuable first, and print what it showed."""
    cores = os.cpu_count() or 1
    if not rehearse:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device here; --rehearse tries the run without one")
    workers = cores if rehearse else max(1, cores * 3 // 4)
    options = Options(rehearse, quick, prebuilt.resolve() if prebuilt else None, workers)
    found = chosen(stages(options), only)
    output = output.resolve()
    passed = Run(output, budget).run(found)
    text = summary.text(list(records.read(output / REPORT)))
    print(text[-_PRINTED:], flush=True)
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    typer.run(main)
