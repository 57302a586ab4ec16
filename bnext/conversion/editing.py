"""A function with the chains of ``chains.py`` in it as calls of ``calls.py``; the rest as written.

A chain within one expression becomes a call. One over several statements becomes

    if <what was true of the module when it was converted>:
        <the statements, with the chain as one call>
    else:
        <the statements as they were>
"""

from __future__ import annotations

import ast
import copy
from typing import Any

from bnext.conversion.chains import Chain, Found
from bnext.conversion.scope import Scope
from bnext.conversion.syntax import TRY, Block, block_of, has, helper

REST = "_bnext_rest"  # what the caller of a tail wants done with the norm's output
_INPUT, _VALUE = "_bnext_input", "_bnext_value"


def choose(found: list[Found], scope: Scope) -> tuple[list[Found], list[Found]]:
    """Those that can be edited beside each other, and those that come too late."""
    taken: list[Found] = []
    late: list[Found] = []
    for one in found:
        if not one.ways:
            continue
        fits = all(_fit(scope, a, b) for other in taken for a in one.ways for b in other.ways)
        (taken if fits else late).append(one)
    return taken, late


def _fit(scope: Scope, one: Chain, other: Chain) -> bool:
    if set(one.path) & set(other.path):
        return False
    if one.is_expression or other.is_expression:
        return True
    ours, theirs = _statements(_range(scope, one)), _statements(_range(scope, other))
    return (
        not ours & theirs
        or ours <= _statements([*other.between, *other.rest])
        or theirs <= _statements([*one.between, *one.rest])
    )


def _range(scope: Scope, chain: Chain) -> Block:
    assert chain.first is not None and chain.last is not None
    block = block_of(scope.parents, chain.first)
    return block[block.index(chain.first) : block.index(chain.last) + 1]


def _statements(block: Block) -> set[ast.AST]:
    return {n for s in block for n in ast.walk(s) if isinstance(n, ast.stmt)}


def edited(scope: Scope, found: list[Found]) -> ast.FunctionDef | None:
    """The function with all chains but tails; None if there are none."""
    chains = [[c for c in one.ways if not c.is_tail] for one in found]
    if not any(chains):
        return None
    return _Editor(chains, tail=False).function(scope.source.tree)


def with_tail(scope: Scope, found: list[Found]) -> ast.FunctionDef | None:
    """The same, whose second argument is done with what it returns; None if no chain ends so."""
    tree = scope.source.tree
    if (
        not any(c.is_tail for one in found for c in one.ways)
        or any(has(s, (ast.With, *TRY, ast.FunctionDef, ast.ClassDef)) for s in tree.body)
        or not isinstance(tree.body[-1], ast.Return)
        or scope.source.function is not scope.source.inner
    ):
        return None
    new = _Editor([list(one.ways) for one in found], tail=True).function(tree)
    arguments = new.args.posonlyargs if new.args.posonlyargs else new.args.args
    arguments.insert(1, ast.arg(REST))
    return new


