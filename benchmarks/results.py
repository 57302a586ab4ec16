"""What a run of the grid leaves: medians and quartiles, with the machine; kept as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import bnext
from benchmarks.environment import settings
from benchmarks.grid import Cell, last_level_cache_bytes
from benchmarks.peers import OURS
from bnext.measure.timing import Rounds, Spread, ratio, spread

VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """One cell, run and mode."""

    cell: Cell
    run: str
    mode: str
    rounds: int
    us: dict[str, Spread]  # per call, by variant
    ratios: dict[str, dict[str, Spread]]  # ours, then the other: paired, ours / other
    disturbed: float = 0.0  # share of samples in which other programs took a core
    faults: float = 0.0  # minor page faults per call, all variants together
    kept_bytes: dict[str, int] = field(default_factory=dict)  # beyond input and output

    @property
    def key(self) -> tuple[Cell, str, str]:
        return self.cell, self.run, self.mode


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    measurements: list[Measurement]

    @property
    def cache_bytes(self) -> int:
        return int(self.machine["last_level_cache_bytes"])


def summarize(cell: Cell, run: str, mode: str, rounds: Rounds, **extra: Any) -> Measurement:
    """Medians of the rounds, and of the ratios within rounds."""
    samples = rounds.seconds
    return Measurement(
        cell,
        run,
        mode,
        rounds=len(samples["copy"]),
        us={name: spread([1e6 * s for s in seconds]) for name, seconds in samples.items()},
        ratios={
            ours: {
                other: ratio(samples[ours], seconds)
                for other, seconds in samples.items()
                if other != ours
            }
            for ours in OURS
            if ours in samples
        },
        disturbed=round(rounds.disturbed, 2),
        **extra,
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def machine() -> dict[str, Any]:
    """The machine, the versions and the day."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "isa": bnext.config.build_info()["isa"],
        "bnext": bnext.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "onednn": version("onednn-cpu-gomp"),
        "python": platform.python_version(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": round(os.getloadavg()[0], 1),
    }


def thread_settings() -> dict[str, str]:
    """Of the processes that measure; what :func:`machine` tells is of this one."""
    return {key.lower(): value for key, value in settings().items()}


def _spread_to_json(value: Spread) -> list[float]:
    return [float(f"{x:.4g}") for x in (value.median, value.low, value.high)]


def to_json(measurement: Measurement) -> dict[str, Any]:
    found = dataclasses.asdict(measurement)
    found["us"] = {name: _spread_to_json(s) for name, s in measurement.us.items()}
    found["ratios"] = {
        ours: {other: _spread_to_json(s) for other, s in others.items()}
        for ours, others in measurement.ratios.items()
    }
    return found


def from_json(data: dict[str, Any]) -> Measurement:
    cell = data["cell"]
    return Measurement(
        **{
            **data,
            "cell": Cell(**{**cell, "shape": tuple(cell["shape"])}),
            "us": {name: Spread(*s) for name, s in data["us"].items()},
            "ratios": {
                ours: {other: Spread(*s) for other, s in others.items()}
                for ours, others in data["ratios"].items()
            },
        }
    )


def save(results: Results, path: Path) -> None:
    """One measurement a line, so that two files can be told apart by eye."""
    lines = ",\n".join(json.dumps(to_json(m)) for m in results.measurements)
    head = json.dumps(results.machine, indent=1)
    path.write_text(
        f'{{"version": {VERSION},\n"machine": {head},\n"measurements": [\n{lines}\n]}}\n',
        encoding="utf-8",
    )


def load(path: Path) -> Results:
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("version") != VERSION:
        raise ValueError(f"{path} is not a result of `python -m benchmarks.suite` of version 1")
    return Results(data["machine"], [from_json(m) for m in data["measurements"]])
