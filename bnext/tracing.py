"""One module's own forward as a graph, or why there is none that is provably the same function.

``torch.fx`` follows one path through the Python code. What it would get wrong in silence is refused
here: code that asks whether a value is None, computes with tensors that are not its inputs, sets
attributes or draws random numbers. Paths that depend on ``self.training``, on whether an argument
is None, or on whether it is a tensor, are all followed.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, fx, jit, nn
from torch.overrides import TorchFunctionMode

# Code of which proxies are known, or which never sees them.
_TRUSTED = {"torch", "bnext"} | sys.stdlib_module_names


_MOST_OPTIONAL = 3  # arguments that may be None: each doubles the paths


def _package(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]


class Untraceable(Exception):
    """Its message is the reason, as a report gives it."""


@dataclass(frozen=True)
class Paths:
    """The ways through a module's forward, its submodules as opaque calls.

    Attributes:
        by_none: the graphs for every set of arguments that are None, where the code asks for that.
        methods: the other methods of its class that forward calls.
    """

    by_none: dict[frozenset[str], list[fx.Graph]]
    methods: set[str]

    @property
    def graphs(self) -> list[fx.Graph]:
        return [graph for graphs in self.by_none.values() for graph in graphs]

    @property
    def decided_by_arguments(self) -> bool:
        """Whether the arguments alone decide which way is taken."""
        codes = [{g.python_code("self").src for g in graphs} for graphs in self.by_none.values()]
        return all(len(code) == 1 for code in codes)


def paths(module: nn.Module) -> Paths:
    """The ways through ``module.forward``.

    Raises:
        Untraceable: a graph might not be what the code does.
    """
    if isinstance(module, jit.ScriptModule):
        raise Untraceable("its container is a TorchScript module")
    if "forward" in vars(module):
        raise Untraceable("its container's forward was replaced")
    cls = type(module)
    if cls.__module__.partition(".")[0] == "torch" and not isinstance(module, fx.GraphModule):
        raise Untraceable(f"its container is torch's {cls.__name__}")  # may talk to other processes
    forward = inspect.unwrap(type(module).forward).__code__
    optional = sorted(_arguments_that_may_be_none(forward))
    by_none: dict[frozenset[str], list[fx.Graph]] = {}
    codes: set[CodeType] = set()
    for size in range(len(optional) + 1):
        for none in itertools.combinations(optional, size):
            graphs = by_none.setdefault(frozenset(none), [])
            for training in (True, False):
                tracer = _Tracer(is_tensor=True)
                graphs.append(_trace(tracer, module, training, none, codes))
                if tracer.asked_for_a_type:
                    other = _Tracer(is_tensor=False)
                    graphs.append(_trace(other, module, training, none, codes))
    for code in codes:
        if "random" in code.co_names:
            raise Untraceable("its container draws random numbers")
        if code is not forward:
            for name, _ in _asked_whether_none(code):
                raise Untraceable(f"its container asks whether {name} is None")
    methods = {c.co_name for c in codes if c is not forward and _is_method(type(module), c)}
    return Paths(by_none, methods)


def _is_method(cls: type, code: CodeType) -> bool:
    return getattr(getattr(cls, code.co_name, None), "__code__", None) is code


def _trace(
    tracer: _Tracer,
    module: nn.Module,
    training: bool,
    none: tuple[str, ...],
    codes: set[CodeType],
) -> fx.Graph:
    with _in_mode(module, training), _restored(module) as changed, _watched(codes):
        try:
            with _OnlyProxies():
                graph = tracer.trace(module, dict.fromkeys(none) or None)
        except Untraceable:
            raise
        except Exception as error:  # whatever the code does to a proxy
            first_line = str(error).strip().partition("\n")[0]
            raise Untraceable(
                f"torch.fx cannot trace its container: {first_line or type(error).__name__}"
            ) from error
        if changed():
            raise Untraceable("its container sets attributes")
    return graph


class _Proxy(fx.Proxy):
    """A value that says, on one path, that it is a tensor, and on the other that it is not."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What isinstance falls back on, and torch's own checks of types."""
        asker = sys._getframe(1)
        if _package(asker) in _TRUSTED or "isinstance" not in asker.f_code.co_names:
            return _Proxy
        tracer: Any = self.tracer
        tracer.asked_for_a_type = True
        return Tensor if tracer.is_tensor else object


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, is_tensor: bool) -> None:
        super().__init__()
        self.is_tensor = is_tensor
        self.asked_for_a_type = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is not _Proxy and isinstance(a, Tensor):
            raise Untraceable("its container uses a tensor that is not an input")
        return super().create_arg(a)


class _OnlyProxies(TorchFunctionMode):
    """Refuses torch's functions without an input among the arguments: the results would be frozen
    in the graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        proxies = []
        fx.node.map_aggregate((args, kwargs), lambda a: proxies.append(type(a) is _Proxy))
        if not any(proxies):
            name = getattr(func, "__name__", str(func))
            raise Untraceable(f"its container calls {name} on something that is not an input")
        return func(*args, **kwargs)


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = {m: m.training for m in module.modules()}
    try:
        for m in before:
            m.training = training
        yield
    finally:
        for m, flag in before.items():
            m.training = flag


@contextmanager
def _restored(module: nn.Module) -> Iterator[Any]:
    """Yields whether the module has other attributes than before, which it gets back."""
    members = ("_parameters", "_buffers", "_modules")
    attributes = dict(vars(module))
    entries = {name: dict(attributes[name]) for name in members}

    def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one.keys() != other.keys() or any(one[k] is not other[k] for k in one)

    def changed() -> bool:
        return differ(attributes, vars(module)) or any(
            differ(entries[name], attributes[name]) for name in members
        )

    try:
        yield changed
    finally:
        if changed():
            vars(module).clear()
            vars(module).update(attributes)
            for name in members:
                attributes[name].clear()
                attributes[name].update(entries[name])


@contextmanager
def _watched(codes: set[CodeType]) -> Iterator[None]:
    """Adds the code of the model's Python functions that run meanwhile."""

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and _package(frame) not in _TRUSTED:
            codes.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _arguments_that_may_be_none(forward: CodeType) -> set[str]:
    """Those that ``forward`` asks for, each of them before it sets it."""
    arguments = forward.co_varnames[1 : forward.co_argcount]
    found: set[str] = set()
    for name, as_called in _asked_whether_none(forward):
        if name not in arguments or not as_called or len(found | {name}) > _MOST_OPTIONAL:
            raise Untraceable(f"its container asks whether {name} is None")
        found.add(name)
    return found


def _asked_whether_none(code: CodeType) -> Iterator[tuple[str, bool]]:
    """Variables that are compared by identity, and whether they had no new value until then. A
    proxy is never None; attributes of a module are no proxies."""
    instructions = list(dis.get_instructions(code))
    changed: set[str] = set()
    for at, instruction in enumerate(instructions):
        if instruction.opname.startswith("STORE_FAST"):
            names = instruction.argval  # of two, in Python 3.13
            changed.update(names if isinstance(names, tuple) else [names])
        if instruction.opname == "IS_OP":
            operands = instructions[at - 2 : at]
        elif instruction.opname.endswith("_NONE"):  # a jump
            operands = instructions[at - 1 : at]
        else:
            continue
        for operand in operands:
            if operand.opname.startswith(("LOAD_FAST", "STORE_FAST", "LOAD_DEREF")):
                yield str(operand.argval), operand.argval not in changed
