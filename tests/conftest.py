"""Options and fixtures of the whole suite: the device, and the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
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
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of the tests that take one; auto: cpu, and cuda where there is one",
    )


def pytest_configure(config: pytest.Config) -> None:
    # torch's own batch norm hands a second thread pieces of one element: on a busy machine that
    # costs 20 ms a call, on inputs of a few thousand elements. Tests of threads set their number.
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("--device")
    missing = cuda_missing()
    # Without a CUDA device the suite has no second half of skipped twins: one test
    # (test_assertions.py::test_cuda_was_tested) says what is missing.
    cuda = [] if missing else ["cuda"]
    if wanted == "cuda" and missing:
        raise pytest.UsageError(f"--device cuda: {missing}")
    devices = {"auto": ["cpu", *cuda], "cpu": ["cpu"], "cuda": ["cuda"]}[wanted]
    metafunc.parametrize("device", devices)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
