"""A function's source as a syntax tree, and back: only its code is another, all else is kept.

A tree is trusted only if it compiles to the code that the function has.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

_FEATURES = functools.reduce(
    lambda a, b: a | b, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names)
)


class NotUnderstood(Exception):
    """Its message is the reason, as a report gives it."""


@dataclass(frozen=True)
class Source:
    """A function as written.

    Attributes:
        function: what the class has, with its decorators.
        inner: the function that was written.
        tree: its definition, without decorators, defaults and annotations; lines as in its file.
        imported: the global names in it that its file imports.
    """

    function: FunctionType
    inner: FunctionType
    tree: ast.FunctionDef
    imported: tuple[str, ...] = ()

    @property
    def first_argument(self) -> str:
        arguments = self.tree.args.posonlyargs + self.tree.args.args
        return arguments[0].arg if arguments else ""


def read(function: Any) -> Source:
    """The source of a function.

    Raises:
        NotUnderstood: it has none, or another than its code.
    """
    inner = function
    while isinstance(inner, FunctionType) and hasattr(inner, "__wrapped__"):
        if _cell_of(inner, inner.__wrapped__) is None:
            raise NotUnderstood("a decorator of its container's forward is not understood")
        inner = inner.__wrapped__
    if not isinstance(inner, FunctionType):
        raise NotUnderstood("its container's forward is not a Python function")
    try:
        lines, first = inspect.getsourcelines(inner)
        # Under an `if`, for the columns to be those of the file.
        indented = lines[0][:1].isspace()
        (statement,) = ast.parse("if True:\n" * indented + "".join(lines)).body
    except (OSError, TypeError, SyntaxError, ValueError):
        raise NotUnderstood("its container's forward has no source") from None
    tree = statement.body[0] if isinstance(statement, ast.If) else statement
    if not isinstance(tree, ast.FunctionDef):
        raise NotUnderstood("its container's forward is not written as a function")
    ast.increment_lineno(tree, first - 1 - indented)
    _strip(tree)
    for imported in _imported(inner):
        source = Source(function, inner, tree, imported)
        if _same_code(_compile(source, tree, ()), inner.__code__):
            return source
    raise NotUnderstood("the source of its container's forward is not what runs")


def _imported(function: FunctionType) -> list[tuple[str, ...]]:
    """Which global names may have been imported: since Python 3.11 the code of calls of their
    attributes is another."""
    own = function.__module__
    names = {
        n: function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__
    }
    modules = tuple(n for n, v in names.items() if isinstance(v, ModuleType))
    foreign = tuple(n for n, v in names.items() if getattr(v, "__module__", None) != own)
    return [modules, foreign, ()]


def build(source: Source, tree: ast.FunctionDef, names: Mapping[str, Any]) -> FunctionType:
    """The function with another tree, in which ``names`` are known too; decorated as before."""
    old = source.inner
    code = _compile(source, ast.fix_missing_locations(tree), tuple(names))
    cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
    cells |= {name: CellType(value) for name, value in names.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    new: Any = _copy(old, code, closure)
    for decorated in reversed(_wrappers(source.function)):
        cell = _cell_of(decorated, decorated.__wrapped__)
        assert decorated.__closure__ is not None
        closure = tuple(CellType(new) if c is cell else c for c in decorated.__closure__)
        wrapper = _copy(decorated, decorated.__code__, closure)
        wrapper.__wrapped__ = new
        new = wrapper
    return new


def _wrappers(function: Any) -> list[Any]:
    found = []
    while hasattr(function, "__wrapped__"):
        found.append(function)
        function = function.__wrapped__
    return found


def _cell_of(wrapper: FunctionType, inner: Any) -> CellType | None:
    """The one variable through which a decorator's wrapper reaches what it wraps."""
    found = []
    for cell in wrapper.__closure__ or ():
        try:
            if cell.cell_contents is inner:
                found.append(cell)
        except ValueError:
            continue  # empty
    return found[0] if len(found) == 1 else None


def _copy(old: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> Any:
    new = FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
    new.__kwdefaults__ = old.__kwdefaults__
    new.__annotations__ = old.__annotations__
    new.__qualname__, new.__module__, new.__doc__ = old.__qualname__, old.__module__, old.__doc__
    new.__dict__.update(old.__dict__)
    return new


def _strip(tree: ast.FunctionDef) -> None:
    """Of what runs when a function is defined, not when it is called."""
    tree.decorator_list, tree.returns = [], None
    arguments = tree.args
    for argument in inspect_arguments(arguments):
        argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [d and ast.Constant(None) for d in arguments.kw_defaults]
    ast.fix_missing_locations(tree)


def inspect_arguments(arguments: ast.arguments) -> list[ast.arg]:
    all_of = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return all_of + [a for a in (arguments.vararg, arguments.kwarg) if a is not None]


def _compile(source: Source, tree: ast.FunctionDef, names: tuple[str, ...]) -> CodeType:
    """Inside a function that has its free variables."""
    old = source.inner.__code__
    variables = dict.fromkeys((*old.co_freevars, *names))
    outer = ast.FunctionDef(
        name="outer",
        args=ast.arguments([], [ast.arg(n) for n in variables], None, [], [], None, []),
        body=[tree, ast.Return(ast.Name(tree.name, ast.Load()))],
        decorator_list=[],
    )
    ast.copy_location(outer, tree)
    if hasattr(ast, "TypeVar"):  # Python 3.12
        outer.type_params = []  # type: ignore[attr-defined]
    imports = [ast.Import([ast.alias(name)]) for name in source.imported]
    module = ast.fix_missing_locations(ast.Module([*imports, outer], []))
    flags = old.co_flags & _FEATURES
    code = compile(module, old.co_filename, "exec", flags, dont_inherit=True)
    return _code_in(_code_in(code, "outer"), tree.name)


def _code_in(code: CodeType, name: str) -> CodeType:
    return next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)


def _same_code(one: CodeType, other: CodeType) -> bool:
    if any(
        getattr(one, name) != getattr(other, name)
        for name in ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")
    ):
        return False
    return len(one.co_consts) == len(other.co_consts) and all(
        _same_code(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else _same(a, b)
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or one != one)
