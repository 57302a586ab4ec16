"""Reads the machine code of CUDA kernels: registers, spills, loops, and what these load and store.

Of the built extension (or of given cubins, objects and libraries), for every architecture in it,
with cuobjdump and nvdisasm of the wheel triton, which torch's CUDA builds depend on. No GPU is
needed. `python -m tools.sass FILE...` prints what it finds; tools/sass_table.py knows the project's
kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools import control_flow

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "sass"
FOLDER_IN_TRITON = Path("backends", "nvidia", "bin")


# --- What a kernel is made of


@dataclass(frozen=True)
class Loop:
    """A natural loop; counts are of one turn, every branch of it taken together."""

    address: int  # of its first instruction
    instructions: int  # without NOP, with which 12.0 fills the time of its few double units
    maths: int  # floating-point additions, multiplications and fused ones
    double_maths: int  # of double, with conversions: 1/64 of the rate of float on 8.6, 8.9 and 12.0
    innermost: bool
    # Bits of the access -> how many. Not among the loads: those that ask for coherence with other
    # blocks (.STRONG.GPU, .STRONG.SYS), which read a workspace or a counter, not a tensor.
    global_loads: dict[int, int]
    global_stores: dict[int, int]
    shared_loads: dict[int, int]
    shared_stores: dict[int, int]

    @property
    def streaming(self) -> bool:
        """Loads and computes, and holds no further loop."""
        return self.innermost and self.maths > 0 and bool(self.global_loads or self.shared_loads)

    def elements(self, element_bytes: int, inputs: int, outputs: int) -> float:
        """Elements a thread handles in one turn, of arrays that are all equally wide.

        SASS does not say which array an address belongs to; the caller knows how many there are.
        """
        for accesses, arrays in (
            (self.global_stores, outputs),
            (self.global_loads, inputs),
            (self.shared_loads, inputs),
        ):
            if accesses and arrays:
                return bytes_of(accesses) / (element_bytes * arrays)
        return 0.0


@dataclass(frozen=True)
class Kernel:
    arch: str  # "8.0"
    name: str  # without namespaces: "apply_kernel<float, true, 4>"
    registers: int
    shared: int  # static, bytes
    stack: int  # bytes
    local_loads: int  # LDL: spills, and arrays that are indexed at run time
    local_stores: int
    instructions: int
    loops: list[Loop]

    @property
    def function(self) -> str:
        return self.name.split("<")[0]

    @property
    def arguments(self) -> list[str]:
        """Template arguments."""
        inside = self.name.partition("<")[2].rpartition(">")[0]
        found, depth, start = [], 0, 0
        for at, character in enumerate(inside + ","):
            depth += (character in "<(") - (character in ">)")
            if character == "," and depth == 0:
                found.append(inside[start:at].strip())
                start = at + 1
        return [argument for argument in found if argument]

    @property
    def local_memory(self) -> bool:
        return bool(self.stack or self.local_loads or self.local_stores)

    @property
    def streaming_loops(self) -> list[Loop]:
        return [loop for loop in self.loops if loop.streaming]

    @property
    def main_loop(self) -> Loop | None:
        """The streaming loop that moves most bytes in a turn, through global memory if any does."""
        return max(
            self.streaming_loops,
            default=None,
            key=lambda loop: (
                bytes_of(loop.global_loads) + bytes_of(loop.global_stores),
                bytes_of(loop.shared_loads),
                -loop.instructions,
            ),
        )


def bytes_of(accesses: dict[int, int]) -> int:
    return sum(bits // 8 * count for bits, count in accesses.items())


# --- From the text of nvdisasm to kernels

SECTION = re.compile(r"\t\.section\t\.text\.([\w$]+),")
INSTRUCTION = re.compile(r" +/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*) *([^;]*)")
LABEL = re.compile(r"(\.L_x_\d+|\$[\w$.]+):$")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
MATHS = re.compile(r"[FD](ADD|MUL|FMA)2?\b")
DOUBLE_MATHS = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|[FI]2[FI]\..*F64")
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass
class Block:
    """Instructions with one way in, and where control goes from the last."""

    first: int
    opcodes: list[str]
    targets: list[str]
    falls_through: bool


def accesses(opcodes: Iterable[str], kind: str) -> dict[int, int]:
    """Bits -> count of the loads or stores of one kind: LDG, STG, LDS, STS, with LD and ST (generic
    addresses) among the global ones."""
    names = {kind, kind[:2]} if kind.endswith("G") else {kind}
    found: Counter[int] = Counter()
    for opcode in opcodes:
        name, *suffixes = opcode.split(".")
        coherent = "STRONG" in suffixes and ("GPU" in suffixes or "SYS" in suffixes)
        if name in names and not (coherent and kind == "LDG"):
            widths = [re.fullmatch(r"[US]?(8|16|64|128|256)", s) for s in suffixes]
            found[next((int(w[1]) for w in widths if w), 32)] += 1
    return dict(sorted(found.items()))


def branches(predicate: str, opcode: str, operands: str) -> tuple[list[str], bool] | None:
    """(labels, whether control may go on to the next instruction); None: not a branch."""
    name = opcode.split(".")[0]
    if name in ("BRA", "JMP"):
        always = not predicate and operands.startswith(("`", ".L"))
        return TARGET.findall(operands), not always
    if name in ("BRX", "BRXU", "JMX", "JMXU"):
        listed = re.search(r'BRANCH_TARGETS ([^"]*)"', operands)
        return (listed[1].split(",") if listed else []), bool(predicate)
    if name == "WARPSYNC" and "`(" in operands:
        return TARGET.findall(operands), True
    if name in ("EXIT", "RET", "KILL"):
        return [], bool(predicate)
    return None


def blocks_of(lines: Iterable[str]) -> tuple[list[Block], dict[str, int]]:
    """Basic blocks of one function, and the block that each label stands before."""
    blocks: list[Block] = []
    labels: dict[str, int] = {}
    is_open = False
    for line in lines:
        found = INSTRUCTION.match(line)
        if found:
            address, predicate, opcode, operands = found.groups()
            if not is_open:
                blocks.append(Block(int(address, 16), [], [], True))
                is_open = True
            blocks[-1].opcodes.append(opcode)
            leaves = branches(predicate or "", opcode, operands)
            if leaves:
                blocks[-1].targets, blocks[-1].falls_through = leaves
                is_open = False
        elif label := LABEL.match(line):
            is_open = False
            labels[label[1]] = len(blocks)
    return blocks, labels


def loops_of(blocks: list[Block], labels: dict[str, int]) -> list[Loop]:
    successors = []
    for at, block in enumerate(blocks):
        after = [labels[target] for target in block.targets if target in labels]
        after += [at + 1] if block.falls_through else []
        successors.append([target for target in after if target < len(blocks)])
    loops = control_flow.natural_loops(successors) if blocks else {}
    found = []
    for first, body in sorted(loops.items()):
        opcodes = [op for at in sorted(body) for op in blocks[at].opcodes if op != "NOP"]
        found.append(
            Loop(
                address=blocks[first].first,
                instructions=len(opcodes),
                maths=sum(bool(MATHS.match(opcode)) for opcode in opcodes),
                double_maths=sum(bool(DOUBLE_MATHS.match(opcode)) for opcode in opcodes),
                innermost=not any(other != first and other in body for other in loops),
                global_loads=accesses(opcodes, "LDG"),
                global_stores=accesses(opcodes, "STG"),
                shared_loads=accesses(opcodes, "LDS"),
                shared_stores=accesses(opcodes, "STS"),
            )
        )
    return found


def short_names(mangled: Sequence[str]) -> list[str]:
    """Demangled, without return type, parameters and namespaces. c++filt belongs to binutils, which
    g++ needs."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    names = []
    for line in text.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|\b[A-Za-z_]\w*::", "", line)
        name = name.removeprefix("void ")
        depth = 0
        for at, character in enumerate(name):
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                name = name[:at]
                break
        names.append(name)
    return names


def tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    path = spec and spec.origin and Path(spec.origin).parent / FOLDER_IN_TRITON / name
    if not path or not path.exists():
        raise FileNotFoundError(f"{name} comes with triton, which CUDA builds of torch bring")
    return str(path)


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_cubin(cubin: Path) -> list[Kernel]:
    text = output_of(tool("nvdisasm"), "-c", cubin)
    usages = USAGE.findall(output_of(tool("cuobjdump"), "-res-usage", cubin))
    usage = {name: numbers for name, *numbers in usages}
    number = re.search(r"\.target\s+sm_(\d+)", text)
    assert number, f"{cubin}: no .target"
    arch = f"{number[1][:-1]}.{number[1][-1]}"
    # Text between two sections belongs to the first; the text before the first is no function's.
    parts = SECTION.split(text)[1:]
    names = parts[::2]
    kernels = []
    for mangled, name, body in zip(names, short_names(names), parts[1::2], strict=True):
        blocks, labels = blocks_of(body.split("\n"))
        opcodes = [opcode for block in blocks for opcode in block.opcodes]
        registers, stack, shared = map(int, usage[mangled])
        # From compute capability 9.0 on, what CUDA takes for itself is counted where there is any.
        shared = max(0, shared - 1024) if float(arch) >= 9 else shared
        kernels.append(
            Kernel(
                arch=arch,
                name=name,
                registers=registers,
                shared=shared,
                stack=stack,
                local_loads=sum(opcode.startswith("LDL") for opcode in opcodes),
                local_stores=sum(opcode.startswith("STL") for opcode in opcodes),
                instructions=len(opcodes),
                loops=loops_of(blocks, labels),
            )
        )
    return kernels


