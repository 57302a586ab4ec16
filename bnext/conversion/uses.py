"""Who calls which module of a model: for changes that hold only where two modules are called one
after the other, always, and by nobody else."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from typing import Any

from torch import fx, nn

from bnext.conversion.plan import has_forward, is_sequential, scopes
from bnext.conversion.scope import Scope, is_getattr, original_class
from bnext.conversion.source import NotUnderstood


class Uses:
    """Of the modules of ``model``.

    Attributes:
        calls: in how many places a module is called.
        seen: modules that are used in another way too, or by code that is not understood.
        scopes: the functions of each container that is understood, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: Counter[nn.Module] = Counter()
        self.seen: set[nn.Module] = set()
        self.scopes: dict[nn.Module, dict[str, Scope]] = {}
        for module in model.modules():
            if is_sequential(module):
                self.calls.update(module)
            elif has_forward(module):
                self._look_into(module)

    def only_called_once(self, module: nn.Module) -> bool:
        return self.calls[module] == 1 and module not in self.seen

    def _look_into(self, container: nn.Module) -> None:
        if not any(True for _ in container.children()):
            return
        cls = original_class(container)
        try:
            if "forward" in vars(container):
                raise NotUnderstood("its container's forward was replaced")
            if cls.__module__.partition(".")[0] == "torch" and not isinstance(
                container, fx.GraphModule
            ):
                raise NotUnderstood("its container is torch's")
            found = scopes(container, cls, all_of=True)
            for scope in found.values():
                for node in scope.reachable():
                    self._visit(scope, node)
            self.scopes[container] = found
        except NotUnderstood:
            self._lose(container)

    def _lose(self, module: nn.Module) -> None:
        self.seen.update(m for m in module.modules() if m is not module)

    def _visit(self, scope: Scope, node: ast.AST) -> None:
        if is_getattr(node) and isinstance(scope.resolve(node), nn.Module):  # type: ignore[arg-type]
            raise NotUnderstood("its forward asks for a module by getattr")
        if isinstance(node, ast.Name) and node.id == "super":
            raise NotUnderstood("its forward is partly its base class's")
        if not isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)):
            return
        module = scope.resolve(node)
        parent = scope.parents.get(node)
        if module is scope.module:
            if not isinstance(parent, ast.Attribute) and not (parent and is_getattr(parent)):
                raise NotUnderstood("its forward hands itself on")
            if isinstance(parent, ast.Attribute):
                loop = scope.parents.get(scope.parents[parent])
                over_children = parent.attr in ("items", "values", "children")
                if over_children and isinstance(loop, ast.For) and _only_calls(scope, loop):
                    self.calls.update(module.children())
                    return
                self._check_attribute(scope, parent.attr)
        elif isinstance(module, nn.Module):
            self._mention(scope, module, node, parent)

    def _check_attribute(self, scope: Scope, name: str) -> None:
        """Ways of a module to its children other than their names."""
        found = inspect.getattr_static(original_class(scope.module), name, None)
        if isinstance(found, property) or (hasattr(nn.Module, name) and name != "training"):
            raise NotUnderstood(f"its forward uses {name}")
        if name in ("_modules", "_parameters", "_buffers", "__dict__", "items", "values"):
            raise NotUnderstood(f"its forward uses {name}")

    def _mention(self, scope: Scope, module: nn.Module, node: Any, parent: Any) -> None:
        if isinstance(parent, ast.Call) and parent.func is node:
            self.calls[module] += 1
        elif isinstance(parent, (ast.Attribute, ast.Subscript)) and isinstance(
            scope.resolve(parent), nn.Module
        ):
            return  # counted there
        elif isinstance(parent, (ast.If, ast.IfExp, ast.BoolOp, ast.UnaryOp)) or (
            isinstance(parent, ast.Compare) and isinstance(parent.ops[0], (ast.Is, ast.IsNot))
        ):
            return  # a test
        elif isinstance(parent, ast.For) and parent.iter is node and _only_calls(scope, parent):
            self.calls.update(module.children())
        else:
            self.seen.update(module.modules())


def _only_calls(scope: Scope, loop: ast.For) -> bool:
    """Whether the loop does no more with the module than to call it."""
    target = loop.target
    if isinstance(target, ast.Tuple) and len(target.elts) == 2:
        target = target.elts[1]  # of items()
    if not isinstance(target, ast.Name):
        return False
    loads = [
        n
        for n in ast.walk(scope.source.tree)
        if isinstance(n, ast.Name) and n.id == target.id and isinstance(n.ctx, ast.Load)
    ]
    parents = [scope.parents[n] for n in loads]
    return all(isinstance(p, ast.Call) and p.func is n for p, n in zip(parents, loads, strict=True))
