"""What of a forward becomes one call of a layer: a *chain* begins with the call of a norm, and goes
on by an addition, or an activation, or both."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Chain:
    """What follows one call of a norm.

    Attributes:
        norm: the call.
        name: of the activation, None if there is none.
        activation, options: the expression that is called, and its arguments after the first.
        add, residual: how (``calls.ADDITIONS``) and what is added.
        end: the expression whose value the chain is; None while it is not complete.
        tests: what must be true of the module and the arguments, as expressions.
        between: statements that run between the norm and the end.
        first, last: the statements of the block with the norm and, within it or not, the end.
        rest: statements after the end's, in the body of an ``if`` that the chain follows.
        statement: the one with the end.
        path: the operations, from the norm's call to the end.
        is_tail: it ends with the return of the norm's output, to which a caller may add.
    """

    norm: ast.Call
    name: str | None = None
    activation: ast.expr | None = None
    options: dict[str, ast.expr] = field(default_factory=dict)
    add: str | None = None
    residual: ast.expr | None = None
    end: ast.expr | None = None
    tests: tuple[ast.expr, ...] = ()
    between: tuple[ast.stmt, ...] = ()
    first: ast.stmt | None = None
    last: ast.stmt | None = None
    rest: tuple[ast.stmt, ...] = ()
    statement: ast.stmt | None = None
    path: tuple[ast.AST, ...] = ()
    is_tail: bool = False

    @property
    def is_expression(self) -> bool:
        """Whether it lies within one expression, and holds whatever the module is."""
        return self.first is self.statement and not self.tests


@dataclass(frozen=True)
class Found:
    """The ways on from one norm's call; none: ``reason`` says why."""

    call: ast.Call
    modules: tuple[nn.Module, ...]
    ways: tuple[Chain, ...] = ()
    reason: str = ""
