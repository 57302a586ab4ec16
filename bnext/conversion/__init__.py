"""``bnext.convert`` and its kin: a model's batch norms become bnext's, and nothing else changes.

A norm changes its class and stays what it is to everybody who calls it. What is fused is a *call*:
a ``forward`` that adds to a norm's output, or activates it, is edited at that place to ask for all
at once (``chains.py``, ``editing.py``), and decides as it runs whether that is still the same
function (``calls.py``). The rest of it stays as it is written.
"""

from bnext.conversion.convert import conversion_report, convert, revert
from bnext.conversion.folding import fold
from bnext.conversion.norms import is_batch_norm
from bnext.conversion.report import ConversionReport, Entry

__all__ = [
    "ConversionReport",
    "Entry",
    "conversion_report",
    "convert",
    "fold",
    "is_batch_norm",
    "revert",
]
