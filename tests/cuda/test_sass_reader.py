"""tools/sass.py, on kernels whose machine code is known, compiled here with the wheels' nvcc."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools import cuda_build, occupancy, sass
from tools.control_flow import natural_loops
from tools.sass import Kernel, Loop, branches

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "sass_cases.cu"
ARCHS = ["7.5", "9.0"]


def nvcc() -> str:
    wheels = cuda_build.wheels_folder(Path(torch.__file__).parent, torch.version.cuda)
    toolkits = cuda_build.find_toolkits(os.environ, wheels)
    decision = cuda_build.decide(torch.__version__, torch.version.cuda, toolkits, None)
    if decision.toolkit is None:
        pytest.skip(f"nothing to compile the cases with: {decision.reason}")
    return str(decision.toolkit.home / "bin" / "nvcc")


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, str], Kernel]:
    """(architecture, name) -> kernel."""
    codes = [arch.replace(".", "") for arch in ARCHS]
    flags = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    command = [nvcc(), "-c", "-O3", "-std=c++20", "--fmad=false", *flags, str(SOURCE)]
    content = repr(command).encode() + SOURCE.read_bytes()
    built = ROOT / "build" / "tests" / f"sass_cases-{hashlib.sha256(content).hexdigest()[:16]}.o"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        for old in built.parent.glob("sass_cases-*.o"):
            old.unlink(missing_ok=True)
        unfinished.replace(built)
    found = sass.read(built)
    assert len(found) == 6 * len(ARCHS)
    return {(kernel.arch, kernel.name): kernel for kernel in found}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_vector_loop(kernels: dict[tuple[str, str], Kernel], arch: str) -> None:
    kernel = kernels[arch, "relu_kernel<float, true, (Kind)1, 4>"]
    assert kernel.function == "relu_kernel"
    assert kernel.arguments == ["float", "true", "(Kind)1", "4"]
    assert not kernel.local_memory
    assert kernel.shared == 0
    assert 8 <= kernel.registers <= 32
    (loop,) = kernel.loops
    assert loop.streaming
    assert loop == kernel.main_loop
    assert (loop.global_loads, loop.global_stores) == ({128: 1}, {128: 1})
    assert (loop.shared_loads, loop.shared_stores) == ({}, {})
    # 4 multiplications, 4 maxima, 2 accesses; addresses, the counter, the comparison, the branch.
    assert (loop.maths, loop.double_maths) == (4, 0)
    assert 13 <= loop.instructions <= 18
    assert loop.elements(element_bytes=4, inputs=1, outputs=1) == 4
    bfloat16 = kernels[arch, "relu_kernel<__nv_bfloat16, false, (Kind)0, 8>"].main_loop
    assert bfloat16 is not None
    assert bfloat16.elements(element_bytes=2, inputs=1, outputs=1) == 8


@pytest.mark.parametrize("arch", ARCHS)
def test_nested_loops(kernels: dict[tuple[str, str], Kernel], arch: str) -> None:
    kernel = kernels[arch, "sum_kernel"]
    assert kernel.arguments == []
    assert kernel.shared == 128 * 4
    outer, inner, reduction = sorted(kernel.loops, key=lambda loop: loop.innermost)
    inner, reduction = sorted((inner, reduction), key=lambda loop: loop.address)
    assert (outer.innermost, outer.streaming) == (False, False)
    assert outer.instructions > inner.instructions
    assert outer.global_loads == inner.global_loads == {32: 1}
    assert (reduction.shared_loads, reduction.global_loads) == ({32: 1}, {})
    assert kernel.streaming_loops == [inner, reduction]
    assert kernel.main_loop == inner  # global memory before shared
    assert inner.elements(element_bytes=4, inputs=1, outputs=0) == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_local_memory_is_seen(kernels: dict[tuple[str, str], Kernel], arch: str) -> None:
    indexed, spilled = kernels[arch, "local_kernel"], kernels[arch, "spill_kernel"]
    assert indexed.stack >= 800
    assert indexed.local_loads >= 1
    assert indexed.local_stores >= 1
    assert spilled.registers <= 64
    assert spilled.stack > 0
    assert spilled.local_loads >= 30
    assert spilled.local_stores >= 30
    for kernel in (indexed, spilled):
        assert kernel.local_memory


@pytest.mark.parametrize("arch", ARCHS)
def test_loops_that_wait_or_read_a_workspace_do_not_stream(
    kernels: dict[tuple[str, str], Kernel], arch: str
) -> None:
    kernel = kernels[arch, "wait_kernel"]
    assert len(kernel.loops) == 2
    assert kernel.streaming_loops == []
    assert kernel.main_loop is None


def test_what_was_read_is_kept(
    kernels: dict[tuple[str, str], Kernel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sass, "CACHE", tmp_path)
    cubin = tmp_path / "a.cubin"
    cubin.write_bytes(b"code")
    found = list(kernels.values())
    calls = []
    monkeypatch.setattr(sass, "read_cubin", lambda path: calls.append(path) or found)
    assert sass.read_cached(cubin) == found
    assert sass.read_cached(cubin) == found
    assert len(calls) == 1
    cubin.write_bytes(b"other code")
    sass.read_cached(cubin)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("predicate", "opcode", "operands", "expected"),
    [
        ("", "BRA", "`(.L_x_1)", ([".L_x_1"], False)),
        ("@P0 ", "BRA", "`(.L_x_1)", ([".L_x_1"], True)),
        ("", "BRA", "P2, `(.L_x_1)", ([".L_x_1"], True)),
        ("", "BRA.U", "!UP0, `(.L_x_1)", ([".L_x_1"], True)),
        ("", "BRA.DIV", "~URZ, `(.L_x_1)", ([".L_x_1"], True)),
        ("", "BRX", 'R2 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)', ([".L_x_1", ".L_x_2"], False)),
        ("", "EXIT", "", ([], False)),
        ("@!P1 ", "EXIT", "", ([], True)),
        ("", "BSSY", "B0, `(.L_x_1)", None),  # says where threads will meet, and goes on
        ("", "CALL.REL.NOINC", "`(.L_x_1)", None),  # comes back
        ("", "FADD", "R0, R1, R2", None),
    ],
)
def test_branches(
    predicate: str, opcode: str, operands: str, expected: tuple[list[str], bool] | None
) -> None:
    assert branches(predicate, opcode, operands) == expected


@pytest.mark.parametrize(
    ("successors", "loops"),
    [
        ([[1], [2], []], {}),
        ([[1], [1, 2], []], {1: {1}}),
        ([[1], [2], [2, 3], [1, 4], []], {1: {1, 2, 3}, 2: {2}}),
        ([[1], [2, 3], [4], [4], [1, 5], []], {1: {1, 2, 3, 4}}),  # a branch inside
        ([[1], [2, 3], [1], [1, 4], []], {1: {1, 2, 3}}),  # two ways back: one loop
        ([[2], [1], []], {}),  # what nothing reaches: the trap after the end
        ([[1, 2], [2, 3], [1, 3], []], {}),  # two ways in: no natural loop
    ],
)
def test_natural_loops(successors: list[list[int]], loops: dict[int, set[int]]) -> None:
    assert natural_loops(successors) == loops


def kernel_of(arch: str, registers: int, shared: int = 0) -> Kernel:
    return Kernel(arch, "k", registers, shared, 0, 0, 0, 1, [])


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "dynamic", "blocks"),
    [
        ("8.0", 128, 256, 0, 2),
        ("8.0", 129, 256, 0, 1),
        ("8.0", 32, 256, 0, 8),
        ("8.0", 32, 256, 82944 - 1024, 2),
        ("7.5", 32, 256, 0, 4),
        ("9.0", 16, 32, 0, 32),
        ("12.0", 65, 256, 0, 3),
        ("8.6", 16, 1024, 0, 1),
    ],
)
def test_resident_blocks(
    arch: str, registers: int, threads: int, dynamic: int, blocks: int
) -> None:
    kernel = kernel_of(arch, registers)
    assert occupancy.resident_blocks(kernel, threads, dynamic) == blocks
    assert occupancy.resident_blocks(replace(kernel, shared=dynamic), threads) == blocks


def test_a_file_without_device_code_has_no_kernels() -> None:
    sass.tool("cuobjdump")
    assert sass.read(Path(torch.__file__).parent / "lib" / "libshm.so") == []


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.o").write_text("text")
    with pytest.raises(RuntimeError, match=r"a\.o"):
        sass.read(tmp_path / "a.o")


def test_widths_of_accesses() -> None:
    opcodes = ["LDG.E.128.CONSTANT", "LDG.E.EF", "LDG.E.U16", "LDG.E.64.STRONG.GPU", "LD.E.U8",
               "STG.E.128.STRONG.SM", "LDS.U.64", "LDL.128", "LDGSTS.E.128"]  # fmt: skip
    assert sass.accesses(opcodes, "LDG") == {8: 1, 16: 1, 32: 1, 128: 1}
    assert sass.accesses(opcodes, "STG") == {128: 1}
    assert sass.accesses(opcodes, "LDS") == {64: 1}
    loop = Loop(0, 9, 1, 0, True, {128: 2}, {128: 1}, {}, {})
    assert loop.elements(element_bytes=2, inputs=2, outputs=1) == 8
    assert loop.elements(element_bytes=2, inputs=2, outputs=0) == 8
