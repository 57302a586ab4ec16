"""What processes that measure have in their environment; free of torch, whose libraries read it."""

from __future__ import annotations

# On a busy machine a thread that spins takes the core from the one it waits for, and two threads
# may share a core: the 2-thread times would be those of the scheduler. What the user sets holds.
CALM = {"OMP_WAIT_POLICY": "passive", "OMP_PROC_BIND": "true"}
# glibc keeps what is freed, and a call's output is the memory of the previous one: no page faults.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
