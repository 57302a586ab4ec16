"""How many blocks of a kernel a multiprocessor holds."""

from __future__ import annotations

from tools.sass import Kernel

# Of a multiprocessor: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute
# Capability": warps, blocks, bytes of shared memory, of which each block takes some for CUDA.
LIMITS = {
    "7.5": (32, 16, 64 * 1024, 0),
    "8.0": (64, 32, 164 * 1024, 1024),
    "8.6": (48, 16, 100 * 1024, 1024),
    "8.9": (48, 24, 100 * 1024, 1024),
    "9.0": (64, 32, 228 * 1024, 1024),
    "10.0": (64, 32, 228 * 1024, 1024),
    "12.0": (48, 24, 100 * 1024, 1024),
}


def resident_blocks(kernel: Kernel, threads: int, dynamic_shared: int = 0) -> int:
    """Blocks of a kernel that a multiprocessor holds at once."""
    max_warps, max_blocks, max_shared, reserved = LIMITS[kernel.arch]
    warps = -(-threads // 32)
    # Registers are given to warps in units of 256, from four files of 16384.
    per_warp = -(-max(kernel.registers, 1) * 32 // 256) * 256
    shared = kernel.shared + dynamic_shared + reserved
    return min(
        max_blocks,
        max_warps // warps,
        16384 // per_warp * 4 // warps,
        max_shared // shared if shared else max_blocks,
    )
