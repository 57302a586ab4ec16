"""What the kernels of the built extension are made of, read off their machine code, without a GPU:
no local memory, registers within the occupancy that launch_config.h counts on, 16 bytes an access,
and a budget of instructions per element."""

from __future__ import annotations

import pytest

from bnext import _build_info
from tools import sass, sass_table
from tools.sass import Kernel, Loop

# Instructions per element and kernel: without a residual, and with one, which is one more tensor to
# load and add, and in backward a second gradient to write.
FLOAT_BUDGET = {
    "reduce_kernel": (8, 8),
    "apply_kernel": (6, 7),
    "grad_reduce_kernel": (10, 10),
    "grad_apply_kernel": (8, 9),
}
HALF_BUDGET = 14  # __half and bfloat16 are converted, two at a time
# 7.5 has no instruction that rounds to bfloat16; with a residual grad_apply rounds two gradients.
ROUNDING_TWICE_BUDGET = 21


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if not _build_info.cuda:
        pytest.skip(f"built without CUDA: {_build_info.cuda_reason}")
    return sass.read(sass.extension())


def report(failures: list[str]) -> None:
    if failures:
        pytest.fail(f"{len(failures)} found:\n" + "\n".join(failures), pytrace=False)


def label(kernel: Kernel) -> str:
    return f"{kernel.arch} {kernel.name}"


def test_every_kernel_is_there_for_every_architecture(kernels: list[Kernel]) -> None:
    archs = {kernel.arch for kernel in kernels}
    names = {kernel.name for kernel in kernels}
    assert {kernel.function for kernel in kernels} >= set(sass_table.ARRAYS)
    found = {(kernel.arch, kernel.name) for kernel in kernels}
    assert found == {(arch, name) for arch in archs for name in names}


def test_nothing_is_spilled(kernels: list[Kernel]) -> None:
    report([
        f"{label(k)}: {k.stack} B of stack, {k.local_loads} local loads, {k.local_stores} stores"
        for k in kernels if k.local_memory
    ])  # fmt: skip


def test_registers_leave_room_for_the_blocks_that_the_launch_counts_on(
    kernels: list[Kernel],
) -> None:
    report([
        f"{label(k)}: {k.registers} > {most}"
        for k in kernels
        if k.registers > (most := sass_table.max_registers(k))
    ])  # fmt: skip


def test_tensors_are_streamed_through_vectors(kernels: list[Kernel]) -> None:
    """Every loop of the vector kernels that touches tensors loads and stores 16 bytes at a time;
    those over planes may have a loop of single elements, for the ends of a line."""

    def is_edge(kernel: Kernel, loop: Loop) -> bool:
        element = 8 * sass_table.ELEMENT_BYTES[kernel.arguments[0]]
        single = {*loop.global_loads, *loop.global_stores} == {element}
        return single and not sass_table.rows(kernel)

    failures = []
    for kernel in kernels:
        if not sass_table.streams(kernel) or sass_table.vector(kernel) == 1:
            continue
        loops = [loop for loop in kernel.streaming_loops if not is_edge(kernel, loop)]
        widths = [{*loop.global_loads, *loop.global_stores} for loop in loops]
        if {128} not in widths:
            failures.append(f"{label(kernel)}: no loop over vectors")
        for loop, found in zip(loops, widths, strict=True):
            if found - {128}:
                failures.append(f"{label(kernel)}, loop at 0x{loop.address:x}: {found} bits")
    report(failures)


def budget(kernel: Kernel) -> float | None:
    """Of the vector kernels with 32-bit offsets; None where no budget is set: those with branches
    for every activation, and double, for which few GPUs have the units."""
    if (
        kernel.function not in FLOAT_BUDGET
        or sass_table.vector(kernel) == 1
        or kernel.arguments[3] != "int"
        or sass_table.fusion(kernel) == sass_table.K_ANY
    ):
        return None
    scalar = kernel.arguments[0]
    with_residual = sass_table.fusion(kernel) == sass_table.K_RELU_RESIDUAL
    if scalar == "float":
        return FLOAT_BUDGET[kernel.function][with_residual]
    if scalar == "double":
        return None
    rounds_twice = kernel.function == "grad_apply_kernel" and with_residual
    if scalar == "__nv_bfloat16" and kernel.arch == "7.5" and rounds_twice:
        return ROUNDING_TWICE_BUDGET
    return HALF_BUDGET


def test_instructions_per_element(kernels: list[Kernel]) -> None:
    failures = []
    for kernel in kernels:
        cost, most = sass_table.instructions_per_element(kernel), budget(kernel)
        if most is not None and (cost is None or cost > most):
            failures.append(f"{label(kernel)}: {cost} > {most}")
    report(failures)


def test_the_table_is_up_to_date(kernels: list[Kernel]) -> None:
    """docs/sass.md is what `make sass` writes."""
    assert sass_table.TABLE.exists(), "run `make sass`"
    written = sass_table.TABLE.read_text()
    if sass_table.columns(kernels) not in written:
        pytest.skip(f"the table is of other architectures than {_build_info.cuda_archs}")
    if f"(CUDA toolkit {_build_info.cuda_toolkit})" not in written:
        pytest.skip(f"the table is of another CUDA toolkit than {_build_info.cuda_toolkit}")
    differing = sorted({*written.splitlines()} ^ {*sass_table.table(kernels).splitlines()})
    report([f"run `make sass`: {line}" for line in differing])
