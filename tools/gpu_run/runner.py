"""Runs stages: each in a session of its own, so that all it started can be ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tools.gpu_run import records, summary
from tools.gpu_run.stages import ROOT, Stage

LOG, REPORT, SUMMARY = "log.txt", "report.jsonl", "summary.md"
# Of a stage's output, so that the log of all stays below 16 MiB.
_HEAD, _TAIL = 900_000, 100_000
_GRACE = 3.0  # seconds to end in by itself, after it was asked to
_MARGIN = 5.0, 0.2  # seconds, or the part of a stage's limit, that it may not plan on


class Output:
    """A stage's output goes to the log as it comes: its beginning at once, its end when it ends."""

    def __init__(self, log: BinaryIO) -> None:
        self.log, self.written, self.tail = log, 0, b""

    def pump(self, pipe: BinaryIO) -> None:
        while block := os.read(pipe.fileno(), 65536):
            fits = block[: max(0, _HEAD - self.written)]
            if fits:
                self.log.write(fits)
                self.log.flush()
                self.written += len(fits)
            self.tail = (self.tail + block[len(fits) :])[-_TAIL:]

    def finish(self) -> None:
        if self.tail:
            self.log.write(b"\n[...]\n" + self.tail)
        self.log.flush()


@dataclass
class Run:
    """``budget``: seconds for all stages. Results go to ``output`` as they come."""

    output: Path
    budget: float
    started: float = field(default_factory=time.monotonic)
    built: bool = True

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def run(self, stages: Sequence[Stage]) -> bool:
        """Whether all stages ended as expected. Told to end, it does at once, with a report."""
        self.output.mkdir(parents=True, exist_ok=True)
        os.environ[records.REPORT] = str(self.output / REPORT)
        before = {s: signal.signal(s, self._interrupted) for s in (signal.SIGTERM, signal.SIGINT)}
        passed = True
        try:
            with (self.output / LOG).open("ab") as log, _scratch() as scratch:
                for stage in stages:
                    passed &= self._one(stage, log, Path(scratch)) == stage.expects
        except _Interrupted as interruption:
            records.record("run", outcome="interrupted", message=str(interruption))
            passed = False
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.write_summary()
        return passed

    def write_summary(self) -> None:
        text = summary.text(list(records.read(self.output / REPORT)))
        (self.output / SUMMARY).write_text(text)

    def _one(self, stage: Stage, log: BinaryIO, scratch: Path) -> str:
        os.environ[records.STAGE] = stage.name
        limit, start = min(stage.limit, self.left()), time.monotonic()
        if stage.needs_build and not self.built:
            outcome, message = "left out", "there is no build"
        elif limit < min(stage.limit, max(_MARGIN[0] + 1, stage.expected / 2)):
            outcome = "left out"
            message = f"{max(0.0, self.left()):.0f} s left, {stage.expected:.0f} expected"
        else:
            print(f"== {stage.name}: at most {limit:.0f} s", flush=True)
            records.record("start", limit=round(limit, 1), expected=stage.expected)
            outcome, message = self._execute(stage, limit, log, scratch)
        if stage.name == "build":
            self.built = outcome == "passed"
        seconds = time.monotonic() - start
        records.record(
            "stage", outcome=outcome, seconds=round(seconds, 1), message=message,
            limit=round(limit, 1), expected=stage.expected, shows=stage.shows,
        )  # fmt: skip
        print(f"   {stage.name}: {outcome} {message} ({seconds:.0f} s)", flush=True)
        self.write_summary()
        return outcome

    def _execute(self, stage: Stage, limit: float, log: BinaryIO, scratch: Path) -> tuple[str, str]:
        plans_on = str(max(1, int(limit - max(_MARGIN[0], _MARGIN[1] * limit))))
        command = [part.replace("{seconds}", plans_on) for part in stage.command]
        log.write(f"\n== {stage.name}: {' '.join(command)}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **environment(scratch)},
            )
        except OSError as error:
            return "failed", str(error)
        output = Output(log)
        assert process.stdout
        pump = threading.Thread(target=output.pump, args=(process.stdout,), daemon=True)
        pump.start()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            outcome, message = "timed out", f"ended after {limit:.0f} s"
        else:
            outcome = "passed" if code == 0 else "killed" if code < 0 else "failed"
            message = "" if code == 0 else signal_name(code) if code < 0 else f"exit status {code}"
        finally:  # also when the whole run is told to end
            _end(process)
            pump.join(_GRACE)  # a process that cannot be ended keeps the pipe open
            output.finish()
        return outcome, message

    @staticmethod
    def _interrupted(number: int, _frame: object) -> None:
        raise _Interrupted(signal.Signals(number).name)


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """For caches; a process that could not be ended may still write there."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


class _Interrupted(BaseException):
    pass


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a stage to end, then ends it and what it has left behind. A process that waits for a
    hung GPU may not even take SIGKILL: it stays."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    _signal_group(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def signal_name(code: int) -> str:
    """Of the negative exit status of a process that a signal ended."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def environment(scratch: Path) -> dict[str, str]:
    """Of every stage: bnext is imported from where it was built, and caches are the run's own."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "passive",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
