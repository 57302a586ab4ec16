"""What the project's own kernels need and may cost; `make sass` writes it down in docs/sass.md."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path

from bnext import _build_info
from tools import occupancy, sass
from tools.sass import Kernel, Loop

TABLE = sass.ROOT / "docs" / "sass.md"
LAUNCH_CONFIG = sass.ROOT / "csrc" / "cuda" / "launch_config.h"

ELEMENT_BYTES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}

# elements.cuh's Fusion. kAny reads at run time whether there is a residual.
K_RELU_RESIDUAL, K_ANY = 2, 3

# Arrays of the input's size that are (read, written) without a residual, and with one.
ARRAYS = {
    "reduce_kernel": ((1, 0), (1, 0)),
    "apply_kernel": ((1, 1), (2, 1)),
    "grad_reduce_kernel": ((2, 0), (3, 0)),
    "grad_apply_kernel": ((2, 1), (3, 2)),
    "forward_on_chip_kernel": ((1, 1), (2, 1)),
    "backward_on_chip_kernel": ((2, 1), (3, 2)),
}


def launch_constant(name: str) -> int:
    found = re.search(rf"constexpr int {name} = (\d+);", LAUNCH_CONFIG.read_text())
    assert found, f"{LAUNCH_CONFIG.name} has no {name}"
    return int(found[1])


def resident_blocks(kernel: Kernel) -> int:
    """Blocks that launch_config.h and elements.cuh (kMinBlocks) count on."""
    alone = ("grad_reduce_kernel", "forward_on_chip_kernel", "backward_on_chip_kernel")
    if (
        kernel.function in alone
        and fusion(kernel) == K_ANY
        and (rows(kernel) or vector(kernel) == 8)
    ):
        return 1
    return launch_constant("kMinBlocksPerSm")


def max_registers(kernel: Kernel) -> int:
    """So that as many blocks are resident at once."""
    return min(255, 65536 // (resident_blocks(kernel) * launch_constant("kThreads")))


def scalar(kernel: Kernel) -> str | None:
    first = kernel.arguments[:1]
    return first[0] if first and first[0] in ELEMENT_BYTES else None


def streams(kernel: Kernel) -> bool:
    """Whether it walks over tensors: <scalar_t, kRows, kVec, ...>."""
    return kernel.function in ARRAYS


def vector(kernel: Kernel) -> int:
    """Elements of a vector, 1 for the instances that take one element at a time."""
    return int(kernel.arguments[2])


def rows(kernel: Kernel) -> bool:
    return kernel.arguments[1] == "true"


def fusion(kernel: Kernel) -> int:
    found = re.search(r"\(Fusion\)(\d)", kernel.name)
    return int(found[1]) if found else 0


def elements(kernel: Kernel, loop: Loop) -> float:
    inputs, outputs = ARRAYS[kernel.function][fusion(kernel) >= K_RELU_RESIDUAL]
    return loop.elements(ELEMENT_BYTES[kernel.arguments[0]], inputs, outputs)


def instructions_per_element(kernel: Kernel) -> float | None:
    """Of the best streaming loop; on chip, of the best that fills the cache and the best that
    empties it. Loops that do the same with less unrolling finish what the others leave. None for
    kAny: what SASS shows are all the branches that it may take."""
    if not streams(kernel) or fusion(kernel) == K_ANY:
        return None
    best: dict[bool, float] = {}
    for loop in kernel.streaming_loops:
        if loop.global_loads or loop.global_stores:
            cost = loop.instructions / elements(kernel, loop)
            stores = bool(loop.global_stores)
            best[stores] = min(cost, best.get(stores, cost))
    return sum(best.values()) if best else None


def columns(kernels: list[Kernel]) -> str:
    """The heading of the table: the architectures of the build."""
    archs = sorted({kernel.arch for kernel in kernels}, key=float)
    return "| kernel | " + " | ".join(archs) + " |"


def cell(kernel: Kernel) -> str:
    blocks = occupancy.resident_blocks(kernel, launch_constant("kThreads"))
    cost = instructions_per_element(kernel)
    return f"{kernel.registers} · {blocks}" + (f" · {cost:.1f}" if cost else "")


def table(kernels: list[Kernel]) -> str:
    by_name: dict[str, dict[str, Kernel]] = defaultdict(dict)
    for kernel in kernels:
        by_name[kernel.name][kernel.arch] = kernel
    archs = sorted({kernel.arch for kernel in kernels}, key=float)
    shared = sorted({kernel.shared for kernel in kernels})
    threads = launch_constant("kThreads")
    lines = [
        "# What the CUDA kernels need",
        "",
        "Read by `make sass` off the machine code of the built extension (CUDA toolkit "
        f"{_build_info.cuda_toolkit}); `tests/cuda/test_sass.py` compares.",
        "",
        f"registers a thread · blocks of {threads} threads that are resident on a multiprocessor "
        "(without the shared memory that the launch asks for) · instructions per "
        "element of the best streaming loop (on chip: of the one that fills the cache and the one "
        "that empties it). "
        "`launch_config.h` counts on two blocks, that is 128 registers; on one where a kernel "
        "decides at run time what it does with eight elements or the sums of several channels "
        "(`kMinBlocks` in `elements.cuh`). Static shared memory of any kernel: "
        f"{', '.join(map(str, shared))} bytes.",
        "",
        "Template arguments: element, rows (else planes), elements of a vector, offsets, "
        "`Fusion` (0 no activation, 1 ReLU, 2 ReLU and residual, 3 any).",
        "",
        columns(kernels),
        "|---" * (len(archs) + 1) + "|",
    ]
    for name, per_arch in sorted(by_name.items()):
        cells = [cell(per_arch[arch]) if arch in per_arch else "" for arch in archs]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the table of the kernels' needs.")
    parser.add_argument("paths", nargs="*", type=Path, help="default: the built extension")
    parser.add_argument("--output", type=Path, default=TABLE)
    arguments = parser.parse_args()
    kernels = sass.read(*(arguments.paths or [sass.extension()]))
    if not kernels:
        parser.error(f"no machine code in the extension: {_build_info.cuda_reason}")
    arguments.output.write_text(table(kernels))
    print(f"{arguments.output}: {len(kernels)} kernels")


if __name__ == "__main__":
    main()
