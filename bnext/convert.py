"""``bnext.convert``: a model's batch norms become bnext's, fused with what follows them.

A norm stays the object that it is, of another class, so that its parameters, buffers, hooks and
name are untouched. Where it is fused, the activation's call goes away in one of two ways: a module
that only follows this norm is replaced by an identity, or the forward that contains both is
rewritten (``rewrite.py``).
"""

from __future__ import annotations

import copy

from torch import nn

from bnext.functional import check_ghost_batch_size
from bnext.fusion_plan import FusionPlan
from bnext.norms import to_bnext, to_plain
from bnext.report import ConversionReport
from bnext.rewrite import original_class

_REPORT = "_bnext_report"  # in the __dict__ of a converted model


def convert(
    model: nn.Module, *, ghost_batch_size: int | None = None, inplace: bool = False
) -> nn.Module:
    """Replaces ``nn.BatchNorm1d/2d/3d`` by bnext's layers, fused with the activation that follows,
    and with the residual addition in between, where that is provably the same function.

    Found by adjacency in ``nn.Sequential``, by following the ``forward`` of the module that
    contains both (ReLU, SiLU and LeakyReLU as modules or functions, in place or not), and in timm's
    ``BatchNormAct2d``; pytorch-tabnet's ``GBN`` becomes one layer with ghosts. Parameters, buffers,
    names, ``state_dict`` keys, hooks, training flags, dtypes, devices, and the classes of all other
    modules (for ``isinstance``) stay. Attributes that a rewritten ``forward`` reads are read now:
    configure the model first.

    Args:
        model: any module, on any device.
        ghost_batch_size: of every new layer, see :class:`bnext.BatchNorm2d`.
        inplace: change ``model`` itself rather than a deep copy.

    Returns:
        The converted model. :func:`conversion_report` tells what was fused, and why not.

    Raises:
        TypeError: ``model`` is not a module, or ``ghost_batch_size`` not an int.
        ValueError: ``ghost_batch_size`` is not positive.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_ghost_batch_size(ghost_batch_size)
    if not inplace:
        model = copy.deepcopy(model)
    plan = FusionPlan(model)  # nothing is changed before all is known
    for norm, activation in plan.norms.items():
        to_bnext(norm, activation, plan.ghosts.get(norm, ghost_batch_size))
    for parent, name in plan.identities:
        parent._modules[name] = FusedActivation(parent.get_submodule(name))
    for container, cls in plan.classes.items():
        container.__class__ = cls
    vars(model)[_REPORT] = plan.report
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What :func:`convert` did with every batch norm of ``model``, which it returned.

    Raises:
        ValueError: ``model`` is not what ``convert`` returned.
    """
    report = vars(model).get(_REPORT)
    if report is None:
        raise ValueError("model was not returned by bnext.convert")
    return report


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The plain model of a converted one: ``nn.BatchNorm*d``, with activations where they were.

    Also ``bnext.BatchNorm*d`` that were never converted become ``nn.BatchNorm*d``; their ghost
    batches are lost. ``bnext.BatchNormAct*d`` that were never converted stay.

    Args:
        model: any module.
        inplace: change ``model`` itself rather than a deep copy.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = copy.deepcopy(model)
    vars(model).pop(_REPORT, None)
    for module in list(model.modules()):
        module.__class__ = original_class(module)
        to_plain(module)
        for name, child in list(module._modules.items()):
            if isinstance(child, FusedActivation):
                module._modules[name] = child.original.train(child.training)
    return model


class FusedActivation(nn.Identity):
    """In the place of an activation that the batch norm before it computes."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple: no submodule
        self.training = original.training

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def extra_repr(self) -> str:
        return f"{self.original}"
