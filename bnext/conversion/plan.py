"""What ``bnext.convert`` will do with a model; nothing is changed here."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeGuard

from torch import fx, jit, nn

from bnext.conversion import calls
from bnext.conversion.chains import Found
from bnext.conversion.classes import Edit, Recipe, checked
from bnext.conversion.editing import choose, edited, with_tail
from bnext.conversion.norms import (
    is_alone,
    is_batch_norm,
    is_timm_norm,
    own_activation,
    reason_to_leave,
)
from bnext.conversion.report import ConversionReport, Entry
from bnext.conversion.scope import Scope, as_modules, original_class
from bnext.conversion.search import HOOKS, find
from bnext.conversion.source import NotUnderstood, read


@dataclass(frozen=True)
class _Sighting:
    """A call of a norm, or of a module whose output is the norm's."""

    found: bool = False  # whether what follows is part of the call
    activation: str | None = None
    residual: bool = False
    returned: bool = False
    reason: str = ""


@dataclass
class _Forward:
    """A container's forward and the methods that it calls.

    Attributes:
        functions: by name, with the calls of norms that will be edited.
        ends: norms whose output it returns, and no more.
        called: the modules that are called.
    """

    functions: list[tuple[str, Scope, list[Found]]] = field(default_factory=list)
    sightings: list[tuple[nn.Module, _Sighting]] = field(default_factory=list)
    ends: tuple[nn.Module, ...] = ()
    called: set[nn.Module] = field(default_factory=set)
    reason: str = ""


