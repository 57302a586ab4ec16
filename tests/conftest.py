"""Options and fixtures of the whole suite: the device, and the number of threads."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator

import executor
import op_samples
import pytest
import simt_build
import torch

import bnext


def cuda_missing() -> str | None:
    """Why the tests cannot run on CUDA here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if not bnext.config.build_info()["cuda"]:
        return f"bnext was built without CUDA: {bnext.config.build_info()['cuda_reason']}"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("auto", "cpu", "cuda", "executor"),
        default="auto",
        help="device of the tests that take one; executor: the CUDA kernels run on the CPU by "
        "tests/simt; auto: cpu, executor, and cuda where there is one",
    )


def pytest_configure(config: pytest.Config) -> None:
    # torch's own batch norm hands a second thread pieces of one element: on a busy machine that
    # costs 20 ms a call, on inputs of a few thousand elements. Tests of threads set their number.
    torch.set_num_threads(1)


def devices(config: pytest.Config) -> list[str]:
    """That --device asks for. Without a CUDA device the suite has no second half of skipped twins:
    one test (test_assertions.py::test_cuda_was_tested) says what is missing."""
    wanted = config.getoption("--device")
    missing = cuda_missing()
    if wanted == "cuda" and missing:
        raise pytest.UsageError(f"--device cuda: {missing}")
    executed = [] if simt_build.cuda_include() is None else ["executor"]
    return {"auto": ["cpu", *executed, *([] if missing else ["cuda"])]}.get(wanted, [wanted])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(metafunc.config), indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a test's tensors. The launches of CUDA kernels are planned for a GPU that each
    test draws by its name: on a real one, too, small tensors take every path then."""
    if request.param == "cpu":
        with op_samples.using("cpu"):
            yield "cpu"
        return
    gpus = list(executor.GPUS.values())
    draw = zlib.crc32(request.node.nodeid.encode())
    gpu, seed = gpus[draw % len(gpus)], draw // len(gpus) % 5
    if request.param == "executor":
        with (
            executor.running_on(gpu, seed) as library,
            op_samples.using("cpu", library),
        ):
            yield "cpu"
        return
    with executor.limited_to(gpu), op_samples.using(request.param):
        yield request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much of the run was CUDA kernels, executed without a GPU."""
    passed = terminalreporter.stats.get("passed", [])
    executed = [r for r in passed if re.search(r"[\[-]executor[-\]]|test_simt_", r.nodeid)]
    if executed:
        terminalreporter.write_line(f"CUDA kernels run by the executor: {len(executed)} tests")
