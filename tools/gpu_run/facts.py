"""Stage "facts": the machine, and the rates that all other times are measured against."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer

from tools.gpu_run.records import record

_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.limit"
_SIZES = (4 << 20, 64 << 20, 1 << 30)  # bytes: within the L2 cache, beside it, far beyond
_NODES = 100


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    if device != "cuda":
        return {**found, "gpu": "none: a rehearsal"}
    p = torch.cuda.get_device_properties(0)
    found |= {
        "gpu": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1),
        "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    if smi := shutil.which("nvidia-smi"):
        command = [smi, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        found |= dict(zip(_QUERY.split(","), answer.strip().split(", "), strict=False))
    for tool in ("nvcc", "ncu", "compute-sanitizer", "cuobjdump"):
        found[tool] = shutil.which(tool) or "not on PATH"
    return found


def seconds(step: Callable[[], object], device: str, calls: int) -> float:
    """Per call, the median of several samples."""
    samples = []
    for _ in range(7):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                step()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3 / calls)
        else:
            start = time.perf_counter()
            for _ in range(calls):
                step()
            samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples[2:])


def copy_rates(device: str) -> None:
    for size in _SIZES if device == "cuda" else _SIZES[:2]:
        source = torch.randn(size // 4, device=device)
        target = torch.empty_like(source)
        taken = seconds(partial(target.copy_, source), device, 10)
        record("copy", bytes=size, us=taken * 1e6, gb_per_s=2 * size / taken / 1e9)


def launch_costs() -> None:
    """What the host needs for a small kernel, and the device for one more node of a graph."""
    x = torch.zeros(32, device="cuda")
    record("fact", name="eager_launch_us", value=seconds(lambda: x.add_(1), "cuda", 1000) * 1e6)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_NODES):
            x.add_(1)
    record("fact", name="graph_node_us", value=seconds(graph.replay, "cuda", 20) / _NODES * 1e6)


def main(device: Annotated[str, typer.Option(help="cuda, or cpu to rehearse.")] = "cuda") -> None:
    """Record the machine and its rates."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here")
    for name, value in machine(device).items():
        record("fact", name=name, value=value)
        print(f"{name}: {value}")
    copy_rates(device)
    if device == "cuda":
        launch_costs()


if __name__ == "__main__":
    typer.run(main)