class FusionPlan:
    """The plan for ``model``.

    Attributes:
        norms: all to be converted.
        ghosts: the ghost batch size of norms whose container splits the batch for them.
        recipes: of the containers with a call that is edited.
        report: the plan, for people.
    """

    def __init__(self, model: nn.Module) -> None:
        self.norms: list[nn.Module] = []
        self.ghosts: dict[nn.Module, int] = {}
        self.recipes: dict[nn.Module, Recipe] = {}
        self._names: dict[nn.Module, str] = {}
        self._sightings: dict[nn.Module, list[_Sighting]] = defaultdict(list)
        self._forwards: dict[nn.Module, _Forward] = {}
        self._typed: set[nn.Module] = set()  # whose class their container may ask for
        self._tails: set[nn.Module] = set()  # what follows them is handed on to them
        self._fusing: set[nn.Module] = set()  # nn.Sequential with pairs
        for name, module in model.named_modules():
            self._names[module] = name
        containers = [m for m in self._names if _has_norms_inside(m)]
        for module in containers:
            if is_tabnet_ghost(module):
                self._take_over_ghosts(module)
            elif not is_sequential(module):
                forward = self._forward(module)
                for norm, sighting in forward.sightings:
                    self._sightings[norm].append(sighting)
        uncalled = self._uncalled(model)
        for module in containers:
            if is_sequential(module):
                self._look_into_sequential(module, module in uncalled)
        for module in containers:
            self._edit(module)
        self.report = ConversionReport([self._decide(m) for m in self._names if is_batch_norm(m)])

    def _take_over_ghosts(self, module: Any) -> None:
        """pytorch-tabnet's GBN, a loop over chunks of the batch, becomes one call."""
        self.ghosts[module.bn] = module.virtual_batch_size
        self.recipes[module] = Recipe(original_class(module), "ghosts")
        reason = f"its container's loop became ghosts of {module.virtual_batch_size}"
        self._sightings[module.bn].append(_Sighting(reason=reason))

    def _look_into_sequential(self, sequential: Any, uncalled: bool) -> None:
        children = [m for m in sequential._modules.values() if m is not None]
        for at, module in enumerate(children):
            norms = self.norms_of(module)
            if not norms:
                continue
            after = [m for m in children[at + 1 :] if not calls.is_identity(m)]
            name = calls.module_activation(after[0]) if after else None
            if uncalled:
                sighting = _Sighting(reason="its nn.Sequential is not seen to be called")
            elif not after:
                reason = "it is the last of its nn.Sequential"
                sighting = _Sighting(returned=True, reason=reason)
            elif name is None:
                what = type(after[0]).__name__
                is_watched = calls.is_watched(after[0])
                reason = (
                    HOOKS if is_watched else f"no activation that bnext fuses follows: {what} does"
                )
                sighting = _Sighting(reason=reason)
            else:
                sighting = _Sighting(True, name)
                self._fusing.add(sequential)
                self._need_tail(module)
            for norm in norms:
                self._sightings[norm].append(sighting)

    def norms_of(self, module: Any) -> tuple[nn.Module, ...]:
        """The norms, one of which makes what the module returns."""
        if not isinstance(module, nn.Module) or module not in self._names:
            return ()
        if is_alone(module):
            return (module,)
        if is_sequential(module):
            children = [m for m in module if not calls.is_identity(m)]
            return self.norms_of(children[-1]) if children else ()
        if is_batch_norm(module) or is_tabnet_ghost(module) or not _has_norms_inside(module):
            return ()
        return self._forward(module).ends

    def _need_tail(self, module: Any) -> None:
        """For what calls it to hand on what follows."""
        if module in self._tails or is_alone(module):
            return
        self._tails.add(module)
        if is_sequential(module):
            children = [m for m in module if not calls.is_identity(m)]
            self._need_tail(children[-1])
        else:
            for _, scope, found in self._forward(module).functions:
                for one in found:
                    if any(way.is_tail for way in one.ways):
                        for callee in as_modules(scope.resolve(one.call.func)):
                            self._need_tail(callee)

    def _forward(self, container: nn.Module) -> _Forward:
        if container not in self._forwards:
            self._forwards[container] = _Forward()  # while it is looked at
            try:
                forward = self._read(container)
            except NotUnderstood as error:
                forward = _Forward(reason=str(error))
                unseen = _Sighting(reason=str(error))
                forward.sightings = [(norm, unseen) for norm in _own_norms(container)]
            self._forwards[container] = forward
        return self._forwards[container]

    def _read(self, container: nn.Module) -> _Forward:
        cls = original_class(container)
        if isinstance(container, jit.ScriptModule):
            raise NotUnderstood("its container is a TorchScript module")
        if "forward" in vars(container):
            raise NotUnderstood("its container's forward was replaced")
        if cls.__module__.partition(".")[0] == "torch" and not isinstance(
            container, fx.GraphModule
        ):
            raise NotUnderstood(f"its container is torch's {cls.__name__}")
        forward = _Forward()
        for name, scope in scopes(container, cls).items():
            for node in ast.walk(scope.source.tree):
                if isinstance(node, ast.Name) and node.id == "type":
                    self._typed.update(container.children())
                if isinstance(node, ast.Call):
                    forward.called.update(as_modules(scope.resolve(node.func)))
            found = find(scope, self.norms_of)
            taken, late = choose(found, scope)
            if name == "forward" and with_tail(scope, taken) is not None:
                ends = [m for f in taken if any(w.is_tail for w in f.ways) for m in f.modules]
                forward.ends = tuple(dict.fromkeys(ends))
            forward.functions.append((name, scope, taken))
            for one in found:
                sighting = _sighting(one, one in late)
                if sighting.found:
                    self._need_tail_later(forward, scope, one)
                forward.sightings += [(norm, sighting) for norm in one.modules]
        return forward

    def _need_tail_later(self, forward: _Forward, scope: Scope, one: Found) -> None:
        for callee in as_modules(scope.resolve(one.call.func)):
            if not is_alone(callee):
                self._need_tail(callee)

    def _uncalled(self, model: nn.Module) -> set[nn.Module]:
        """Modules whose parents are understood, and do not call them."""
        found: set[nn.Module] = set()
        for container, forward in self._forwards.items():
            if not forward.reason:
                found.update(m for m in container.children() if is_sequential(m))
        called = {m for forward in self._forwards.values() for m in forward.called}
        return found - called - {model}

    def _edit(self, container: nn.Module) -> None:
        cls = original_class(container)
        try:
            if container in self._typed:
                raise NotUnderstood("its container's container asks for a class")
            if is_sequential(container):
                if container in self._tails | self._fusing:
                    self.recipes[container] = checked(Recipe(cls, "sequential"))
                return
            edits: list[Edit] = []
            for name, scope, found in self._forward(container).functions:
                before = ast.dump(scope.source.tree)
                tree = edited(scope, found)
                if tree is not None:
                    edits.append(Edit(name, name, before, tree))
                if container in self._tails and name == "forward":
                    tree = with_tail(scope, found)
                    if tree is not None:
                        edits.append(Edit("_bnext_tail", name, before, tree))
            if edits:
                self.recipes[container] = checked(Recipe(cls, "", tuple(edits)))
        except NotUnderstood as error:
            for norm in _own_norms(container):
                self._sightings[norm] = [_Sighting(reason=str(error))]

    def _decide(self, norm: nn.Module) -> Entry:
        name = self._names[norm]
        reason = reason_to_leave(norm)
        if norm in self._typed:
            reason = "its container asks for a class"
        if reason is not None:
            return Entry(name, "left", reason=reason)
        self.norms.append(norm)
        if is_timm_norm(norm) and not is_alone(norm):
            activation = own_activation(norm)
            if activation is not None:
                return Entry(name, "fused", activation)
            return Entry(name, "swapped", reason="bnext does not fuse the activation in it")
        if calls.is_watched(norm):
            return Entry(name, "swapped", reason=HOOKS)
        sightings = self._sightings[norm]
        for sighting in sightings:
            if sighting.found:
                return Entry(name, "fused", sighting.activation, sighting.residual)
        reasons = sorted(sightings, key=lambda s: s.returned)
        if not reasons:
            return Entry(name, "swapped", reason="no module is seen to call it")
        return Entry(name, "swapped", reason=reasons[0].reason)


