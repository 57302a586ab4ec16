"""What the names in a module's forward mean, as far as that is known without running it."""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnext.activations import ACTIVATIONS
from bnext.conversion.calls import is_watched
from bnext.conversion.source import NotUnderstood, Source, inspect_arguments, read

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "UNKNOWN"})()
_NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# What looks at a function's variables by other ways than their names, or leaves it half-way.
_FORBIDDEN_CALLS = frozenset({"locals", "vars", "eval", "exec", "dir", "_getframe"})
_FORBIDDEN = (
    ast.Yield, ast.YieldFrom, ast.Await, ast.AsyncFor, ast.AsyncWith, ast.Global, ast.Nonlocal,
)  # fmt: skip
# Modules whose forward makes a new tensor, and does nothing else to what it is given.
FRESH = (nn.modules.conv._ConvNd, nn.Linear)
_ACTIVATIONS = tuple(activation.module for activation in ACTIVATIONS.values())
_LEAVES = (
    *_ACTIVATIONS,
    *FRESH, nn.modules.batchnorm._BatchNorm, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.Identity,
    nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Softmax, nn.LayerNorm,
    nn.GroupNorm, nn.Flatten, nn.Upsample, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ZeroPad2d, nn.PixelShuffle, nn.PReLU,
)  # fmt: skip
_PLAIN_BUILTINS = (len, int, float, bool, min, max, abs, tuple, list, range, isinstance)


class Several(tuple[nn.Module, ...]):
    """What a variable of a ``for`` over modules is, one after the other."""


