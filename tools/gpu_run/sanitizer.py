"""Stage "sanitizer": compute-sanitizer over the forced plans, and over the standalone program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from typing import Annotated

import torch
import typer

from tools.gpu_run import stand_in
from tools.gpu_run.build import STANDALONE
from tools.gpu_run.records import record
from tools.gpu_run.stages import ROOT

_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_ERROR = 99  # exit status where the sanitizer found something
_SHAPES = (((33, 13), False), ((300, 64), False), ((6, 5, 24, 24), False), ((4, 13, 7, 7), False),
           ((5, 16, 12, 12), True))  # fmt: skip
_NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or overruns stay within torch's own blocks


def forced_plans(device: str) -> None:
    """One training step of every plan and shape, looked at by what watches this process."""
    import bnext

    executor = stand_in.executor()
    for name, gpu in executor.GPUS.items():
        for shape, channels_last in _SHAPES:
            x = torch.randn(shape, device=device)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            layer = getattr(bnext, f"BatchNormAct{max(1, len(shape) - 2)}d")(shape[1]).to(device)
            if device == "cuda":
                with executor.limited_to(gpu):
                    _step(layer, x)
                torch.cuda.synchronize()
            else:
                with executor.running_on(gpu):
                    _step(layer, x)
        print(f"{name}: {len(_SHAPES)} shapes", flush=True)


def _step(layer: torch.nn.Module, x: torch.Tensor) -> None:
    x = x.requires_grad_()
    want = torch.relu(torch.nn.functional.batch_norm(x.double(), None, None, training=True))
    y = layer(x)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


def check(name: str, command: list[str], seconds: float) -> bool:
    """Records one run; whether nothing was found."""
    start = time.monotonic()
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds),
            env={**os.environ, **_NO_CACHE},
        )  # fmt: skip
        output, code = result.stdout + result.stderr, result.returncode
    except subprocess.TimeoutExpired as late:
        output, code = (late.stdout or b"").decode(errors="replace"), None
    print(output)
    outcome = "timed out" if code is None else "passed" if code == 0 else "failed"
    found = [line for line in output.splitlines() if "=====" in line and line.strip(" =")]
    message = " ".join(found)[-600:] if outcome == "failed" else ""
    taken = round(time.monotonic() - start, 1)
    record("check", name=name, outcome=outcome, seconds=taken, message=message)
    return outcome == "passed"


def main(
    device: Annotated[str, typer.Option(help="cuda, or executor.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="For all of it.")] = 75,
    watched: Annotated[bool, typer.Option("--watched", help="What the sanitizer runs.")] = False,
) -> None:
    """Record what each tool of compute-sanitizer finds."""
    if watched:
        forced_plans("cuda")
        return
    if device != "cuda":
        forced_plans("cpu")
        record("check", name="forced plans on the executor", outcome="passed", message="")
        return
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        record("check", name="compute-sanitizer", outcome="left out", message="not on PATH")
        return
    end = time.monotonic() + seconds
    this = [sys.executable, "-m", "tools.gpu_run.sanitizer", "--watched"]
    runs = [(f"forced plans, {tool}", tool, this) for tool in _TOOLS[:2]]
    if STANDALONE.exists():
        # Seconds each: torch is not in it.
        runs = [(f"standalone, {tool}", tool, [str(STANDALONE)]) for tool in _TOOLS] + runs
    clean = True
    for name, tool, command in runs:
        watching = [sanitizer, "--tool", tool, "--error-exitcode", str(_ERROR)]
        if tool == "memcheck":  # torch asks the driver for what it may not have
            watching += ["--report-api-errors", "no"]
        # torch's own kernels are not looked at.
        watching += ["--kernel-name", "kernel_substring=bnext"]
        clean &= check(name, [*watching, *command], end - time.monotonic())
    raise SystemExit(0 if clean else 1)


if __name__ == "__main__":
    typer.run(main)
