"""Whether setup.py builds for CUDA, with which toolkit, and what it says: decided by functions.
And the versions of Python and torch that pyproject.toml promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import bnext
from bnext import _build_info
from tools import extras
from tools.cuda_build import Toolkit, arch_flags, decide, find_toolkits, link_cudart, wheels_folder

ROOT = Path(__file__).parents[2]
CUDA_12 = Toolkit(Path("/twelve"), "12.8", "PATH")
CUDA_13 = Toolkit(Path("/wheels"), "13.0", "the wheel nvidia-cuda-nvcc")
CUDA_13_2 = Toolkit(Path("/home"), "13.2", "CUDA_HOME")


def make_nvcc(home: Path, version: str) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize(
    ("toolkits", "chosen", "reason"),
    [
        ([CUDA_13], CUDA_13, "toolkit 13.0 of the wheel nvidia-cuda-nvcc"),
        ([CUDA_13_2, CUDA_13], CUDA_13_2, "toolkit 13.2 of CUDA_HOME"),
        ([CUDA_12, CUDA_13], CUDA_13, "toolkit 13.0 of the wheel nvidia-cuda-nvcc"),
        ([CUDA_12], None, "torch 2.14.1 needs a CUDA 13 toolkit, found only 12.8 of PATH"),
        (
            [],
            None,
            "torch 2.14.1 needs a CUDA 13 toolkit, found none: "
            "no CUDA_HOME, no wheel nvidia-cuda-nvcc, no nvcc on PATH",
        ),
    ],
)
@pytest.mark.parametrize("force", [None, "", "1"])
def test_toolkit_of_the_same_major_version_is_needed(
    toolkits: list[Toolkit], chosen: Toolkit | None, reason: str, force: str | None
) -> None:
    if force == "1" and chosen is None:
        with pytest.raises(SystemExit, match=f"^BNEXT_CUDA=1, but {reason}$"):
            decide("2.14.1", "13.0", toolkits, force)
    else:
        assert decide("2.14.1", "13.0", toolkits, force) == (chosen, reason)


def test_torch_without_cuda() -> None:
    reason = "torch 2.13.0+cpu is not a CUDA build"
    assert decide("2.13.0+cpu", None, [CUDA_13], None) == (None, reason)
    with pytest.raises(SystemExit, match="BNEXT_CUDA=1, but torch 2.13.0.cpu is not a CUDA build"):
        decide("2.13.0+cpu", None, [CUDA_13], "1")


def test_cuda_switched_off() -> None:
    assert decide("2.14.1", "13.0", [CUDA_13], "0") == (None, "BNEXT_CUDA=0")


def test_a_third_value_is_refused() -> None:
    with pytest.raises(SystemExit, match="BNEXT_CUDA must be 0 or 1, not 'yes'"):
        decide("2.14.1", "13.0", [CUDA_13], "yes")


def test_toolkits_are_found_in_order(tmp_path: Path) -> None:
    for place, version in (("home", "13.2"), ("wheels", "13.0"), ("system", "12.8")):
        make_nvcc(tmp_path / place, version)
    environ = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "system" / "bin")}
    assert find_toolkits(environ, tmp_path / "wheels") == [
        Toolkit(tmp_path / "home", "13.2", "CUDA_HOME"),
        Toolkit(tmp_path / "wheels", "13.0", "the wheel nvidia-cuda-nvcc"),
        Toolkit(tmp_path / "system", "12.8", "PATH"),
    ]


def test_a_broken_or_missing_nvcc_is_no_toolkit(tmp_path: Path) -> None:
    make_nvcc(tmp_path / "silent", "13.0").write_text("#!/bin/sh\n")
    environ = {"CUDA_HOME": str(tmp_path / "silent"), "PATH": str(tmp_path)}
    assert find_toolkits(environ, tmp_path / "wheels") == []


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        ("9.0", ["-gencode=arch=compute_80,code=[sm_90]"]),
        ("8.0;8.6 9.0+PTX", ["-gencode=arch=compute_80,code=[sm_80,sm_86,sm_90,compute_80]"]),
        ("7.5", ["-gencode=arch=compute_75,code=[sm_75]"]),
        ("7.5;12.0", ["-gencode=arch=compute_75,code=[sm_75]",
                      "-gencode=arch=compute_80,code=[sm_120]"]),
        ("Hopper", []),
        ("9.0a", []),
    ],
)  # fmt: skip
def test_code_of_ampere_and_later_is_made_from_amperes_ptx(wanted: str, flags: list[str]) -> None:
    """From Hopper's own, kernels of bfloat16 spill. What is no number is torch's to read."""
    assert arch_flags({"TORCH_CUDA_ARCH_LIST": wanted}) == (flags, wanted)


def test_wheels_lie_beside_torch() -> None:
    assert wheels_folder(Path("/site/torch"), "13.0") == Path("/site/nvidia/cu13")


def test_cudart_gets_the_name_that_the_linker_asks_for(tmp_path: Path) -> None:
    assert link_cudart(tmp_path / "none", tmp_path / "link") == []
    library = tmp_path / "lib" / "libcudart.so.13"
    library.parent.mkdir()
    library.touch()
    for _ in range(2):  # also over the link of the build before
        assert link_cudart(tmp_path, tmp_path / "link") == [str(tmp_path / "link")]
    assert (tmp_path / "link" / "libcudart.so").resolve() == library


def test_the_extra_pins_one_version_of_the_toolchain() -> None:
    wanted = extras.requirements(["cuda"])
    assert len(wanted) == 4
    assert {requirement.split("==")[1] for requirement in wanted} == {"13.0.*"}


def test_every_source_is_of_the_oldest_python() -> None:
    """In its syntax; what runs these tests may be newer."""
    promised = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert promised
    patterns = ("setup.py", "bnext/**/*.py", "tests/**/*.py", "tools/*.py", "benchmarks/*.py")
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert len(paths) > 100, "the sources have moved: this test reads nothing"
    for path in paths:
        ast.parse(path.read_text(), str(path), feature_version=(3, int(promised[1])))


def test_the_oldest_torch_is_what_ci_runs() -> None:
    pinned = (ROOT / "requirements" / "oldest.txt").read_text().strip()
    floors = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert len(floors) == 2
    assert {f"torch=={floor}.0" for floor in floors} == {pinned}


@pytest.mark.parametrize("cuda", [False, True])
def test_show_config_says_what_was_built(
    cuda: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = {"cuda": cuda, "cuda_reason": "why", "cuda_toolkit": "13.0", "cuda_archs": "8.0;9.0+PTX"}
    for name, value in info.items():
        monkeypatch.setattr(_build_info, name, value)
    bnext.show_config()
    printed = capsys.readouterr().out
    assert f"CUDA: {'yes' if cuda else 'no'} (why)" in printed
    assert ("GPU architectures: 8.0, 9.0+PTX" in printed) == cuda
