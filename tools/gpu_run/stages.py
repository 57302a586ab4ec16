"""The stages of a run, in order of value: what comes late is what is lost when time runs out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SLOWER, _SLOWER_BUILD = 2.5, 12.0


@dataclass(frozen=True)
class Stage:
    """A command with a process and a time limit of its own.

    In ``command``, ``{seconds}`` stands for the time that the stage may plan on.
    """

    name: str
    shows: str
    command: Sequence[str]
    limit: float  # seconds, then it is killed
    expected: float  # seconds on a machine with an H100 and 16 cores, estimated
    needs_build: bool = True
    expects: str = "passed"  # how it is to end


@dataclass(frozen=True)
class Options:
    """``rehearse``: without a GPU, the executor and the CPU stand in for it. ``quick``: as little
    of each stage as shows that it works."""

    rehearse: bool = False
    quick: bool = False
    prebuilt: Path | None = None
    workers: int = 12


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def pytest(device: str, *arguments: str, workers: int = 0) -> list[str]:
    """The plug-in reports every test as it ends, and stops in time."""
    command = ["-m", "pytest", "-q", "--maxfail=100", "--tb=short"]
    command += ["-p", "tools.gpu_run.pytest_plugin", "-p", "no:cacheprovider"]
    command += ["--device", device, "--seconds", "{seconds}", *arguments]
    if workers:
        command += ["-n", str(workers), "--dist", "worksteal"]
    return python(*command)


def stages(options: Options) -> list[Stage]:
    device = "executor" if options.rehearse else "cuda"  # of tests
    timed = "cpu" if options.rehearse else "cuda"  # of benchmarks
    quick = ["--quick"] if options.quick or options.rehearse else []
    build = ["-m", "tools.gpu_run.build"]
    if options.prebuilt:
        build += ["--prebuilt", str(options.prebuilt)]
    if options.rehearse:
        build += ["--rehearse"]
    few = ["-k", "33x13 and f32"] if options.quick else []
    workers = options.workers
    benchmark = ["--device", timed, "--seconds", "{seconds}", *quick]
    found = [
        Stage(
            "facts",
            "card, driver, versions, clocks; rates of a copy; the costs of launches",
            python("-m", "tools.gpu_run.facts", "--device", timed),
            limit=25,
            expected=8,
            needs_build=False,
        ),
        Stage(
            "build",
            "whether it builds for this GPU, in how many seconds a file",
            python(*build),
            limit=110,
            expected=5 if options.prebuilt else 60,
            needs_build=False,
        ),
        Stage(
            "plans",
            "every kernel, plan, layout and dtype once against float64",
            pytest(device, "tests/cuda/test_forced_plans.py", *few, workers=workers),
            limit=45,
            expected=25,
        ),
        Stage(
            "kernels",
            "device time of the raw ops by graph replay, beside a copy, eager and the predictions",
            python("-m", "benchmarks.gpu.kernels", *benchmark),
            limit=60,
            expected=40,
        ),
        Stage(
            "counters",
            "DRAM bytes, time and reasons of stalls of eight kernels (ncu)",
            python("-m", "tools.gpu_run.counters", "--device", device),
            limit=50,
            expected=35,
        ),
        Stage(
            "concurrency",
            "streams, graphs, reduce-overhead, a busy GPU, thousands of repetitions bit for bit",
            pytest(device, "tests/cuda/test_cuda_concurrency.py"),
            limit=50,
            expected=35,
        ),
        Stage(
            "cuda_only",
            "graphs, streams, launches, the allocator, more than 2^31 elements",
            pytest(device, "tests/cuda/test_cuda_only.py"),
            limit=40,
            expected=25,
        ),
        Stage(
            "suite",
            "the tests that take a device, as many as there is time for, gradcheck last",
            pytest(device, "--only-device", workers=workers),
            limit=70,
            expected=50,
        ),
        Stage(
            "sanitizer",
            "accesses out of bounds and races of the forced plans (compute-sanitizer)",
            python("-m", "tools.gpu_run.sanitizer", "--device", device, "--seconds", "{seconds}"),
            limit=80,
            expected=60,
        ),
        Stage(
            "modules",
            "layers beside eager, cuDNN, torch.compile and a copy at ResNet-50's shapes",
            python("-m", "benchmarks.gpu.modules", *benchmark),
            limit=90,
            expected=80,
        ),
        Stage(
            "training",
            "a training step of ResNet-50 in bfloat16, plain and converted, eager and compiled",
            python("-m", "benchmarks.gpu.training", *benchmark),
            limit=110,
            expected=60,
        ),
    ]
    if not options.rehearse:
        return found
    # One or two cores, and an executor for a GPU.
    slower = [
        replace(stage, limit=factor * stage.limit, expected=factor * stage.expected)
        for stage in found
        for factor in [_SLOWER_BUILD if stage.name == "build" else _SLOWER]
    ]
    return [*slower, *_ACCIDENTS]


# What a rehearsal tries besides: both are to be reported, and to cost no more than their limit.
_ACCIDENTS = [
    Stage(
        "hangs",
        "a stage that hangs is ended at its limit, with what it has started",
        python("-c", "import time; print('hanging', flush=True); time.sleep(1e6)"),
        limit=3,
        expected=1,
        needs_build=False,
        expects="timed out",
    ),
    Stage(
        "killed",
        "a stage that is killed is reported as such",
        python("-c", "import os; print('killed', flush=True); os.kill(os.getpid(), 9)"),
        limit=30,
        expected=1,
        needs_build=False,
        expects="killed",
    ),
]
