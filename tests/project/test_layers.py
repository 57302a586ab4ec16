"""The layer rules of docs/design.md, read off the #include and import lines.

core/ knows nothing of torch, kernels know no tensor, and every arrow points one way: that is what
lets the same core run in CPU code, in CUDA code and in an executor without a GPU.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
STANDARD = re.compile(r"[a-z_0-9]+")  # <cstdint>, <vector>, ...: no folder and no suffix
CUDA_HEADERS = re.compile(
    r"cuda[a-z_0-9]*\.h(pp)?|vector_types\.h|device_[a-z_]+\.h|math_constants\.h|"
    r"cooperative_groups(\.h|/.*)|(cuda|nv)/.*|sm_[a-z0-9_]+\.h"
)
NUMBER_TYPES = re.compile(r"c10/util/(BFloat16|Half)(-inl)?\.h")
TORCH = re.compile(r"(ATen|torch|c10|caffe2|pybind11)/.*|Python\.h")
# Where a tensor may appear, beside the files that lie in csrc/ itself (checks, schemas).
TENSOR_FILES = re.compile(
    r"ops/.*|cpu/(.*_cpu\.(cpp|h)|dispatch\.cpp|tensors\.h|team\.h)|cuda/(.*_cuda\.(cu|cpp|h)|.*\.cu)"
)


def sources(csrc: Path) -> list[Path]:
    suffixes = {".h", ".hpp", ".cpp", ".cu", ".cuh"}
    return sorted(p for p in csrc.rglob("*") if p.suffix in suffixes)


def includes(path: Path) -> list[tuple[str, str]]:
    """(bracket, name) of every #include, also of those that a preprocessor condition hides."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return INCLUDE.findall(text)


def own_includes(path: Path, csrc: Path) -> list[Path]:
    """The project's own headers that `path` includes: quoted, relative to it or to csrc/."""
    found = []
    for bracket, name in includes(path):
        candidates = [(path.parent / name).resolve(), (csrc / name).resolve()]
        found += [c for c in candidates[: 2 if bracket == '"' else 0] if c.is_file()][:1]
    return found


def external_includes(path: Path, csrc: Path) -> list[str]:
    own = {c.name for c in own_includes(path, csrc)}
    return [name for b, name in includes(path) if b == "<" or Path(name).name not in own]


def closure(start: Iterable[Path], csrc: Path) -> set[Path]:
    todo, seen = list(start), set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += own_includes(path, csrc)
    return seen


def layer_violations(csrc: Path) -> list[str]:
    csrc = csrc.resolve()
    found = []

    def name_of(path: Path) -> str:
        return path.relative_to(csrc).as_posix() if path.is_relative_to(csrc) else str(path)

    def check(paths: Iterable[Path], folders: tuple[str, ...], external: re.Pattern[str]) -> None:
        """`paths` include only files of `folders` and headers that are standard or `external`."""
        for path in sorted(paths):
            for own in own_includes(path, csrc):
                if not name_of(own).startswith(folders):
                    found.append(f"{name_of(path)} includes {name_of(own)}")
            for name in external_includes(path, csrc):
                if not STANDARD.fullmatch(name) and not external.fullmatch(name):
                    found.append(f"{name_of(path)} includes <{name}>")

    nothing = re.compile(r"(?!)")
    every = sources(csrc)
    check((p for p in every if name_of(p).startswith("core/")), ("core/",), nothing)

    # The kernels and everything they pull in, whatever its name: none may see a tensor.
    kernels = [p for p in every if re.fullmatch(r"cpu/kernels.*", name_of(p))]
    pulled = {p for p in closure(kernels, csrc) if not name_of(p).startswith("core/")}
    vec = re.compile(rf"ATen/cpu/vec/.*|{NUMBER_TYPES.pattern}")
    check(pulled, ("core/", "cpu/"), vec)

    device = [p for p in every if re.fullmatch(r"cuda/(.*\.cuh|launch_config\.h)", name_of(p))]
    pulled = {p for p in closure(device, csrc) if not name_of(p).startswith("core/")}
    check(pulled, ("core/", "cuda/"), CUDA_HEADERS)

    for path in every:
        name = name_of(path)
        folder = name.split("/")[0]
        for own in own_includes(path, csrc):
            target = name_of(own).split("/")[0]
            if target in ("cpu", "cuda") and target != folder:
                found.append(f"{name} includes {name_of(own)}: {target}/ is reached by dispatch")
        if "/" in name and not TENSOR_FILES.fullmatch(name):
            found += [
                f"{name} includes <{x}>: tensors belong to the launchers"
                for x in external_includes(path, csrc)
                if TORCH.fullmatch(x) and not vec.fullmatch(x)
            ]
        if path.suffix == ".cu" and "torch/extension.h" in external_includes(path, csrc):
            found.append(f"{name} includes torch/extension.h: minutes of nvcc")
        for bracket, include in includes(path):
            if bracket == '"' and not TORCH.fullmatch(include):
                beside = (path.parent / include, csrc / include)
                if not any(b.is_file() for b in beside):
                    found.append(f'{name} includes "{include}", which does not exist')
    return list(dict.fromkeys(found))


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every node that can reach itself, with the way back."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> None:
        if node in trail:
            found.append([*trail[trail.index(node) :], node])
        elif node not in done:
            for target in sorted(graph.get(node, ())):
                visit(target, [*trail, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])
    return found