class _Editor:
    def __init__(self, chains: list[list[Chain]], tail: bool) -> None:
        self._tail = tail
        self._within: dict[ast.AST, Chain] = {}
        self._from: dict[ast.AST, list[Chain]] = {}
        for ways in chains:
            for chain in ways:
                if chain.is_expression and chain.end is not None:
                    self._within[chain.end] = chain
                elif chain.first is not None:
                    self._from.setdefault(chain.first, []).append(chain)

    def function(self, tree: ast.FunctionDef) -> ast.FunctionDef:
        new = _shallow(tree)
        new.args = copy.deepcopy(tree.args)
        new.body = self._block(tree.body)
        return ast.fix_missing_locations(new)

    def _block(self, block: Block) -> Block:
        found: Block = []
        at = 0
        while at < len(block):
            statement = block[at]
            chains = [c for c in self._from.get(statement, []) if c.last in block]
            if not chains:
                found.append(self._node(statement))
                at += 1
                continue
            end = max(block.index(c.last) for c in chains if c.last is not None) + 1
            found += self._choice(chains, block[at:end])
            at = end
        return found

    def _choice(self, chains: list[Chain], block: Block) -> Block:
        written = [self._node(s) for s in block]
        for chain in reversed(chains):
            assert chain.last is not None
            fused = self._fused(chain) + self._block(block[block.index(chain.last) + 1 :])
            if not chain.tests:
                return fused
            tests = [copy.deepcopy(test) for test in chain.tests]
            test = tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests)
            written = [ast.copy_location(ast.If(test, fused, written), block[0])]
        return written

    def _fused(self, chain: Chain) -> Block:
        assert chain.statement is not None and chain.first is not None
        before: Block = []
        after: Block = []
        value: ast.expr = self._call(chain, self._node(chain.norm.args[0]))
        argument, statement = chain.norm.args[0], chain.statement
        alone = isinstance(statement, (ast.Assign, ast.Return)) and statement.value is chain.end
        simple = chain.first is statement or alone or isinstance(argument, ast.Name)
        if chain.between or not simple:
            # The norm's input is the one of its own time; so is its call where nothing is added.
            name = _VALUE if chain.add is None and not chain.is_tail else _INPUT
            kept: Any = value if name is _VALUE else self._node(chain.norm.args[0])
            before = [_assign(name, kept, chain.first)]
            load = ast.Name(name, ast.Load())
            value = load if name is _VALUE else self._call(chain, load)
            after = [_assign(name, ast.Constant(None), chain.statement)]
        statement = self._with(chain, value)
        if isinstance(statement, ast.Return):
            after = []
        return [*before, *self._block(list(chain.between)), statement, *after] + self._block(
            list(chain.rest)
        )

    def _with(self, chain: Chain, value: ast.expr) -> ast.stmt:
        """The statement that has the chain's end, with ``value`` in its place."""
        statement = chain.statement
        assert statement is not None
        if chain.end is None:
            assert isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name)
            return _assign(statement.target.id, value, statement)
        if chain.is_tail:
            return ast.copy_location(ast.Return(value), statement)
        new = self._node(statement, {chain.end: value})
        if self._tail and isinstance(new, ast.Return):
            new.value = _finish(new.value or ast.Constant(None), statement)
        return new

    def _call(self, chain: Chain, input: ast.expr) -> ast.Call:
        norm = copy.deepcopy(chain.norm.func)
        if chain.is_tail:
            new = helper("follow", norm)
            new.args += [input, ast.Name(REST, ast.Load())]
        else:
            # Keywords are evaluated in this order, which is the written one.
            new = helper("call")
            given: list[tuple[str, ast.expr]] = [("norm", norm), ("input", input)]
            if chain.add is not None and chain.residual is not None:
                residual = "residual", self._node(chain.residual)
                comes_first = chain.add == "right" and chain.first is chain.statement
                given.insert(1 if comes_first else 2, residual)
                given.append(("add", ast.Constant(chain.add)))
            if chain.activation is not None:
                given.append(("activation", copy.deepcopy(chain.activation)))
            if chain.options:
                keys: list[Any] = [ast.Constant(key) for key in chain.options]
                given.append(
                    ("options", ast.Dict(keys, [copy.deepcopy(v) for v in chain.options.values()]))
                )
            new.keywords = [ast.keyword(name, value) for name, value in given]
        place = chain.end if chain.end is not None else chain.statement
        return _located(new, place)

    def _node(self, node: Any, replaced: dict[ast.AST, ast.expr] | None = None) -> Any:
        """A copy, with the chains that lie within it as calls."""
        if replaced and node in replaced:
            return replaced[node]
        chain = self._within.get(node)
        if chain is not None and not isinstance(node, ast.stmt):
            return self._call(chain, self._node(chain.norm.args[0]))
        if isinstance(node, ast.Return) and self._tail and not replaced:
            return self._finished(node)
        if not isinstance(node, ast.AST):
            return node
        new = _shallow(node)
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(new, name, self._block(value))
            elif isinstance(value, list):
                setattr(new, name, [self._node(v, replaced) for v in value])
            elif isinstance(value, ast.AST):
                setattr(new, name, self._node(value, replaced))
        return new

    def _finished(self, node: ast.Return) -> ast.Return:
        value = ast.Constant(None) if node.value is None else self._node(node.value)
        chain = self._within.get(node.value) if node.value is not None else None
        if chain is None or not chain.is_tail:
            value = _finish(value, node)
        return ast.copy_location(ast.Return(value), node)


def _finish(value: ast.expr, place: ast.stmt) -> ast.expr:
    call = helper("finish")
    call.args += [value, ast.Name(REST, ast.Load())]
    return _located(call, place)


def _assign(name: str, value: ast.expr, place: ast.stmt) -> ast.stmt:
    target: list[ast.expr] = [ast.Name(name, ast.Store())]
    return _located(ast.Assign(target, value), place)


def _located(new: Any, place: Any) -> Any:
    """New nodes are where the old ones were, for tracebacks."""
    for node in ast.walk(new):
        if "lineno" in node._attributes and not hasattr(node, "lineno"):
            ast.copy_location(node, place)
    return new


def _shallow(node: Any) -> Any:
    new = type(node)(**dict(ast.iter_fields(node)))
    return ast.copy_location(new, node) if hasattr(node, "lineno") else new
