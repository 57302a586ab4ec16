"""Which modules are batch norms, and what makes one bnext's and back: its class."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize

from bnext import modules
from bnext.conversion.calls import module_activation
from bnext.conversion.classes import Recipe, become, set_class
from bnext.conversion.scope import original_class
from bnext.running_stats import DEFAULT_GROUP, flush

_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.SyncBatchNorm: modules.SyncBatchNorm,
}
_PLAIN = {new: plain for plain, new in _SWAPPED.items()}
_OF_BNEXT = ("ghost_batch_size", "process_group", "skip_nonfinite", "_accumulation")
_ORIGINAL = "_bnext_original"  # the class of before, in the __dict__ of a converted norm


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm: of ``torch.nn`` (lazy and synchronised ones too) or of
    bnext, alone or with its activation; also timm's and torchvision's subclasses of them."""
    return isinstance(module, (_BatchNorm, modules._FusedBatchNorm))


def is_timm_norm(module: nn.Module) -> bool:
    """timm's norm with dropout and activation in it, a subclass of ``nn.BatchNorm2d``."""
    cls = original_class(module)
    return cls.__name__ == "BatchNormAct2d" and cls.__module__.partition(".")[0] == "timm"


def own_activation(module: Any) -> str | None:
    """The activation inside timm's norm, where bnext has it too."""
    return module_activation(module.act) if type(module.drop) is nn.Identity else None


def is_alone(module: Any) -> bool:
    """Whether it is a batch norm without an activation that ``convert`` takes."""
    if not isinstance(module, nn.Module):
        return False
    if is_timm_norm(module):
        return type(module.drop) is type(module.act) is nn.Identity
    return type(module) in _SWAPPED or type(module) in _PLAIN


def reason_to_leave(module: nn.Module) -> str | None:
    """Why a batch norm is not converted, None if it can be."""
    if isinstance(module, modules._FusedBatchNormAct):
        return "it is a layer of bnext with an activation"
    if "forward" in vars(module):
        return "its forward was replaced"
    if is_alone(module) or is_timm_norm(module):
        return None
    if isinstance(module, _LazyNormBase):
        return "it is not initialised yet"
    return f"{type(module).__name__} is a class with code of its own"


def to_bnext(module: nn.Module, ghost_batch_size: int | None) -> None:
    """Changes the class of a norm that ``reason_to_leave`` says nothing against."""
    before = type(module)
    layer: Any = module
    is_new = not isinstance(module, modules._FusedBatchNorm)
    if is_timm_norm(module):
        become(module, Recipe(original_class(module), "timm norm"))
    else:
        plain = _PLAIN.get(before, before)
        vars(module).setdefault(_ORIGINAL, plain)
        set_class(module, _SWAPPED[plain])
        if is_new and plain is nn.SyncBatchNorm and layer.process_group is None:
            layer.process_group = DEFAULT_GROUP
    if ghost_batch_size is not None or is_new:
        layer.ghost_batch_size = ghost_batch_size


def _parametrized(module: nn.Module, cls: Any) -> Any:
    """The class, with the properties of the module's own in the place of what
    ``torch.nn.utils.parametrize`` computes."""
    if not parametrize.is_parametrized(module):
        return cls
    own = type(module)
    members = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{cls.__name__}", (cls,), members)


def to_plain(module: nn.Module) -> None:
    """Undoes ``to_bnext`` and what was set since; does nothing to other modules."""
    if is_timm_norm(module):
        before: Any = original_class(module)
    else:
        own = type(module).__mro__[parametrize.is_parametrized(module)]
        before = vars(module).pop(_ORIGINAL, _PLAIN.get(own))
    if before is None or not isinstance(module, modules._FusedBatchNorm):
        return
    layer: Any = module
    flush(layer)
    layer.unfreeze()
    group = layer.process_group
    set_class(module, _parametrized(module, before))
    module._buffers.pop("nonfinite_batches", None)
    module._non_persistent_buffers_set.discard("nonfinite_batches")
    for name in _OF_BNEXT:
        vars(module).pop(name, None)
    if before is nn.SyncBatchNorm:
        layer.process_group = None if group == DEFAULT_GROUP else group