def include_graph(csrc: Path) -> dict[str, set[str]]:
    csrc = csrc.resolve()
    return {str(p): {str(o) for o in own_includes(p, csrc)} for p in sources(csrc)}


def long_files(root: Path) -> list[str]:
    patterns = ("csrc/**/*", "bnext/**/*.py", "tests/**/*.py", "tests/**/*.cpp", "tests/**/*.h")
    found = []
    for path in sorted({p for pattern in patterns for p in root.glob(pattern) if p.is_file()}):
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES:
            found.append(f"{path.relative_to(root)} has {lines} lines, more than {MAX_LINES}")
    return found


# --- Python: modules -> functional -> autograd -> ops -> torch.ops.bnext

# A module may import those of a smaller rank. What is not listed (demo, cli, ...) stands above.
RANK = {"activations": -1, "_C": 0, "_build_info": 0, "_version": 0, "compat": 0, "reference": 0,
        "ops": 1, "autograd": 2, "functional": 3, "unfused": 3, "running_stats": 4, "modules": 5,
        "registries": 6, "conversion": 7, "training": 8}  # fmt: skip
TOP = 9


def imported(path: Path, package: str = "bnext") -> Iterator[str]:
    """Names of the package's own modules that a file imports, at the top or inside a function."""

    def own(module: str, names: list[str]) -> list[str]:
        if module == package:
            return names
        return [module.removeprefix(f"{package}.").partition(".")[0]] * module.startswith(
            f"{package}."
        )

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from own(alias.name, [])
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                yield from own(f"{package}.{node.module}" if node.module else package, names)
            else:
                yield from own(node.module or "", names)


def python_violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.glob("*.py")):
        if path.stem == "__init__":
            continue
        rank = RANK.get(path.stem, TOP)
        for name in imported(path, package.name):
            if rank < TOP and RANK.get(name, TOP) >= rank:
                found.append(f"{path.name} imports {name}")
    return found


def python_graph(package: Path, name: str = "bnext") -> dict[str, set[str]]:
    files = {p.stem: p for p in package.glob("*.py") if p.stem != "__init__"}
    return {stem: set(imported(p, name)) & files.keys() for stem, p in files.items()}


def test_includes_point_one_way() -> None:
    assert len(sources(ROOT / "csrc")) > 10, "the sources have moved: this test reads nothing"
    assert layer_violations(ROOT / "csrc") == []


def test_no_include_cycles() -> None:
    assert cycles(include_graph(ROOT / "csrc")) == []


def test_no_long_files() -> None:
    assert long_files(ROOT) == []


def test_python_imports_point_one_way() -> None:
    present = {p.stem for p in (ROOT / "bnext").glob("*.py")}
    assert present >= {"ops", "autograd", "functional", "modules", "reference"}
    assert python_violations(ROOT / "bnext") == []
    assert cycles(python_graph(ROOT / "bnext")) == []
    assert cycles(python_graph(ROOT / "bnext" / "conversion", "bnext.conversion")) == []


def test_import_loads_nothing_that_measures_or_prints() -> None:
    code = "import sys, torch; old = {*sys.modules}; import bnext; print(*{*sys.modules} - old)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not [n for n in loaded if n.startswith(("bnext.measure", "bnext.demo", "bnext.cli"))]
    others = {name.partition(".")[0] for name in loaded}
    assert not others & {"rich", "typer", "matplotlib", "timeit", "pandas", "sklearn"}


# --- The checker itself, on trees with one planted fault


