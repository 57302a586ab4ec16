"""Modules with a rewritten forward: of a subclass, made at run time, of their own class.

So a module stays what it is for ``isinstance``, hooks, ``state_dict`` and its other methods, and
its ``__class__`` is all there is to undo. Modules with the same code share a class, which saves
``torch.compile`` work; pickles hold the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import linecache
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, fx, nn

from bnext.pairs import Pair
from bnext.tracing import Untraceable

# A global name of the code: what it is called there, its module, and its name in that; None is the
# module itself.
Reference = tuple[str, str, str | None]
_LITERALS = (type(None), bool, int, float, str)


def rewritten(
    cls: type[nn.Module], ways: dict[frozenset[str], tuple[fx.Graph, list[Pair]]]
) -> type[nn.Module]:
    """``cls`` with the forward that the graphs are once each pair is one call; there is a graph for
    every set of arguments that are None.

    Raises:
        Untraceable: the code uses what cannot be imported.
    """
    if cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__:
        raise Untraceable("its container has a way of its own to be copied")
    sources, references = [], set()
    for i, (graph, pairs) in enumerate(ways.values()):
        source, used = _source(graph, pairs)
        sources.append(source.replace("def forward(", f"def _forward_{i}(", 1))
        references |= used
    if len(ways) == 1:
        (source,) = sources
        source = source.replace("def _forward_0(", "def forward(", 1)
    else:
        source = "\n\n".join([*sources, _dispatch(cls, list(ways))])
    return subclass(cls, source, tuple(sorted(references, key=str)))


def _dispatch(cls: type[nn.Module], ways: list[frozenset[str]]) -> str:
    """A forward with the arguments of the class's own, which calls the one of the ways."""
    parameters = inspect.signature(cls.forward).parameters.values()
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise Untraceable("its container's forward has keyword-only or variable arguments")
    if any(not isinstance(p.default, (type(p.empty), *_LITERALS)) for p in parameters):
        raise Untraceable("its container's forward has a default that is no literal")
    declared = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    called = ", ".join(p.name for p in parameters)
    asked = sorted(frozenset().union(*ways))
    lines = [f"def forward({', '.join(declared)}):"]
    for i, none in enumerate(ways):
        tests = [f"{name} is {'' if name in none else 'not '}None" for name in asked]
        lines += [f"    if {' and '.join(tests)}:", f"        return _forward_{i}({called})"]
    return "\n".join(lines) + "\n"


def _source(graph: fx.Graph, pairs: list[Pair]) -> tuple[str, set[Reference]]:
    """The function ``forward`` of one way, and the global names it uses."""
    for pair in pairs:
        with graph.inserting_before(pair.act):
            if pair.residual is None:
                fused = graph.call_module(pair.name, pair.norm.args)
            else:
                arguments = graph.get_attr(pair.name), *pair.norm.args, pair.residual
                fused = graph.call_function(add_and_activate, arguments)
        pair.act.replace_all_uses_with(fused)
        for node in (pair.act, pair.add, *reversed(pair.between), pair.norm):
            if node is not None:
                graph.erase_node(node)
    for node in graph.nodes:
        node.type = None  # annotations may name what cannot be imported
    code = graph.python_code("self")
    names = {n.id for n in ast.walk(ast.parse(code.src)) if isinstance(n, ast.Name)}
    references = {_reference(name, code.globals[name]) for name in names & {*code.globals}}
    return code.src.strip() + "\n", references


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a rewritten module before, the class of others."""
    original: type[nn.Module] = vars(type(module)).get("_bnext_original", type(module))
    return original


def add_and_activate(norm: nn.Module, input: Tensor, residual: Tensor) -> Tensor:
    """``activation(norm(input) + residual)``, also where the sum broadcasts or promotes."""
    fits = residual.shape == input.shape and residual.dtype == input.dtype
    if fits and residual.device == input.device:
        return norm(input, residual)
    plain: Any = norm
    total = plain._fused(input, None, None) + residual
    return _FUNCTIONS[plain.activation](total)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "silu": nn.functional.silu,
}


def _reference(name: str, value: Any) -> Reference:
    if isinstance(value, ModuleType):
        return name, value.__name__, None
    candidates = [
        (getattr(value, "__module__", None), getattr(value, "__qualname__", name)),
        ("math", name), ("types", name), ("torch", name),
    ]  # fmt: skip
    for module, qualified in candidates:
        if module is not None and _find(module, qualified) is value:
            return name, module, qualified
    raise Untraceable(f"its container uses {name}, which cannot be imported")


def _find(module: str, qualified: str | None) -> Any:
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split(".") if qualified else ():
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


_subclasses: dict[tuple[Any, ...], type[nn.Module]] = {}


def subclass(
    cls: type[nn.Module], source: str, references: tuple[Reference, ...] = ()
) -> type[nn.Module]:
    """``cls`` with the ``forward`` that ``source`` defines; always the same class."""
    key = cls, source, references
    if key not in _subclasses:
        _subclasses[key] = _make_subclass(*key)
    return _subclasses[key]


def _make_subclass(
    cls: type[nn.Module], source: str, references: tuple[Reference, ...]
) -> type[nn.Module]:
    scope = {name: _find(module, qualified) for name, module, qualified in references}
    filename = f"<bnext.convert: {cls.__qualname__} {hash(source):x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), scope)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = super(new, self).__reduce_ex__(protocol)  # type: ignore[misc]
        return _new, (cls, source, references), *state

    new: type[nn.Module] = type(
        cls.__name__,
        (cls,),
        {
            "forward": scope["forward"],
            "__reduce_ex__": __reduce_ex__,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_bnext_original": cls,
        },
    )
    return new


def _new(cls: type[nn.Module], source: str, references: tuple[Reference, ...]) -> nn.Module:
    new = subclass(cls, source, references)
    return new.__new__(new)
