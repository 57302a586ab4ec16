"""The kernels need no torch: a plain CUDA program launches all of them (simt/standalone.cu)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import simt_build
import torch
from conftest import cuda_missing

from tools import cuda_build

SOURCE = simt_build.SIMT / "standalone.cu"
CSRC = simt_build.ROOT / "csrc"
HEADERS = [SOURCE.with_suffix(".h"), *sorted(CSRC.glob("c*/*.h")), *sorted(CSRC.glob("cuda/*.cuh"))]


def run(program: Path) -> None:
    result = subprocess.run([program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr


@pytest.mark.parametrize("seed", [0, 1])
def test_executed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if simt_build.cuda_include() is None:
        pytest.skip("no cuda_fp16.h: the wheels of CUDA are not installed")
    monkeypatch.setenv("BNEXT_SIMT_SEED", str(seed))
    run(simt_build.program("standalone", [SOURCE], ["-Wno-unknown-pragmas"], HEADERS))


def toolkit() -> cuda_build.Toolkit | None:
    wheels = cuda_build.wheels_folder(Path(torch.__file__).parent, torch.version.cuda)
    return next(iter(cuda_build.find_toolkits(os.environ, wheels)), None)


def test_built_by_nvcc(tmp_path: Path) -> None:
    """And run, where there is a GPU. One architecture is enough here: the extension's own build
    has all."""
    found = toolkit()
    if found is None:
        pytest.skip("no nvcc: neither CUDA_HOME nor the wheel nvidia-cuda-nvcc nor one on PATH")
    missing = cuda_missing()
    arch = "8.0" if missing else "{}.{}".format(*torch.cuda.get_device_capability())
    program = tmp_path / "standalone"
    command = cuda_build.standalone_command(found, arch, SOURCE, program)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    if not missing:
        run(program)
