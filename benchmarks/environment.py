"""What processes that measure have in their environment; free of torch, whose libraries read it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

# On a busy machine a thread that spins takes the core from the one it waits for, and two threads
# may share a core: the 2-thread times would be those of the scheduler. What the user sets holds.
CALM = {"OMP_WAIT_POLICY": "passive", "OMP_PROC_BIND": "true"}
# glibc keeps what is freed, and a call's output is the memory of the previous one: no page faults.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def settings(wanted: Mapping[str, str] = CALM) -> dict[str, str]:
    """As a child or a restart has them."""
    return {key: os.environ.get(key, value) for key, value in wanted.items()}


def restart_with(wanted: Mapping[str, str], module: str) -> None:
    """Runs ``module`` anew, with the same arguments, unless all of ``wanted`` is set."""
    if not wanted.keys() <= os.environ.keys():
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **settings(wanted)})
