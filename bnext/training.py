"""What all batch norms of a model do in training: frozen, accumulating, synchronised; and their
parameters in an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import swa_utils

from bnext.conversion import convert, is_batch_norm
from bnext.modules import _FusedBatchNorm, own_parameters
from bnext.running_stats import DEFAULT_GROUP, Accumulation, check_process_group, flush

_NORMALISATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


def freeze(model: nn.Module) -> nn.Module:
    """Makes the batch norms of ``model`` constant: they normalise by the running statistics in
    training too, and neither these nor weight and bias change.

    A frozen layer keeps nothing of its input for backward, its output where an activation is fused
    (relu6 and silu: the input). Returns ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a batch norm is not bnext's, has no running statistics, or there is none.
    """
    layers = dict(_layers(model))
    for name, layer in layers.items():
        if layer.running_mean is None:
            raise ValueError(f"{name or 'model'} has no running statistics to be frozen with")
    for layer in layers.values():
        layer.freeze()
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undoes :func:`freeze`. Returns ``model``.

    Raises:
        TypeError, ValueError: as :func:`freeze`, except for missing running statistics.
    """
    for _, layer in _layers(model):
        layer.unfreeze()
    return model


def accumulate(model: nn.Module, steps: int) -> nn.Module:
    """Updates the running statistics once in ``steps`` forwards, with those of all of them merged:
    for an optimizer step after so many micro-batches. Returns ``model``.

    Each micro-batch is still normalised by itself. 1 goes back to an update a forward. What waits
    when this is called makes an update at once.

    Raises:
        TypeError: ``model`` is not a module, or ``steps`` not an int.
        ValueError: ``steps`` is below 1, or a batch norm not bnext's, or there is none.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be a positive integer, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps}")
    for _, layer in list(_layers(model)):
        flush(layer)
        layer._accumulation = Accumulation(steps) if steps > 1 else None
    return model


def skip_nonfinite(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Sets ``skip_nonfinite`` of all batch norms of ``model``, see :class:`bnext.BatchNorm2d`;
    each counts in its buffer ``nonfinite_batches``. Returns ``model``.

    Raises:
        TypeError, ValueError: as :func:`accumulate`.
    """
    for _, layer in list(_layers(model)):
        if enabled:
            layer.start_skipping()
        else:
            layer.skip_nonfinite = False
    return model


def update_bn(
    loader: Iterable[Any], model: nn.Module, device: torch.device | str | None = None
) -> None:
    """:func:`torch.optim.swa_utils.update_bn`, which passes ``BatchNormAct*d`` by, for all batch
    norms of ``model``: their running statistics become the average over ``loader``. Frozen layers
    keep theirs; what an accumulating layer waits with is dropped.

    Args:
        loader: of batches, or of tuples that begin with one.
        model: called with each batch in training mode.
        device: where to move the batches before.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module(model)
    layers: list[Any] = [
        m for m in model.modules() if isinstance(m, _FusedBatchNorm) and not m.frozen
    ]
    before = [(layer.momentum, layer._accumulation) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum, layer._accumulation = None, None
    try:
        swa_utils.update_bn(loader, _WithoutLayers(model), device)  # type: ignore[arg-type]
    finally:
        for layer, (momentum, accumulation) in zip(layers, before, strict=True):
            layer.momentum, layer._accumulation = momentum, accumulation


class _WithoutLayers(nn.Module):
    """What torch's update_bn gets, and resets: bnext's layers are not among its modules. It does
    nothing for a model without an ``nn.BatchNorm``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.norm = model, nn.BatchNorm1d(1)
        self.training = model.training

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        return (m for m in super().modules() if not isinstance(m, _FusedBatchNorm))

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


def convert_sync(
    model: nn.Module,
    process_group: ProcessGroup | None = None,
    *,
    ghost_batch_size: int | None = None,
    inplace: bool = False,
) -> nn.Module:
    """:func:`bnext.convert`, with batch norms that normalise by the statistics of all processes.

    Count, mean and M2 are gathered and merged in the order of ranks: one collective forward and one
    backward, also on the CPU, with batches of any sizes, and empty ones. Also layers that were
    bnext's before are synchronised.

    Args:
        model: any module.
        process_group: None: the default group of ``torch.distributed`` when a layer is called.
        ghost_batch_size, inplace: as for ``convert``.

    Raises:
        TypeError, ValueError: as ``convert``.
    """
    group = DEFAULT_GROUP if process_group is None else check_process_group(process_group)
    model = convert(model, ghost_batch_size=ghost_batch_size, inplace=inplace)
    for module in model.modules():
        if isinstance(module, _FusedBatchNorm):
            module.process_group = group
    return model


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: with weight decay, and the parameters of normalisation
    layers of torch, bnext and their subclasses without.

    Decay of a batch norm's weight does not regularise the function before it, only its scale.

    Returns:
        Two groups, either of which may be empty; each parameter once, in the model's order.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``weight_decay`` is negative.
    """
    _check_module(model)
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    norms = [m for m in model.modules() if isinstance(m, _NORMALISATIONS)]
    without = {p for norm in norms for p in own_parameters(norm).values()}
    return [
        {
            "params": [p for p in model.parameters() if p not in without],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in model.parameters() if p in without], "weight_decay": 0.0},
    ]


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """bnext's batch norms; raises for a model with others, or without any."""
    _check_module(model)
    norms = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
    others = [name for name, m in norms.items() if not isinstance(m, _FusedBatchNorm)]
    if others:
        raise ValueError(
            f"model has batch norms that are not bnext's ({', '.join(others[:3])}"
            f"{', …' if len(others) > 3 else ''}): call bnext.convert first"
        )
    if not norms:
        raise ValueError("model has no batch norm")
    yield from norms.items()
