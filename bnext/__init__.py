"""bnext: fused BatchNorm + activation (+ residual) for PyTorch, right at every offset."""

from bnext import reference, registries
from bnext._version import __version__
from bnext.config import show_config
from bnext.conversion import conversion_report, convert, fold, is_batch_norm, revert
from bnext.functional import batch_norm
from bnext.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
)
from bnext.training import (
    accumulate,
    convert_sync,
    freeze,
    param_groups,
    skip_nonfinite,
    unfreeze,
    update_bn,
)

registries.register()

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "__version__",
    "accumulate",
    "batch_norm",
    "conversion_report",
    "convert",
    "convert_sync",
    "fold",
    "freeze",
    "is_batch_norm",
    "param_groups",
    "reference",
    "revert",
    "show_config",
    "skip_nonfinite",
    "unfreeze",
    "update_bn",
]
