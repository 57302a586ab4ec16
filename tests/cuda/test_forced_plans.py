"""Every kind of launch on any GPU, at small sizes, against float64: the launches are planned for
GPUs from "everything fits on chip" to "nothing does" (executor.GPUS)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import executor
import op_samples
import pytest
from cases import DTYPES, Case, Mode
from conftest import devices
from executor import GPUS
from layers import make_layer
from oracle import assert_matches_torch

# Planes and rows; lines that begin on a vector's boundary and lines that do not; a tensor one
# element off every boundary; a multiple of no vector; one line a channel.
LAYOUTS = (
    ((33, 13), "contiguous"),
    ((40, 64), "contiguous"),
    ((700, 64), "contiguous"),
    ((700, 64), "offset"),
    ((12, 13, 7, 7), "contiguous"),
    ((6, 5, 24, 24), "contiguous"),
    ((6, 5, 24, 24), "offset"),
    ((9, 3, 40, 41), "contiguous"),
    ((9, 16, 24, 24), "channels_last"),
    ((9, 13, 24, 24), "channels_last"),
    ((5, 1, 50, 50), "contiguous"),
)
CASES = tuple(
    Case(shape, layout, dtype, param_dtype)
    for shape, layout in LAYOUTS
    for dtype, param_dtype in (DTYPES[0], DTYPES[1], DTYPES[3], DTYPES[5])
)
# Activation, residual, ghosts.
STEPS = ((None, False, 1), ("relu", False, 1), ("relu", True, 1), ("silu", True, 3))


def drawn(gpu: str, case: Case, n: int) -> int:
    return zlib.crc32(f"{case} {gpu}".encode()) % n


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On CUDA everything; on the executor, which takes long, a half."""
    triples = [
        (device, gpu, case)
        for device in devices(metafunc.config)
        for gpu in GPUS
        for case in CASES
        if device == "cuda" or (device == "executor" and drawn(gpu, case, 2))
    ]
    ids = [f"{case}-{gpu}-{device}" for device, gpu, case in triples]
    metafunc.parametrize(("planned", "gpu", "case"), triples, indirect=["planned"], ids=ids)


@pytest.fixture
def planned(request: pytest.FixtureRequest, gpu: str) -> Iterator[str]:
    """The device, cuda or that of the executor's tensors."""
    if request.param == "cuda":
        with executor.limited_to(GPUS[gpu]):
            yield "cuda"
        return
    with executor.running_on(GPUS[gpu]) as library, op_samples.using("cpu", library):
        yield "cpu"


def test_forced_plan(case: Case, gpu: str, planned: str) -> None:
    steps, modes = STEPS, (True, False)
    if planned == "cpu":
        steps, modes = (STEPS[drawn(gpu, case, 64) // 2 % len(STEPS)],), (True,)
    for activation, residual, ghosts in steps:
        size = -(-case.shape[0] // ghosts) if ghosts > 1 else None
        for training in modes:
            layer = make_layer(
                case, training=training, act=True, activation=activation,
                ghost_batch_size=size, device=planned,
            )  # fmt: skip
            assert_matches_torch(
                layer, case, Mode(), activation=activation, with_residual=residual,
                ghost_batch_size=size, device=planned,
            )  # fmt: skip