CLEAN = {
    "csrc/core/welford.h": "#include <cmath>\n#include <cstdint>\n",
    "csrc/core/normalize.h": '#include "welford.h"\n',
    "csrc/cpu/kernels.h": '#include <c10/util/Half.h>\n#include "../core/welford.h"\n',
    "csrc/cpu/pack.h": '#include <ATen/cpu/vec/vec.h>\n#include "kernels.h"\n',
    "csrc/cpu/kernels_impl.h": '#include "pack.h"\n#include "../core/normalize.h"\n',
    "csrc/cpu/kernels_avx2.cpp": '#include "kernels_impl.h"\n',
    "csrc/cpu/forward_cpu.cpp": '#include <ATen/core/Tensor.h>\n#include "../checks.h"\n'
    '#include "kernels.h"\n',
    "csrc/cuda/launch_config.h": "#include <cstdint>\n",
    "csrc/cuda/kernels.cuh": '#include <cuda_fp16.h>\n#include "launch_config.h"\n',
    "csrc/cuda/fold_cuda.cu": '#include <ATen/core/Tensor.h>\n#include "kernels.cuh"\n',
    "csrc/checks.h": '#include <ATen/core/Tensor.h>\n#include "core/welford.h"\n',
    "csrc/ops/forward.cpp": '#include <ATen/core/Tensor.h>\n#include "../checks.h"\n',
    "csrc/library.cpp": '#include <torch/library.h>\n#include "checks.h"\n',
    "bnext/reference.py": "import torch\n",
    "bnext/ops.py": "import torch\nfrom . import _C\n",
    "bnext/autograd.py": "from . import ops\nfrom .reference import x\n",
    "bnext/functional.py": "from bnext.autograd import apply\n",
    "bnext/modules.py": "import bnext.functional\nfrom . import functional as F\n",
    "bnext/cli.py": "from . import modules\n",
}

FAULTS = {
    "core includes torch": ("csrc/core/welford.h", "#include <ATen/core/Tensor.h>"),
    "core includes c10": ("csrc/core/welford.h", "#include <c10/util/Half.h>"),
    "core includes cpu": ("csrc/core/normalize.h", '#include "../cpu/kernels.h"'),
    "core includes CUDA": ("csrc/core/welford.h", "#  include <cuda_runtime.h>"),
    "kernel includes a tensor": ("csrc/cpu/kernels_avx2.cpp", "#include <ATen/ATen.h>"),
    "kernel sees a tensor through a header": ("csrc/cpu/pack.h", "#include <ATen/core/Tensor.h>"),
    "kernel includes checks": ("csrc/cpu/kernels_impl.h", '#include "../checks.h"'),
    "kernel includes the wrong c10": ("csrc/cpu/kernels.h", "#include <c10/core/ScalarType.h>"),
    "cpu includes cuda": ("csrc/cpu/forward_cpu.cpp", '#include "../cuda/launch_config.h"'),
    "library includes cpu": ("csrc/library.cpp", '#include "cpu/kernels.h"'),
    "an op includes cuda": ("csrc/ops/forward.cpp", '#include "../cuda/launch_config.h"'),
    "device code includes torch": ("csrc/cuda/kernels.cuh", "#include <ATen/core/Tensor.h>"),
    "launch_config includes c10": ("csrc/cuda/launch_config.h", "#include <c10/util/Half.h>"),
    "torch/extension.h in a .cu": ("csrc/cuda/fold_cuda.cu", "#include <torch/extension.h>"),
    "a header that does not exist": ("csrc/checks.h", '#include "missing.h"'),
    "include cycle": ("csrc/core/welford.h", '#include "normalize.h"'),
    "long file": ("csrc/core/welford.h", "//\n" * MAX_LINES),
    "long test": ("tests/test_x.py", "#\n" * (MAX_LINES + 1)),
    "ops imports autograd": ("bnext/ops.py", "from .autograd import apply"),
    "autograd imports functional": ("bnext/autograd.py", "import bnext.functional"),
    "reference imports ops": ("bnext/reference.py", "def f():\n    from . import ops"),
    "functional imports modules": ("bnext/functional.py", "from . import modules"),
    "functional imports the cli": ("bnext/functional.py", "from bnext import cli"),
}


def plant(root: Path, extra: tuple[str, str] | None = None) -> list[str]:
    files = dict(CLEAN)
    if extra:
        files[extra[0]] = files.get(extra[0], "") + extra[1] + "\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = layer_violations(root / "csrc") + python_violations(root / "bnext") + long_files(root)
    for graph in (include_graph(root / "csrc"), python_graph(root / "bnext")):
        found += [" -> ".join(c) for c in cycles(graph)]
    return found


def test_the_checker_passes_a_clean_tree(tmp_path: Path) -> None:
    assert plant(tmp_path) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_finds_a_planted_fault(fault: str, tmp_path: Path) -> None:
    assert plant(tmp_path, FAULTS[fault]), fault
