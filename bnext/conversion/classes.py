"""Modules with an edited forward: of a subclass, made at run time, of their own class.

So a module stays what it is for ``isinstance``, hooks, ``state_dict`` and its other methods, and
its ``__class__`` is all there is to undo. Modules with the same edits share a class, which saves
``torch.compile`` work; a pickle holds the class before and the edits.
"""

from __future__ import annotations

import ast
from abc import ABCMeta
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from bnext.conversion import calls
from bnext.conversion.source import NotUnderstood, build, read
from bnext.conversion.syntax import MODULE
from bnext.modules import _FusedBatchNorm


class Edited:
    """What all such classes have first: no code of the model's runs because they are made."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = super().__reduce_ex__(protocol)[2:]
        cls: Any = type(self)
        return (_new, (cls._bnext_recipe,), *state)


class _Sequential(nn.Sequential):
    def forward(self, input: Any) -> Any:
        return calls.in_order(list(self), input)

    def _bnext_tail(self, rest: calls.Rest, input: Any) -> Any:
        return calls.in_order(list(self), input, rest)


class _Ghosts(nn.Module):
    """pytorch-tabnet's GBN, a loop over chunks of the batch, as one call."""

    bn: nn.Module

    def forward(self, x: Any) -> Any:
        return self.bn(x)


class _TimmNorm(_FusedBatchNorm):
    """The forward of timm's ``BatchNormAct2d``: norm, dropout, activation."""

    _dims = (4,)
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        if type(self.drop) is nn.Identity:
            name = calls.module_activation(self.act)
            if name is not None:
                return self._fused(input, None, name)
        return self.act(self.drop(self._fused(input, None, None)))

    def _is_plain(self) -> bool:
        return type(self.drop) is type(self.act) is nn.Identity


# Classes whose forwards others get.
_KINDS: dict[str, Any] = {"sequential": _Sequential, "ghosts": _Ghosts, "timm norm": _TimmNorm}


@dataclass(frozen=True)
class Edit:
    """One function of a class, as another."""

    name: str
    of: str  # the name of the function that it is made from
    before: str  # that function as it was
    tree: ast.FunctionDef


@dataclass(frozen=True)
class Recipe:
    """How a class is made.

    Attributes:
        cls: the class before.
        kind: of ``_KINDS``, else "".
        edits: of its functions.
    """

    cls: type[nn.Module]
    kind: str = ""
    edits: tuple[Edit, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return self.cls, self.kind, tuple((e.name, ast.dump(e.tree)) for e in self.edits)


_made: dict[tuple[Any, ...], type[nn.Module]] = {}


def make(recipe: Recipe) -> type[nn.Module]:
    """The class; always the same for the same recipe.

    Raises:
        NotUnderstood: a module of the class cannot become one of a subclass.
    """
    if recipe.key not in _made:
        _made[recipe.key] = _make(recipe)
    return _made[recipe.key]


def _make(recipe: Recipe) -> type[nn.Module]:
    cls = recipe.cls
    if type(cls) not in (type, ABCMeta):
        raise NotUnderstood("its container's class has a metaclass")
    is_graph = issubclass(cls, fx.GraphModule)  # its copies are made from the graph, without edits
    own = cls.__reduce__ is object.__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__
    if not own and not is_graph:
        raise NotUnderstood("its container has a way of its own to be copied")
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_bnext_original": cls,
        "_bnext_recipe": recipe,
    }
    if recipe.kind:
        bases: tuple[Any, ...] = (Edited, _KINDS[recipe.kind], cls)
        if recipe.kind != "timm norm":
            bases = Edited, cls
            members |= _functions(_KINDS[recipe.kind])
    else:
        bases = (cls,) if is_graph else (Edited, cls)
        for edit in recipe.edits:
            source = read(getattr(cls, edit.of))
            if ast.dump(source.tree) != edit.before:
                continue  # a pickle of when the class was another
            members[edit.name] = build(source, edit.tree, {MODULE: calls})
    metaclass: Any = type(cls)
    new: type[nn.Module] = metaclass(cls.__name__, bases, members)
    return new


def _functions(cls: type) -> dict[str, Callable[..., Any]]:
    return {name: f for name, f in vars(cls).items() if name in ("forward", "_bnext_tail")}


def _new(recipe: Recipe) -> nn.Module:
    cls = make(recipe)
    return cls.__new__(cls)


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Raises NotUnderstood where Python does not allow it."""
    try:
        module.__class__ = cls
    except TypeError as error:
        raise NotUnderstood(f"its container's class cannot be extended: {error}") from None
