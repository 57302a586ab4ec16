"""What of a forward may run in another order than it is written."""

from __future__ import annotations

import ast

from torch import Tensor, nn

from bnext.conversion.scope import Scope, as_modules, is_getattr, is_harmless_module
from bnext.conversion.syntax import names_in

# Expressions that evaluate all their parts, and statements that evaluate their expressions.
_ALWAYS = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Attribute, ast.Subscript, ast.Tuple, ast.List)
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)


class Order:
    """Of the call of a norm, and what is written after it.

    Args:
        callees: what is called: a norm, or a module that returns a norm's output.
        norms: whose output it is.
    """

    def __init__(
        self, scope: Scope, callees: tuple[nn.Module, ...], norms: tuple[nn.Module, ...]
    ) -> None:
        self._scope = scope
        # They may change places with other calls: a norm alone, or harmless code.
        self._can_wait = all(m in norms or is_harmless_module(m) for m in callees)
        self._own = {m for callee in callees for m in callee.modules()}
        self._state = {id(t) for m in self._own for t in _tensors_of(m)}

    def may_come_first(self, node: ast.AST) -> bool:
        """Whether what is written after the norm's call may run before it."""
        if not any(isinstance(n, ast.Call) and not is_getattr(n) for n in ast.walk(node)):
            return self._scope.is_harmless(node) and not self._uses_callee(node)
        return self._can_wait and self._scope.is_harmless(node) and not self._uses_callee(node)

    def _uses_callee(self, node: ast.AST) -> bool:
        """Whether it calls what the chain's call does, or looks at its state."""
        for part in ast.walk(node):
            found = self._scope.resolve(part) if isinstance(part, ast.expr) else None
            if isinstance(part, ast.Name) and self._may_be_state(part.id):
                return True
            if isinstance(found, Tensor) and id(found) in self._state:
                return True
            modules = as_modules(found)
            if not modules or found is self._scope.module:
                continue
            parent = self._scope.parents[part]
            goes_on = isinstance(parent, (ast.Attribute, ast.Subscript)) and isinstance(
                self._scope.resolve(parent), nn.Module
            )
            inside = {m for module in modules for m in ([module] if goes_on else module.modules())}
            buffers = {id(t) for m in inside for t in m.buffers(recurse=False)}
            if inside & self._own or buffers & self._state:
                return True
        return False

    def _may_be_state(self, name: str) -> bool:
        """Whether a variable is ever set to a buffer or parameter of what is called."""
        for node in ast.walk(self._scope.source.tree):
            if isinstance(node, ast.Assign) and name in names_in(node):
                value = self._scope.resolve(node.value)
                if isinstance(value, Tensor) and id(value) in self._state:
                    return True
        return False

    def is_unconditional(self, node: ast.AST, statement: ast.stmt) -> bool:
        """Whether a simple statement always comes to evaluate the node, once."""
        while node is not statement:
            node = self._scope.parents[node]
            if isinstance(node, ast.expr) and not isinstance(node, _ALWAYS):
                return False
        return isinstance(statement, _SIMPLE)

    def is_first(self, node: ast.expr, statement: ast.stmt) -> bool:
        """Whether all else that the statement evaluates before the node's operation is harmless."""
        inner: ast.AST = node
        while inner is not statement:
            outer = self._scope.parents[inner]
            for child in ast.iter_child_nodes(outer):
                if child is inner:
                    break
                if not isinstance(child, ast.expr):
                    continue
                if isinstance(outer, (ast.Assign, ast.AnnAssign)):
                    continue  # its targets
                if not self._scope.is_harmless(child):
                    return False
            inner = outer
        return True


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.buffers(recurse=False), *module.parameters(recurse=False)]
