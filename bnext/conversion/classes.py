"""Modules with an edited forward: of a subclass, made at run time, of their own class.

So a module stays what it is for ``isinstance``, hooks, ``state_dict`` and its other methods, and
its ``__class__`` is all there is to undo. Modules with the same edits share a class, which saves
``torch.compile`` work; a pickle holds the class before and the edits.
"""

from __future__ import annotations

import ast
from abc import ABCMeta
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from bnext.conversion import calls
from bnext.conversion.scope import original_class
from bnext.conversion.source import NotUnderstood, build, read
from bnext.conversion.syntax import MODULE
from bnext.modules import _FusedBatchNorm


class Edited:
    """What all such classes have first: no code of the model's runs because they are made."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(protocol, 2))  # type: ignore[assignment]
        cls: Any = type(self)
        return (_new, (cls._bnext_recipe, reduced[0], reduced[1][1:]), *reduced[2:])

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script compiles: the class before, whose source it reads."""
        plain = object.__new__(original_class(self))  # type: ignore[arg-type]
        plain.__dict__.update(self.__dict__)
        plain.__dict__["_modules"] = dict(self.__dict__["_modules"])
        return plain


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
        edits = ((getattr(self.cls, e.of), e.name, ast.dump(e.tree)) for e in self.edits)
        return self.cls, self.kind, tuple(edits)


_made: dict[tuple[Any, ...], type[nn.Module]] = {}


def make(recipe: Recipe) -> type[nn.Module]:
    """The class; always the same for the same recipe.

    Raises:
        NotUnderstood: a module of the class cannot become one of a subclass.
    """
    if recipe.key not in _made:
        _made[recipe.key] = _make(recipe)
    return _made[recipe.key]


def checked(recipe: Recipe) -> Recipe:
    """Raises NotUnderstood if ``become`` would."""
    if issubclass(recipe.cls, fx.GraphModule):
        functions(recipe)
    else:
        make(recipe)
    return recipe


def _make(recipe: Recipe) -> type[nn.Module]:
    cls = recipe.cls
    if type(cls) not in (type, ABCMeta):
        raise NotUnderstood("its container's class has a metaclass")
    if (cls.__reduce__, cls.__reduce_ex__) != (object.__reduce__, object.__reduce_ex__):
        raise NotUnderstood("its container has a way of its own to be copied")
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_bnext_original": cls,
        "_bnext_recipe": recipe,
    }
    bases = (_TimmNorm, cls) if recipe.kind == "timm norm" else (cls,)
    metaclass: Any = type(cls)
    new: type[nn.Module] = metaclass(cls.__name__, (Edited, *bases), members | functions(recipe))
    return new


def functions(recipe: Recipe) -> dict[str, Any]:
    """What the class has that the one before has not."""
    if recipe.kind:
        of_kind = vars(_KINDS[recipe.kind])
        return {name: of_kind[name] for name in ("forward", "_bnext_tail") if name in of_kind}
    found = {}
    for edit in recipe.edits:
        source = read(getattr(recipe.cls, edit.of))
        if ast.dump(source.tree) == edit.before:  # not in a pickle of when the class was another
            found[edit.name] = build(source, edit.tree, {MODULE: calls})
    return found


def _new(recipe: Recipe, new: Any, arguments: tuple[Any, ...]) -> nn.Module:
    module: nn.Module = new(make(recipe), *arguments)  # copyreg's way to make an instance
    return module


def set_class(module: nn.Module, cls: Any) -> None:
    """Without code of the model's: its ``__setattr__`` may refuse."""
    object.__setattr__(module, "__class__", cls)


def become(module: nn.Module, recipe: Recipe) -> None:
    """Makes ``module`` one of the recipe's class."""
    if isinstance(module, fx.GraphModule):
        # Its class is its own alone, and its copies are made from the graph: without edits.
        for name, function in functions(recipe).items():
            setattr(type(module), name, function)
        type(module)._bnext_recipe = recipe  # type: ignore[attr-defined]
    else:
        set_class(module, make(recipe))


def restore(module: nn.Module) -> None:
    """Undoes ``become``; does nothing to other modules."""
    if not isinstance(module, fx.GraphModule):
        cls = original_class(module)
        if cls is not type(module):
            set_class(module, cls)
    elif "_bnext_recipe" in vars(type(module)):
        for name in {"_bnext_recipe", "_bnext_tail"} & set(vars(type(module))):
            delattr(type(module), name)
        module.recompile()
