"""``make gpu-rehearsal``: the whole run without a GPU, as on the machine it is made for: in a copy
of the sources, with that machine's packages, an empty environment and no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from tools.gpu_run import records, summary
from tools.gpu_run.runner import REPORT
from tools.gpu_run.stages import ROOT, Options, stages

TREE = ROOT / "build" / "rehearsal"


def copy_sources(target: Path) -> None:
    """What a copy of the working tree holds: files that git tracks or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    wanted = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    for path in sorted(target.rglob("*"), reverse=True):
        relative = path.relative_to(target)
        kept = relative.parts[0] == "build" or relative.suffix in (".so", ".pyc")
        if path.is_file() and str(relative) not in wanted and not kept:
            path.unlink()
    for name in wanted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def alone(command: list[str]) -> list[str]:
    """``command`` in a namespace without a network."""
    if shutil.which("unshare") is None:
        raise SystemExit(
            "make gpu-rehearsal needs unshare (of util-linux) to run without a network"
        )
    mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *mapped, "--net", *command]


def missing(output: Path, options: Options) -> list[str]:
    """Stages without a last word in the report."""
    found = {r["stage"] for r in summary.of_kind(list(records.read(output / REPORT)), "stage")}
    return [stage.name for stage in stages(options) if stage.name not in found]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the report.")],
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all stages.")] = 2400,
) -> None:
    """Rehearse, and check that the report is complete."""
    output = output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    copy_sources(TREE)
    settings = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", str(output))}
    command = [sys.executable, "-m", "tools.gpu_run", "--rehearse", "--output", str(output)]
    command += ["--budget", str(budget)]
    result = subprocess.run(alone(command), cwd=TREE, env=settings)
    if lacking := missing(output, Options(rehearse=True)):
        raise SystemExit(f"the report is not complete: nothing of {', '.join(lacking)}")
    raise SystemExit(result.returncode)


if __name__ == "__main__":
    typer.run(main)