def _sighting(one: Found, late: bool) -> _Sighting:
    complete = [way for way in one.ways if not way.is_tail]
    if late:
        return _Sighting(reason="its sum is fused with the other summand")
    if complete:
        name = next((way.name for way in complete if way.name is not None), None)
        return _Sighting(True, name, any(way.add is not None for way in complete))
    return _Sighting(returned=bool(one.ways), reason=one.reason)


def scopes(container: nn.Module, cls: type[nn.Module], *, all_of: bool = False) -> dict[str, Scope]:
    """``forward`` and the methods that it names; those that are not understood are left out.
    ``all_of``: they raise NotUnderstood, if the module as it is can come to call them."""
    found = {"forward": Scope(container, read(inspect.getattr_static(cls, "forward")))}
    todo = ["forward"]
    while todo:
        scope = found[todo.pop()]
        for node in scope.reachable() if all_of else ast.walk(scope.source.tree):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if node.value.id != scope.source.first_argument or node.attr in found:
                continue
            method = inspect.getattr_static(cls, node.attr, None)
            if not isinstance(method, FunctionType) or node.attr in vars(container):
                continue
            if method.__module__.partition(".")[0] == "torch" and not isinstance(
                container, fx.GraphModule
            ):
                continue
            try:
                found[node.attr] = Scope(container, read(method))
            except NotUnderstood:
                if all_of:
                    raise
                continue
            todo.append(node.attr)
    return found


def is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether its forward is a call of its children in order."""
    is_kind = isinstance(module, nn.Sequential)
    cls = original_class(module)
    return is_kind and cls.forward is nn.Sequential.forward and "forward" not in vars(module)


def has_forward(module: nn.Module) -> bool:
    """Whether it can be called: not a list of modules."""
    return original_class(module).forward is not nn.Module.forward


def is_tabnet_ghost(module: nn.Module) -> bool:
    cls = original_class(module)
    from_tabnet = cls.__name__ == "GBN" and cls.__module__.partition(".")[0] == "pytorch_tabnet"
    return from_tabnet and is_alone(module.bn)


def _has_norms_inside(module: nn.Module) -> bool:
    return has_forward(module) and any(is_alone(m) for m in module.modules() if m is not module)


def _own_norms(container: nn.Module) -> list[nn.Module]:
    """Norms that no module between has a forward for."""
    found = []
    for child in container.children():
        if is_alone(child):
            found.append(child)
        elif not has_forward(child):
            found += _own_norms(child)
    return found