class Scope:
    """One function of a module, as called on this module.

    Attributes:
        module: what its first argument is.
        source: of the function.
        assigned: the names that it sets, its arguments too.
    """

    def __init__(self, module: nn.Module, source: Source) -> None:
        self.module, self.source = module, source
        self.parents: dict[ast.AST, ast.AST] = {}
        self.nested: set[str] = set()  # names in functions inside, and in comprehensions
        for node in ast.walk(source.tree):
            self._check(node)
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
        self.arguments = {a.arg for a in inspect_arguments(source.tree.args)}
        self.assigned = set(self.arguments)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                self.assigned.add(node.id)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                self.assigned.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self.assigned |= {(a.asname or a.name).partition(".")[0] for a in node.names}
            elif isinstance(node, _NESTED) and node is not source.tree:
                self.nested |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    self.assigned.add(node.name)
            elif isinstance(node, _COMPREHENSIONS):
                self.nested |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            elif isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
                self.assigned.add(node.name)
        self.loops: dict[str, Several] = {}
        first = source.first_argument
        stores = [n for n in ast.walk(source.tree) if isinstance(n, ast.Name) and n.id == first]
        if not first or any(not isinstance(n.ctx, ast.Load) for n in stores):
            raise NotUnderstood("its container's forward gives self another value")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.For):
                self._bind(node.target, self._iterated(node.iter))

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, _FORBIDDEN):
            kind = type(node).__name__.lower()
            raise NotUnderstood(
                f"its container's forward has a statement that is left alone: {kind}"
            )
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "type" and any(self._is_self(a) for a in node.args):
                raise NotUnderstood("its container's forward asks for its own class")
            if name in _FORBIDDEN_CALLS:
                raise NotUnderstood(f"its container's forward calls {name}")
        if isinstance(node, ast.Attribute) and node.attr == "__class__":
            raise NotUnderstood("its container's forward asks for a class")
        names = [getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "arg", "")]
        for name in names:
            if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
                raise NotUnderstood(f"its container's forward uses {name}, a private name")

    def _iterated(self, node: ast.expr) -> Any:
        """What a ``for`` gets of an expression: modules, for each target of a zip or enumerate."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            function = self.resolve(node.func)
            if function is zip:
                return [self._iterated(argument) for argument in node.args]
            if function is enumerate and len(node.args) == 1:
                return [None, self._iterated(node.args[0])]
            return None
        modules = self.resolve(node)
        if isinstance(modules, (nn.ModuleList, nn.Sequential)):
            return Several(m for m in modules._modules.values() if m is not None)
        return None

    def _bind(self, target: ast.expr, found: Any) -> None:
        if isinstance(found, Several) and isinstance(target, ast.Name):
            sets = [
                n
                for n in ast.walk(self.source.tree)
                if isinstance(n, ast.Name) and n.id == target.id
                if not isinstance(n.ctx, ast.Load)
            ]
            if sets == [target] and target.id not in self.arguments and found:
                self.loops[target.id] = found
        elif isinstance(found, list) and isinstance(target, ast.Tuple):
            for one, part in zip(target.elts, found, strict=False):
                self._bind(one, part)

    def _is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.source.first_argument

    def reachable(self) -> Iterator[ast.AST]:
        """All nodes, in order, but those behind a test that is false on the module as it is."""
        todo: list[ast.AST] = [self.source.tree]
        while todo:
            node = todo.pop()
            yield node
            left_out: Any = []
            if isinstance(node, (ast.If, ast.IfExp)):
                left_out = {True: node.orelse, False: node.body, None: []}[self.truth(node.test)]
            left_out = left_out if isinstance(left_out, list) else [left_out]
            todo += reversed([n for n in ast.iter_child_nodes(node) if n not in left_out])

    def resolve(self, node: ast.expr) -> Any:
        """The object that an expression is, or UNKNOWN: of ``self``, its attributes, constants and
        global names only."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._resolve_name(node.id)
        if isinstance(node, ast.Attribute):
            return _attribute(self.resolve(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            return _item(self.resolve(node.value), self.resolve(node.slice))
        if is_getattr(node):
            assert isinstance(node, ast.Call)
            found = _attribute(self.resolve(node.args[0]), node.args[1].value)  # type: ignore[attr-defined]
            if found is _ABSENT:
                return self.resolve(node.args[2])
            return found
        return UNKNOWN

    def _resolve_name(self, name: str) -> Any:
        if name == self.source.first_argument:
            return self.module
        if name in self.assigned:
            return self.loops.get(name, UNKNOWN)
        inner = self.source.inner
        if name in inner.__code__.co_freevars:
            cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
            try:
                return cells[name].cell_contents
            except ValueError:
                return UNKNOWN
        return inner.__globals__.get(name, getattr(builtins, name, UNKNOWN))

    def is_pure(self, node: ast.expr) -> bool:
        """Whether it may be evaluated at any time before what it reads is changed, any number of
        times: names, attributes of ``self``, constants, and tests of them."""
        if isinstance(node, (ast.Name, ast.Constant)):
            return True
        if isinstance(node, ast.Attribute):
            return self.is_pure(node.value) and self.resolve(node) is not UNKNOWN
        if isinstance(node, ast.BoolOp):
            return all(map(self.is_pure, node.values))
        if isinstance(node, ast.UnaryOp):
            return self.is_pure(node.operand)
        if isinstance(node, ast.Compare):
            same = all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
            sides = [node.left, *node.comparators]
            if not same:  # == of numbers and strings
                same = all(
                    isinstance(self.resolve(s), (int, float, str, type(None))) for s in sides
                )
            return same and all(map(self.is_pure, sides))
        if isinstance(node, ast.Subscript):
            return isinstance(self.resolve(node), nn.Module) and self.is_pure(node.value)
        return is_getattr(node)

    def truth(self, test: ast.expr) -> bool | None:
        """What a pure test is on this module; None if that is not known."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            values = [self.truth(value) for value in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in values:
                return decisive
            return None if None in values else not decisive
        if isinstance(test, ast.Compare):
            if len(test.ops) != 1:
                return None
            left, right = self.resolve(test.left), self.resolve(test.comparators[0])
            if left is UNKNOWN or right is UNKNOWN:
                return None
            if isinstance(test.ops[0], (ast.Is, ast.IsNot)):
                return (left is right) == isinstance(test.ops[0], ast.Is)
            if isinstance(test.ops[0], (ast.Eq, ast.NotEq)):
                return bool(left == right) == isinstance(test.ops[0], ast.Eq)
            return None
        value = self.resolve(test)
        if isinstance(test, ast.Attribute) and test.attr == "training":
            return None
        if value is None or isinstance(value, (bool, int, float, str)):
            return bool(value)
        return True if isinstance(value, nn.Module) and not hasattr(value, "__len__") else None

    def is_harmless(self, node: ast.AST) -> bool:
        """Whether it changes nothing but local names: no tensor, module or global state."""
        if isinstance(node, (ast.Name, ast.Constant, ast.Pass, ast.expr_context, ast.operator)):
            return True
        if isinstance(node, (ast.unaryop, ast.boolop, ast.cmpop, ast.arguments)):
            return True
        if isinstance(node, ast.Attribute):
            if not isinstance(node.ctx, ast.Load):
                return False
            known = self.resolve(node)
            if self.resolve(node.value) is not UNKNOWN:
                return known is not UNKNOWN
            return self.is_harmless(node.value) and node.attr in ("shape", "dtype", "device", "T")
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(k.value for k in node.keywords)]
            return all(map(self.is_harmless, arguments)) and self._is_harmless_call(node)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return (
                all(map(_is_name, targets))
                and node.value is not None
                and self.is_harmless(node.value)
            )
        if isinstance(node, ast.If):
            return all(map(self.is_harmless, [node.test, *node.body, *node.orelse]))
        if isinstance(node, (ast.Return, ast.Expr)):
            return node.value is None or self.is_harmless(node.value)
        if isinstance(
            node,
            (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Tuple, ast.List)
            + (ast.Subscript, ast.Slice, ast.Starred),
        ):
            return all(map(self.is_harmless, ast.iter_child_nodes(node)))
        return False

    def _is_harmless_call(self, node: ast.Call) -> bool:
        if is_getattr(node):
            return True
        function = self.resolve(node.func)
        if isinstance(function, (nn.Module, Several)):
            return all(map(is_harmless_module, as_modules(function)))
        if any(k.arg in ("out", "inplace", None) for k in node.keywords):
            return False
        return function is not UNKNOWN and is_harmless_function(function, len(node.args))


_ABSENT: Any = object()


def as_modules(value: Any) -> tuple[nn.Module, ...]:
    return value if isinstance(value, Several) else (value,) if isinstance(value, nn.Module) else ()


def is_getattr(node: ast.AST) -> bool:
    """``getattr(self, "name", None)``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) == 3
        and isinstance(node.args[0], ast.Name)
        and isinstance(node.args[1], ast.Constant)
        and isinstance(node.args[2], ast.Constant)
        and not node.keywords
    )


