"""``bnext.convert``, ``bnext.revert`` and what they report."""

from __future__ import annotations

import copy

from torch import fx, nn

from bnext.conversion.classes import become, restore
from bnext.conversion.norms import to_bnext, to_plain
from bnext.conversion.plan import FusionPlan
from bnext.conversion.report import ConversionReport
from bnext.conversion.verify import Inputs, verify
from bnext.functional import check_ghost_batch_size
from bnext.registries import register

_REPORT = "_bnext_report"  # in the __dict__ of a converted model


def convert(
    model: nn.Module,
    *,
    ghost_batch_size: int | None = None,
    inplace: bool = False,
    example_inputs: Inputs | None = None,
) -> nn.Module:
    """Replaces ``nn.BatchNorm1d/2d/3d`` and ``nn.SyncBatchNorm`` by bnext's layers, and fuses their
    calls with the residual addition and the activation that follow.

    A norm, by itself, computes after it what it did before. Where the ``forward`` of the module
    that calls it goes on with an addition, a ReLU, ReLU6, SiLU or LeakyReLU (modules or functions,
    in place or not), and does nothing in between that could matter, that place of the ``forward``
    asks for all at once; so does an ``nn.Sequential``. The rest of a ``forward`` runs as written.
    What a model computes stays, to rounding, and so do parameters, buffers, names, ``state_dict``
    keys, all modules and their hooks, training flags, dtypes, devices, and classes (for
    ``isinstance``). pytorch-tabnet's ``GBN`` becomes one layer with ghosts.

    Args:
        model: any module, on any device.
        ghost_batch_size: of every new layer, see :class:`bnext.BatchNorm2d`; if given, also of the
            layers that were bnext's.
        inplace: change ``model`` itself rather than a deep copy.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments of
            ``model``. If given, copies of both models are run with them, in training and in eval,
            and compared before anything is changed: outputs, gradients, buffers, random numbers.
            (Without ghosts, which are to change training.) It takes four to six runs of each.

    Returns:
        The converted model. :func:`conversion_report` tells what was fused, and why not.

    Raises:
        TypeError: ``model`` is not a module, or ``ghost_batch_size`` not an int.
        ValueError: ``ghost_batch_size`` is not positive.
        RuntimeError: the models differ on ``example_inputs``; the message names the first layer
            that does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_ghost_batch_size(ghost_batch_size)
    if example_inputs is not None:
        verify(model, _converted(copy.deepcopy(model), None), example_inputs)
    return _converted(model if inplace else copy.deepcopy(model), ghost_batch_size)


def _converted(model: nn.Module, ghost_batch_size: int | None) -> nn.Module:
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            restore(module)  # its code is read anew
    plan = FusionPlan(model)  # nothing is changed before all is known
    for norm in plan.norms:
        to_bnext(norm, plan.ghosts.get(norm, ghost_batch_size))
    for container, recipe in plan.recipes.items():
        become(container, recipe)
    vars(model)[_REPORT] = plan.report
    register()
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
    """The plain model of a converted one: ``nn.BatchNorm*d``, and forwards as they were.

    Also ``bnext.BatchNorm*d`` that were never converted become ``nn.BatchNorm*d``; their ghost
    batches are lost. ``bnext.BatchNormAct*d`` stay.

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
        to_plain(module)
        restore(module)
    return model