# --- Files, in parallel, and what was read before


def to_json(kernels: list[Kernel]) -> str:
    return json.dumps([dataclasses.asdict(kernel) for kernel in kernels])


def from_json(text: str) -> list[Kernel]:
    """The inverse: JSON's keys are strings."""

    def number(key: str) -> int | str:
        return int(key) if key.isdigit() else key

    def loaded(pairs: list[tuple[str, object]]) -> dict[int | str, object]:
        return {number(key): value for key, value in pairs}

    kernels = json.loads(text, object_pairs_hook=loaded)
    return [Kernel(**{**k, "loops": [Loop(**loop) for loop in k["loops"]]}) for k in kernels]


def read_cached(cubin: Path) -> list[Kernel]:
    readers = (Path(__file__), Path(control_flow.__file__))
    content = hashlib.sha256(b"".join(path.read_bytes() for path in (cubin, *readers)))
    cached = CACHE / f"{content.hexdigest()[:24]}.json"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(f".{os.getpid()}")
        unfinished.write_text(to_json(read_cubin(cubin)))
        unfinished.replace(cached)
    cached.touch()
    return from_json(cached.read_text())


def prune_cache(keep: int = 400) -> None:
    files = sorted(CACHE.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[keep:]:
        path.unlink(missing_ok=True)


def read(*paths: Path) -> list[Kernel]:
    """The kernels of libraries, objects and cubins, for each architecture there is code for."""
    with tempfile.TemporaryDirectory() as temporary:
        cubins = []
        for at, path in enumerate(paths):
            if path.suffix == ".cubin":
                cubins.append(path)
                continue
            folder = Path(temporary, str(at))
            folder.mkdir()
            done = subprocess.run(
                [tool("cuobjdump"), "-xelf", "all", path.resolve()],
                cwd=folder, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode and "does not contain device code" not in done.stdout + done.stderr:
                raise RuntimeError(f"{path}: {done.stdout}{done.stderr}")
            cubins += sorted(folder.glob("*.cubin"))
        # spawn: the caller may have threads (torch's), which fork would not survive.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(os.cpu_count() or 1, len(cubins) or 1), context) as pool:
            found = [kernel for kernels in pool.map(read_cached, cubins) for kernel in kernels]
    prune_cache()
    return sorted(found, key=lambda k: (float(k.arch), k.name))


def extension() -> Path:
    """The built bnext._C."""
    built = sorted((ROOT / "bnext").glob("_C*.so"))
    if not built:
        raise FileNotFoundError("bnext is not built: make .venv/built")
    return built[0]


def describe(kernel: Kernel) -> str:
    lines = [
        f"{kernel.arch:>4} {kernel.name}: {kernel.instructions} instructions, "
        f"{kernel.registers} registers, {kernel.shared} B shared, {kernel.stack} B stack, "
        f"{kernel.local_loads}/{kernel.local_stores} local loads/stores"
    ]
    for loop in kernel.streaming_loops:
        counts = {
            "LDG": loop.global_loads,
            "STG": loop.global_stores,
            "LDS": loop.shared_loads,
            "STS": loop.shared_stores,
        }
        listed = [f"{n} {kind}.{b}" for kind, c in counts.items() for b, n in c.items()]
        lines.append(
            f"     loop at 0x{loop.address:x}: {loop.instructions} instructions, "
            f"{loop.maths} of them maths, {loop.double_maths} in double, {', '.join(listed)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the machine code of CUDA kernels holds.")
    parser.add_argument("paths", nargs="*", type=Path, help="default: the built extension")
    for kernel in read(*(parser.parse_args().paths or [extension()])):
        print(describe(kernel))


if __name__ == "__main__":
    main()
