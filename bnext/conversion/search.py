"""Looks for the chains in a forward.

Between them only that may happen which changes nothing but local names (``Scope.is_harmless``),
and what the norm returned may be seen by nobody else. Tests of attributes and arguments are
followed as they are for this module; the edited forward asks them again (``editing.py``).
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bnext import activations
from bnext.conversion import calls
from bnext.conversion.chains import Chain, Found
from bnext.conversion.order import Order
from bnext.conversion.scope import UNKNOWN, Scope, Several, as_modules, is_getattr
from bnext.conversion.syntax import (
    TRY,
    Block,
    Substitution,
    assigned,
    block_after,
    has,
    helper,
    helper_name,
    is_starred,
    mentions,
    names_in,
)

_MOST_WAYS = 4  # through the tests between a norm and its activation
HOOKS = "it, or the activation, has hooks"


class _Stop(Exception):
    """Its message is why a chain goes no further."""


def find(scope: Scope, norms_of: Callable[[Any], tuple[nn.Module, ...]]) -> list[Found]:
    """All calls of norms in a function. ``norms_of``: those whose output a module returns."""
    found = []
    for node in scope.reachable():
        if isinstance(node, ast.Call):
            each = [norms_of(m) for m in as_modules(scope.resolve(node.func))]
            modules = tuple(norm for norms in each for norm in norms) if all(each) else ()
            if modules and not _is_nested(scope, node):
                found.append(_Search(scope, node, modules).run())
    return found


def _is_nested(scope: Scope, node: ast.AST) -> bool:
    while node in scope.parents:
        node = scope.parents[node]
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef, ast.AsyncFunctionDef)):
            return node is not scope.source.tree
    return False


class _Search:
    def __init__(self, scope: Scope, call: ast.Call, modules: tuple[nn.Module, ...]) -> None:
        self._scope, self._call, self._modules = scope, call, modules
        self._order = Order(scope, as_modules(scope.resolve(call.func)), modules)
        self._ways: list[Chain] = []
        self._reason = ""

    def run(self) -> Found:
        if len(self._call.args) != 1 or self._call.keywords or is_starred(self._call):
            return Found(self._call, self._modules, reason="it is not called with one tensor")
        statement: ast.AST = self._call
        while not isinstance(statement, ast.stmt):
            statement = self._scope.parents[statement]
        try:
            chain = Chain(
                self._call, first=statement, last=statement, statement=statement, path=(self._call,)
            )
            self._outward(chain, self._call, [], None)
        except _Stop as stop:
            self._reason = self._reason or str(stop)
        ways = tuple(self._ways) if len(self._ways) <= _MOST_WAYS else ()
        return Found(self._call, self._modules, ways, self._reason)

    def _outward(self, chain: Chain, node: ast.expr, block: Block, name: str | None) -> None:
        """Follows a value through the expression that it is in, then through the block. ``name``:
        of the variable that ``node`` is."""
        best: Chain | None = None  # as it is if no activation comes
        was_added = chain.add is not None
        try:
            while True:
                chain, node, done = self._step(chain, node)
                chain = replace(chain, path=(*chain.path, node))
                if chain.add is not None and not was_added:
                    best = chain
                if done:
                    self._complete(chain, node)
                    return
                if isinstance(self._scope.parents[node], ast.stmt):
                    break
            self._statement(chain, node, block, name)
        except _Stop:
            if best is None:
                raise
            self._complete(best, best.end)

    def _step(self, chain: Chain, node: ast.expr) -> tuple[Chain, ast.expr, bool]:
        """One operation outward; whether the chain ends with it."""
        parent = self._scope.parents[node]
        if isinstance(parent, ast.stmt):
            return chain, node, False
        if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add):
            left = parent.left is node
            other = parent.right if left else parent.left
            return self._added(chain, parent, other, "left" if left else "right"), parent, False
        if isinstance(parent, ast.Attribute):
            return self._method(chain, parent)
        if not isinstance(parent, ast.Call) or not parent.args or parent.args[0] is not node:
            if isinstance(parent, ast.Call) and self._is_addition(parent):
                return self._added(chain, parent, parent.args[0], "right"), parent, False
            raise _Stop(_no_activation(parent))
        if self._is_addition(parent):
            return self._added(chain, parent, parent.args[1], "left"), parent, False
        function = self._scope.resolve(parent.func)
        if (
            isinstance(function, Several)
            and len({calls.module_activation(m) for m in function}) == 1
        ):
            function = function[0]  # the call decides again
        if isinstance(function, nn.Module):
            if len(parent.args) > 1 or parent.keywords:
                raise _Stop(_no_activation(parent))
            if type(function) is nn.Identity:
                test = helper("is_identity", parent.func)
                return replace(chain, tests=(*chain.tests, test)), parent, False
            return self._activated(chain, parent, calls.module_activation(function), {})
        options = self._options(function, parent)
        constants = {key: self._scope.resolve(value) for key, value in options.items()}
        name = activations.of_function(function, constants)
        return self._activated(chain, parent, name, options)

    def _method(self, chain: Chain, attribute: ast.Attribute) -> tuple[Chain, ast.expr, bool]:
        parent = self._scope.parents[attribute]
        if not isinstance(parent, ast.Call) or parent.func is not attribute or parent.keywords:
            raise _Stop("its output is looked at before an activation")
        if attribute.attr in ("relu", "relu_") and not parent.args:
            name = "relu_method" if attribute.attr == "relu" else "relu_method_in_place"
            chain = replace(chain, name="relu", activation=helper_name(name), end=parent)
            return chain, parent, True
        if attribute.attr in ("add", "add_") and len(parent.args) == 1 and not is_starred(parent):
            how = "left" if attribute.attr == "add" else "in_place"
            return self._added(chain, parent, parent.args[0], how), parent, False
        raise _Stop(f"no activation that bnext fuses follows: {attribute.attr} does")

    def _is_addition(self, call: ast.Call) -> bool:
        function = self._scope.resolve(call.func)
        known = function is torch.add or function is operator.add
        return known and len(call.args) == 2 and not call.keywords and not is_starred(call)

    def _added(self, chain: Chain, end: ast.expr, other: ast.expr, how: str) -> Chain:
        if chain.add is not None:
            raise _Stop("two things are added before an activation")
        if isinstance(self._scope.resolve(other), (int, float)):
            raise _Stop("a number is added to its output")
        before = how == "right" and chain.first is chain.statement and not chain.between
        if not before and not self._order.may_come_first(other):
            raise _Stop("what is added is computed by code that might change the norm's input")
        return replace(chain, add=how, residual=other, end=end)

    def _options(self, function: Any, call: ast.Call) -> dict[str, ast.expr]:
        names = activations.options_of(function)
        if names is None or len(call.args) - 1 > len(names) or is_starred(call):
            raise _Stop(_no_activation(call))
        options = dict(zip(names, call.args[1:], strict=False))
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in options:
                raise _Stop(_no_activation(call))
            options[keyword.arg] = keyword.value
        if not all(map(self._scope.is_pure, options.values())):
            raise _Stop("the activation's arguments are computed after the norm")
        return options

    def _activated(
        self, chain: Chain, call: ast.Call, name: str | None, options: dict[str, ast.expr]
    ) -> tuple[Chain, ast.expr, bool]:
        if name is None or not self._scope.is_pure(call.func):
            raise _Stop(_no_activation(call, self._scope.resolve(call.func)))
        chain = replace(chain, name=name, activation=call.func, options=options, end=call)
        return chain, call, True

    def _statement(self, chain: Chain, node: ast.expr, block: Block, name: str | None) -> None:
        """The value of a statement: kept in a variable that the block goes on with, or returned."""
        statement = self._scope.parents[node]
        if isinstance(statement, ast.Return):
            if chain.add is None:
                self._complete(replace(chain, is_tail=True), node)
            raise _Stop("its output is returned")
        targets: list[ast.expr] = []
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        target = targets[0] if len(targets) == 1 else None
        if not isinstance(target, ast.Name) or not isinstance(statement, ast.stmt):
            raise _Stop("its output is not kept in one variable")
        if target.id in self._scope.nested:
            raise _Stop("a function or comprehension in its container's forward uses its output")
        if name is None:
            block = block_after(self._scope.parents, statement)
            if any(isinstance(a, TRY) for a in self._ancestors(statement)):
                raise _Stop("its output is kept in a variable inside a try statement")
        self._forward(chain, block, target.id)

    def _forward(self, chain: Chain, block: Block, name: str) -> None:
        """Follows a variable through the statements after the one that set it."""
        for at, statement in enumerate(block):
            later = block[at + 1 :]
            chain = self._moved(chain, statement)
            found = mentions(statement, name)
            if isinstance(statement, ast.If) and found:
                self._branches(chain, statement, later, name)
                return
            if not found:
                harmless = self._order.may_come_first(statement) and not has(statement, ast.Return)
                residual = names_in(chain.residual or statement)
                if chain.add is not None and residual & assigned([statement]):
                    harmless = False
                if not harmless and isinstance(statement, ast.If):
                    self._branches(chain, statement, later, name)
                    return
                if not harmless:
                    raise _Stop("what runs between it and the activation might change something")
                chain = replace(chain, between=(*chain.between, statement))
                continue
            loads = [n for n in found if isinstance(n.ctx, ast.Load)]
            if isinstance(statement, ast.AugAssign) and not loads:
                if not isinstance(statement.op, ast.Add):
                    raise _Stop("its output is changed before an activation")
                after = replace(chain, statement=statement)
                added = self._added(after, statement.value, statement.value, "in_place")
                try:
                    self._forward(added, later, name)
                except _Stop:
                    self._complete(replace(added, rest=self._rest(chain, later)), None)
                return
            if not loads:
                raise _Stop("nothing uses it")
            if len(loads) > 1 or not self._order.is_unconditional(loads[0], statement):
                raise _Stop("its output is used more than once, or not always")
            chain = replace(chain, statement=statement, rest=self._rest(chain, later))
            if not self._ends_here(statement, name) and not self._is_dead(name, chain, later):
                raise _Stop("its output is used more than once")
            if not self._order.is_first(loads[0], statement):
                raise _Stop("what runs between it and the activation might change something")
            self._outward(chain, loads[0], later, name)
            return
        raise _Stop("its block of code ends before an activation")

    def _moved(self, chain: Chain, statement: ast.stmt) -> Chain:
        """With the last of the statements of the first's own block that the chain takes."""
        assert chain.first is not None
        if self._scope.parents[statement] is self._scope.parents[chain.first]:
            return replace(chain, last=statement)
        return chain

    def _rest(self, chain: Chain, later: Block) -> tuple[ast.stmt, ...]:
        """What remains of the bodies that were entered."""
        assert chain.first is not None
        own = self._scope.parents[chain.first]
        return tuple(s for s in later if self._scope.parents[s] is not own)

    def _branches(self, chain: Chain, statement: ast.If, later: Block, name: str) -> None:
        test = self._substituted(statement.test, chain)
        names = names_in(test)
        if not self._scope.is_pure(test) or name in names or names & assigned(chain.between):
            raise _Stop("a test between it and the activation depends on values")
        truth = self._scope.truth(test)
        if truth is None and not any(
            mentions(s, name) for s in (*statement.body, *statement.orelse)
        ):
            raise _Stop("what runs between it and the activation might change something")
        stops = []
        for value in (True, False) if truth is None else (truth,):
            taken = statement.body if value else statement.orelse
            holds = test if value else ast.UnaryOp(ast.Not(), test)
            way = replace(chain, tests=(*chain.tests, holds))
            try:
                self._forward(way, [*taken, *later], name)
            except _Stop as stop:
                stops.append(stop)
        if stops and not self._ways:
            raise stops[0]
        self._reason = self._reason or (str(stops[0]) if stops else "")

    def _substituted(self, test: ast.expr, chain: Chain) -> ast.expr:
        """With local names replaced by the attributes that they were just set to."""
        known: dict[str, ast.expr] = {}
        for statement in chain.between:
            for name in assigned([statement]):
                known.pop(name, None)
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                value = statement.value
                is_child = isinstance(self._scope.resolve(value), nn.Module | None)
                if (is_getattr(value) or is_child) and self._scope.is_pure(value):
                    known[statement.targets[0].id] = value
        return Substitution(known).visit(copy.deepcopy(test)) if known else test

    def _ends_here(self, statement: ast.stmt, name: str) -> bool:
        """Whether the statement gives the variable another value, or leaves the function."""
        if isinstance(statement, ast.Return):
            return True
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        return any(isinstance(t, ast.Name) and t.id == name for t in targets)

    def _is_dead(self, name: str, chain: Chain, later: Block) -> bool:
        """Whether nobody reads the variable any more."""
        if name in self._scope.nested:
            return False
        for statement in later:
            found = mentions(statement, name)
            if found:
                sets = isinstance(statement, ast.Assign) and all(
                    not isinstance(n.ctx, ast.Load) for n in found
                )
                if sets:
                    return True
                break
        assert chain.statement is not None
        if any(isinstance(a, (ast.For, ast.While)) for a in self._ancestors(chain.statement)):
            return False
        end = (chain.statement.end_lineno or 0, chain.statement.end_col_offset or 0)
        return not any(
            isinstance(n, ast.Name)
            and n.id == name
            and isinstance(n.ctx, (ast.Load, ast.Del))
            and (n.lineno, n.col_offset) >= end
            for n in ast.walk(self._scope.source.tree)
        )

    def _ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self._scope.parents:
            node = self._scope.parents[node]
            yield node

    def _complete(self, chain: Chain, end: ast.expr | None) -> None:
        self._ways.append(replace(chain, end=end))


def _no_activation(node: ast.AST, function: Any = UNKNOWN) -> str:
    what = type(node).__name__.lower()
    if isinstance(node, ast.Call):
        what = ast.unparse(node.func)
        if isinstance(function, nn.Module):
            what = type(function).__name__
            if calls.is_watched(function):
                return HOOKS
    elif isinstance(node, ast.BinOp):
        what = type(node.op).__name__.lower()
    return f"no activation that bnext fuses follows: {what} does"
