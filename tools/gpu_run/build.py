"""Stage "build": the extension, in place, for the GPU at hand alone; and the standalone program.

``--prebuilt FILE`` takes both from an archive made earlier by ``python -m tools.gpu_run.pack`` for
the same torch and Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from tools import cuda_build
from tools.gpu_run.records import record
from tools.gpu_run.stages import ROOT

STANDALONE = ROOT / "build" / "gpu" / "standalone"
INFO = ROOT / "bnext" / "_build_info.py"
EXTENSION = ROOT / "bnext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
CONTENTS = [EXTENSION, INFO, STANDALONE]
_SLOWEST = 12  # files of the build whose seconds are told
_DEFAULT_ARCH = "9.0"  # without a GPU: that of an H100 or H200


def architecture() -> str:
    """In TORCH_CUDA_ARCH_LIST's form."""
    if not torch.cuda.is_available():
        return os.environ.get("TORCH_CUDA_ARCH_LIST", _DEFAULT_ARCH)
    return "{}.{}".format(*torch.cuda.get_device_capability())


def toolkit() -> cuda_build.Toolkit | None:
    wheels = cuda_build.wheels_folder(Path(torch.__file__).parent, torch.version.cuda)
    found = cuda_build.find_toolkits(os.environ, wheels)
    return cuda_build.decide(torch.__version__, torch.version.cuda, found, None).toolkit


def seconds_per_file(log: Path) -> dict[str, float]:
    """From ninja's log: begin and end in ms, ..., the file that was made."""
    taken = {}
    for line in log.read_text().splitlines()[1:] if log.exists() else []:
        begin, end, _, made = line.split("\t")[:4]
        taken[Path(made).name] = (int(end) - int(begin)) / 1e3
    return taken


def build(rehearse: bool) -> None:
    arch = architecture()
    settings = {"TORCH_CUDA_ARCH_LIST": arch, "MAX_JOBS": str(os.cpu_count() or 1)}
    record("fact", name="built_for", value=arch)
    started: dict[str, subprocess.Popen[bytes]] = {}
    begin = time.monotonic()
    if found := toolkit():
        source = ROOT / "tests" / "simt" / "standalone.cu"
        STANDALONE.parent.mkdir(parents=True, exist_ok=True)
        compile_it = cuda_build.standalone_command(found, arch, source, STANDALONE)
        started["standalone"] = subprocess.Popen(compile_it)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    started["extension"] = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings})
    if rehearse:
        code = "from tools.gpu_run import stand_in; stand_in.executor().build()"
        started["extension"].wait()  # which the executor's module imports
        started["executor"] = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    failed = []
    for name, process in started.items():
        if process.wait():
            failed.append(name)
        record("fact", name=f"build_{name}_seconds", value=round(time.monotonic() - begin, 1))
    taken = seconds_per_file(ROOT / "build" / "objects" / ".ninja_log")
    for name in sorted(taken, key=lambda name: -taken[name])[:_SLOWEST]:
        record("compiled", file=name, seconds=round(taken[name], 1))
    if failed:
        record("check", name="build", outcome="failed", message=", ".join(failed))
    if set(failed) - {"standalone"}:  # which one stage alone asks for
        raise SystemExit(f"not built: {', '.join(failed)}")


def unpack(prebuilt: Path) -> None:
    """Raises SystemExit where the archive is of another torch or Python."""
    with tarfile.open(prebuilt) as archive:
        names = archive.getnames()
        extension = str(EXTENSION.relative_to(ROOT))
        if extension not in names:
            raise SystemExit(f"--prebuilt {prebuilt}: there is no {extension} in it, but {names}")
        info = archive.extractfile(str(INFO.relative_to(ROOT)))
        assert info
        built: dict[str, object] = {}
        exec(info.read().decode(), built)
        if built["torch"] != torch.__version__:
            raise SystemExit(
                f"--prebuilt {prebuilt} was built for torch {built['torch']}, here is "
                f"{torch.__version__}"
            )
        archive.extractall(ROOT, filter="data")
    record("fact", name="prebuilt", value=prebuilt.name)
    record("fact", name="built_for", value=built["cuda_archs"])


def check() -> None:
    """In a process of its own: this one may have imported what was there before."""
    code = "import bnext; bnext.show_config(); import torch; bnext.BatchNorm1d(4)(torch.ones(2, 4))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def main(
    prebuilt: Annotated[Path | None, typer.Option(help="An archive of tools.gpu_run.pack.")] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="The executor too.")] = False,
) -> None:
    """Build in place, or unpack what was built."""
    if prebuilt:
        unpack(prebuilt)
    else:
        build(rehearse)
    check()


if __name__ == "__main__":
    typer.run(main)
