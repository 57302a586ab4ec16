"""The executor of tests/simt, which stands in for a GPU; its module is one of the tests'."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from tools.gpu_run.stages import ROOT


def executor() -> Any:
    """tests/executor.py."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module("executor")
