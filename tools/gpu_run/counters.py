"""Stage "counters": what eight kernels move and wait for, by ncu. In a rehearsal the executor
counts the bytes."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import torch
import typer

from tools.gpu_run import stand_in
from tools.gpu_run.records import record
from tools.gpu_run.stages import ROOT

_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy")
_METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
# What is kept of the columns that ncu prints.
_KEPT = (
    "dram__bytes_",
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct",
    "launch__registers_per_thread",
    "launch__grid_size",
    "sm__warps_active.avg.pct",
    "smsp__average_warps_issue_stalled_",
    "smsp__average_warp_latency_issue_stalled_",
)
_STALLS = 4  # the longest


class Target(NamedTuple):
    """A call that launches the kernel."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    op: str  # forward, backward or reduce


F32, BF16 = torch.float32, torch.bfloat16
TARGETS = (
    Target((32, 256, 56, 56), "channels_last", F32, "reduce"),
    Target((32, 256, 56, 56), "planes", F32, "reduce"),
    Target((32, 256, 56, 56), "channels_last", BF16, "forward"),
    Target((32, 256, 56, 56), "planes", F32, "forward"),
    Target((32, 256, 56, 56), "planes", F32, "backward"),
    Target((32, 256, 56, 56), "channels_last", BF16, "backward"),
    Target((32, 2048, 7, 7), "planes", F32, "forward"),
    Target((32, 1024, 14, 14), "planes", BF16, "backward"),
)


def calls(target: Target, library: Any, device: str) -> Callable[[], object]:
    """The call, with its inputs made."""
    channels = target.shape[1]
    x = torch.randn(target.shape, device=device, dtype=target.dtype)
    if target.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    if target.op == "reduce":
        return lambda: library.batch_norm_reduce(x, None)

    def forward() -> Any:
        return library.batch_norm(
            x, weight, bias, *running, None, None, True, 0.1, 1e-5, "relu", None
        )

    if target.op == "forward":
        return forward
    _, *saved = forward()
    grad = torch.randn_like(x)
    return lambda: library.batch_norm_backward(
        grad, x, weight, bias, None, None, *saved, True, "relu", [True, False]
    )


def run_targets() -> None:
    """In the process that ncu watches: it looks only between these two calls."""
    for target in TARGETS:
        call = calls(target, torch.ops.bnext, "cuda")
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def parse(text: str) -> Iterator[dict[str, str]]:
    """The rows of ``ncu --csv --page raw``: names, units, a kernel each, after other lines."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    rows = csv.reader(io.StringIO("\n".join(lines[start:])))
    names, units = next(rows), next(rows)
    for row in rows:
        if len(row) == len(names):
            yield {
                name: f"{value} {unit}".strip()
                for name, unit, value in zip(names, units, row, strict=True)
            }


def kept(row: dict[str, str]) -> dict[str, str]:
    """The metrics that are looked at, of the stalls the longest."""
    found = {name: value for name, value in row.items() if name.startswith(_KEPT)}
    stalls = [name for name in found if "_issue_stalled_" in name]

    def length(name: str) -> float:
        try:
            return float(found[name].split()[0].replace(",", ""))
        except (ValueError, IndexError):
            return 0.0

    for name in sorted(stalls, key=length, reverse=True)[_STALLS:]:
        del found[name]
    return found


def by_ncu() -> None:
    ncu = shutil.which("ncu")
    if ncu is None:
        record("check", name="ncu", outcome="left out", message="ncu is not on PATH")
        return
    command = [ncu, "--csv", "--page", "raw", "--clock-control", "none"]
    command += ["--profile-from-start", "off"]
    command += [part for section in _SECTIONS for part in ("--section", section)]
    command += ["--metrics", _METRICS, sys.executable, "-m", "tools.gpu_run.counters", "--watched"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    output = process.communicate()[0]
    print(output)
    rows = list(parse(output))
    for row in rows:
        record("counter", kernel=row.get("Kernel Name", "?"), metrics=kept(row))
    if process.returncode or len(rows) < len(TARGETS):
        raise SystemExit(f"ncu: exit status {process.returncode}, {len(rows)} kernels")


def by_executor() -> None:
    simt = stand_in.executor()
    with simt.running_on(simt.GPUS["h100"]) as library:
        for target in TARGETS:
            shape = (2, min(8, target.shape[1]), *target.shape[2:])  # it is a thousand times slower
            small = target._replace(shape=shape)
            call = calls(small, library, "cpu")
            library.reset_counters()
            call()
            launches, loaded, stored, wide, narrow = library.counters()
            record(
                "counter",
                kernel=f"{small.op} {small.shape} {small.layout} {small.dtype}",
                metrics={"launches": launches, "bytes_loaded": loaded, "bytes_stored": stored,
                         "accesses_of_16_bytes": wide, "smaller_accesses": narrow},
            )  # fmt: skip


def main(
    device: Annotated[str, typer.Option(help="cuda, or executor.")] = "cuda",
    watched: Annotated[bool, typer.Option("--watched", help="What ncu runs.")] = False,
) -> None:
    """Record what the kernels of ``TARGETS`` move."""
    import bnext  # noqa: F401  (registers the ops)

    if watched:
        run_targets()
    elif device == "cuda":
        by_ncu()
    else:
        by_executor()


if __name__ == "__main__":
    typer.run(main)
