"""Registers bnext's layers with libraries that look a module up by its exact class."""

import sys

from torch import nn

from bnext import modules

_NORMS = {
    modules.BatchNorm1d: nn.BatchNorm1d,
    modules.BatchNorm2d: nn.BatchNorm2d,
    modules.BatchNorm3d: nn.BatchNorm3d,
    modules.SyncBatchNorm: nn.SyncBatchNorm,
}
_NORMS_WITH_ACTIVATION = {
    modules.BatchNormAct1d: nn.BatchNorm1d,
    modules.BatchNormAct2d: nn.BatchNorm2d,
    modules.BatchNormAct3d: nn.BatchNorm3d,
}


def register() -> None:
    """With those that are imported by now; what others registered stays.

    Opacus: batch norm mixes samples, and its validator must find it; its fixer puts other layers in
    the place of batch norms, but would drop an activation.
    """
    opacus = sys.modules.get("opacus.validators.module_validator")
    if opacus is None:
        return
    validators, fixers = opacus.ModuleValidator.VALIDATORS, opacus.ModuleValidator.FIXERS
    for layer, plain in (*_NORMS.items(), *_NORMS_WITH_ACTIVATION.items()):
        if plain in validators:
            validators.setdefault(layer, validators[plain])
    for layer, plain in _NORMS.items():
        if plain in fixers:
            fixers.setdefault(layer, fixers[plain])
