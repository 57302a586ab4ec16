"""A plug-in of pytest: every test's result goes to the report as it comes, tests end in time."""

from __future__ import annotations

import os
import time
import zlib

import pytest

from tools.gpu_run.records import record

_DEADLINE = "BNEXT_GPU_DEADLINE"  # for the workers of pytest-xdist, which start later
_NO_TIME = "left out: no time"
_MESSAGE = 600  # characters of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu_run")
    group.addoption("--seconds", type=float, help="start no test after so many seconds")
    group.addoption(
        "--only-device", action="store_true", help="leave out the tests that take no device"
    )


class _Reporter:
    """Of the main process, which hears of the tests of all workers."""

    left_out = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        if report.skipped and _NO_TIME in str(report.longrepr):
            self.left_out += 1  # thousands, maybe: told once, at the end
            return
        message = "" if report.passed else str(report.longrepr)[-_MESSAGE:]
        seconds = round(report.duration, 3)
        record("test", id=report.nodeid, outcome=report.outcome, seconds=seconds, message=message)

    def pytest_sessionfinish(self) -> None:
        if self.left_out:
            record("left out", what=[f"{self.left_out} tests"])


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    config.pluginmanager.register(_Reporter(), "gpu_run reporter")
    if seconds := config.getoption("--seconds"):
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
        pytest.skip(_NO_TIME)
