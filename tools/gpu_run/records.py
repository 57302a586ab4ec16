"""The report of a run: one JSON object a line, appended and flushed as results come, so that a
process that is killed loses nothing. Stages find the file in their environment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPORT, STAGE = "BNEXT_GPU_REPORT", "BNEXT_GPU_STAGE"

Record = dict[str, Any]


def record(kind: str, **fields: Any) -> None:
    """Appends a result to the report. Where no run is on (a stage started by hand), prints it.

    Several processes may append at once: a line is one write to a file opened for appending.
    """
    line = {"kind": kind, "stage": os.environ.get(STAGE, ""), "time": round(time.time(), 3)}
    text = json.dumps({**line, **fields}, default=str) + "\n"
    path = os.environ.get(REPORT)
    if path is None:
        print(text, end="", flush=True)
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> Iterator[Record]:
    """The records of a report; a last line that was cut off is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
