"""``python -m tools.gpu_run.pack FILE``: what the stage "build" makes, built here in place for a
machine with the same torch and Python, as an archive for ``tools.gpu_run --prebuilt``."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Annotated

import typer

from tools.gpu_run.build import CONTENTS, ROOT, build, check


def main(
    file: Annotated[Path, typer.Argument(help="The archive, such as bnext-gpu.tar.gz.")],
) -> None:
    """Build and pack. TORCH_CUDA_ARCH_LIST says for which GPU, where there is none."""
    build(rehearse=False)
    check()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as archive:
        for path in CONTENTS:
            archive.add(path, path.relative_to(ROOT))
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
