"""The checks of the kernels pass, also under the sanitizers; the mistakes that they find are in
test_simt_mutants.py."""

from __future__ import annotations

import kernel_checks
import pytest
import simt_build

pytestmark = pytest.mark.skipif(
    simt_build.cuda_include() is None, reason="no cuda_fp16.h: install the CUDA headers' wheel"
)

# Lone blocks and teams, the last block of a ghost and of a tile; every CUDA thread is one of
# ThreadSanitizer's, which is slow.
THREAD_CASES = {
    "forward": "chip_rows team_rows rows_splits rows_ghosts frozen",
    "backward": "chip_rows team_rows rows_splits rows_ghosts frozen",
    "fold": "fold_cumulative",
}


@pytest.mark.parametrize("variant", kernel_checks.VARIANTS)
@pytest.mark.parametrize("program", kernel_checks.PROGRAMS)
def test_clean(program: str, variant: str) -> None:
    arguments = ["--seeds=1", *THREAD_CASES[program].split()] if variant == "thread" else []
    result = kernel_checks.run(kernel_checks.build(program, variant), *arguments)
    assert kernel_checks.verdict(result) == "clean", result.stdout + result.stderr[:4000]
