"""``make gpu``: everything that needs a GPU, in one folder: the suite, the sanitizer, benchmarks.

A step that fails is reported and does not keep the later ones from running.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Small inputs of each kernel: a sanitizer makes them a hundred times slower.
SANITIZED = ["tests/test_against_torch.py", "-k", "test_activation_and_residual and 33x13"]


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]


@dataclass(frozen=True)
class Result:
    step: Step
    returncode: int
    seconds: float


def steps(python: str, output: Path, sanitizer: str | None) -> list[Step]:
    """The commands, in order; without a sanitizer its steps are left out."""
    pytest = [python, "-m", "pytest", "-q", "--device", "cuda"]
    found = [Step("suite", [*pytest, f"--junitxml={output / 'suite.xml'}"])]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck") if sanitizer else ():
        assert sanitizer
        command = [sanitizer, "--tool", tool, "--error-exitcode", "99", *pytest, *SANITIZED]
        found.append(Step(f"sanitizer-{tool}", command))
    found.append(Step("accuracy", [python, "-m", "benchmarks.accuracy", "--device", "cuda"]))
    found.append(Step("benchmarks", [python, "-m", "benchmarks.gpu", "--output", str(output)]))
    return found


def run(step: Step, output: Path) -> Result:
    start = time.monotonic()
    with (output / f"{step.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        except OSError as error:
            log.write(f"{error}\n")
            code = 127
    return Result(step, code, time.monotonic() - start)


def index(results: Sequence[Result], facts: Sequence[str]) -> str:
    lines = [
        "# GPU report",
        "",
        *facts,
        "",
        "| step | result | seconds | command |",
        "|---|---|---:|---|",
    ]
    for r in results:
        outcome = "passed" if r.returncode == 0 else f"**failed** ({r.returncode})"
        lines.append(
            f"| [{r.step.name}]({r.step.name}.log) | {outcome} | {r.seconds:.0f} "
            f"| `{' '.join(map(str, r.step.command))}` |"
        )
    return "\n".join(lines) + "\n"


def report(found: Sequence[Step], output: Path, facts: Sequence[str]) -> bool:
    """Runs the steps and writes index.md after each; whether all passed."""
    output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for step in found:
        print(f"== {step.name}", flush=True)
        results.append(run(step, output))
        (output / "index.md").write_text(index(results, facts))
    print(f"report: {output / 'index.md'}")
    return all(r.returncode == 0 for r in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-report")
    parser.add_argument("--arch", action="store_true", help="print the GPU's capability and stop")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("make gpu: no CUDA device here")
    properties = torch.cuda.get_device_properties(0)
    if arguments.arch:
        print(f"{properties.major}.{properties.minor}")
        return
    from bnext.config import build_info

    facts = [f"- {properties.name}, torch {torch.__version__}"]
    facts += [f"- {key}: {value}" for key, value in build_info().items()]
    sanitizer = shutil.which("compute-sanitizer")
    facts.append(f"- compute-sanitizer: {sanitizer or 'not on PATH, left out'}")
    found = steps(sys.executable, arguments.output.resolve(), sanitizer)
    raise SystemExit(0 if report(found, arguments.output.resolve(), facts) else 1)


if __name__ == "__main__":
    main()
