"""A plug-in of pytest: every test's result goes to the report as it comes, tests end in time."""

from __future__ import annotations

import os
import time
import zlib

import pytest

from tools.gpu_run.records import record

_DEADLINE = "BNEXT_GPU_DEADLINE"  # for the workers of pytest-xdist, which start later
_MESSAGE = 600  # characters of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu_run")
    group.addoption("--seconds", type=float, help="start no test after so many seconds")
    group.addoption(
        "--only-device", action="store_true", help="leave out the tests that take no device"
    )


def pytest_configure(config: pytest.Config) -> None:
    seconds = config.getoption("--seconds")
    if seconds and not hasattr(config, "workerinput"):
        os.environ[_DEADLINE] = str(time.time() + seconds)


def _place(item: pytest.Item) -> tuple[bool, int]:
    """gradcheck is slow on a GPU and finds what other tests find: last. Else the files mixed, so
    that all of them have been tried when time is up."""
    return "gradcheck" in item.nodeid, zlib.crc32(item.nodeid.encode())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--only-device"):
        return
    wanted = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(wanted)])
    items[:] = sorted(wanted, key=_place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ.get(_DEADLINE, "inf")):
        pytest.skip("left out: no time")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.passed):
        return  # the main process hears of all
    if report.skipped and "left out: no time" in str(report.longrepr):
        outcome, message = "left out", ""
    else:
        outcome = report.outcome
        message = "" if report.passed else str(report.longrepr)[-_MESSAGE:]
    record("test", id=report.nodeid, outcome=outcome, seconds=round(report.duration, 3),
           message=message)  # fmt: skip