def _is_name(node: ast.AST) -> bool:
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(map(_is_name, node.elts))
    return isinstance(node, ast.Name)


def _attribute(owner: Any, name: str) -> Any:
    """Without running code of the model's: no property, no ``__getattr__``."""
    if owner is UNKNOWN or owner is _ABSENT:
        return UNKNOWN
    if isinstance(owner, ModuleType):
        return vars(owner).get(name, UNKNOWN)
    if isinstance(owner, nn.Module):
        if type(owner).__getattr__ is not nn.Module.__getattr__:
            return UNKNOWN
        found = inspect.getattr_static(type(owner), name, _ABSENT)
        if found is not _ABSENT and hasattr(type(found), "__set__"):
            return UNKNOWN
        for members in (vars(owner), owner._parameters, owner._buffers, owner._modules):
            if name in members:
                return members[name]
        if found is _ABSENT or not hasattr(type(found), "__get__"):
            return found
        return UNKNOWN
    if isinstance(owner, type) and issubclass(owner, Tensor):
        return inspect.getattr_static(owner, name, UNKNOWN)
    return UNKNOWN


def _item(owner: Any, key: Any) -> Any:
    if isinstance(owner, (nn.Sequential, nn.ModuleList)) and isinstance(key, int):
        torch_class: Any = nn.Sequential if isinstance(owner, nn.Sequential) else nn.ModuleList
        children = list(owner._modules.values())
        if type(owner).__getitem__ is torch_class.__getitem__:
            return children[key] if -len(children) <= key < len(children) else UNKNOWN
    if isinstance(owner, nn.ModuleDict) and isinstance(key, str):
        return owner._modules.get(key, UNKNOWN)
    return UNKNOWN


def is_harmless_function(function: Any, positional: int) -> bool:
    """Functions of torch that make new tensors or views, and plain Python ones."""
    if any(function is f for f in _PLAIN_BUILTINS):
        return True
    name = getattr(function, "__name__", "_")
    if name.endswith("_") or "dropout" in name or "rand" in name:
        return False
    public = getattr(F, name, None) is function
    if public and positional > 1 and "inplace" in inspect.signature(function).parameters:
        return False
    return public or getattr(torch._C._VariableFunctions, name, None) is function


def is_harmless_module(module: nn.Module) -> bool:
    """Whether calling it changes nothing but itself: not what it is given, and no global state."""
    if is_watched(module) or _works_in_place(module):
        return False
    cls = original_class(module)
    if isinstance(module, _LEAVES) and cls.__module__.partition(".")[0] in ("torch", "bnext"):
        return True
    if isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward:
        fresh = False
        for child in module:
            may_be_in_place = fresh and type(child) in _ACTIVATIONS
            if not may_be_in_place and not is_harmless_module(child):
                return False
            fresh = fresh or isinstance(child, FRESH)
        return True
    if not isinstance(cls.forward, FunctionType) or cls.__module__.partition(".")[0] == "torch":
        return False
    try:
        scope = Scope(module, read(cls.forward))
    except NotUnderstood:
        return False
    if scope.source.function is not scope.source.inner:
        return False
    return all(map(scope.is_harmless, scope.source.tree.body))


def _works_in_place(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before convert."""
    original: type[nn.Module] = vars(type(module)).get("_bnext_original", type(module))
    return original
