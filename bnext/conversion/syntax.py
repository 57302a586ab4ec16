"""Small questions about syntax trees, and pieces of them that edited forwards have."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable

Block = list[ast.stmt]
MODULE = "_bnext_calls"  # what an edited forward calls calls.py
TRY = (ast.Try, ast.TryStar) if hasattr(ast, "TryStar") else (ast.Try,)


def helper_name(name: str) -> ast.Attribute:
    """A function of ``calls.py``."""
    return ast.Attribute(ast.Name(MODULE, ast.Load()), name, ast.Load())


def helper(name: str, *arguments: ast.expr) -> ast.Call:
    """A call of it."""
    return ast.Call(helper_name(name), [copy.deepcopy(a) for a in arguments], [])


class Substitution(ast.NodeTransformer):
    """Names as the expressions that they stand for."""

    def __init__(self, known: dict[str, ast.expr]) -> None:
        self._known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self._known[node.id]) if node.id in self._known else node


def mentions(node: ast.AST, name: str) -> list[ast.Name]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name]


def names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def assigned(statements: Iterable[ast.stmt]) -> set[str]:
    return {
        n.id
        for s in statements
        for n in ast.walk(s)
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)
    }


def has(node: ast.AST, kinds: type | tuple[type, ...]) -> bool:
    return any(isinstance(n, kinds) for n in ast.walk(node))


def is_starred(call: ast.Call) -> bool:
    return any(isinstance(a, ast.Starred) for a in call.args)


def block_of(parents: dict[ast.AST, ast.AST], statement: ast.stmt) -> Block:
    """The list of statements that it is one of."""
    for _, value in ast.iter_fields(parents[statement]):
        if isinstance(value, list) and statement in value:
            return value
    raise AssertionError("a statement is in its parent")


def block_after(parents: dict[ast.AST, ast.AST], statement: ast.stmt) -> Block:
    block = block_of(parents, statement)
    return block[block.index(statement) + 1 :]


def statement_before(parents: dict[ast.AST, ast.AST], statement: ast.stmt) -> ast.stmt | None:
    block = block_of(parents, statement)
    at = block.index(statement)
    return block[at - 1] if at else None
