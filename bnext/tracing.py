"""One module's own forward as a graph, or why there is none that is provably the same function.

``torch.fx`` follows one path through the Python code. What it would get wrong in silence is refused
here: code that asks whether an argument is None, computes with tensors that are not its inputs,
sets attributes or draws random numbers. Paths that depend on ``self.training``, or on whether an
argument is a tensor, are all followed.
"""

from __future__ import annotations

import dis
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


def _package(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]


class Untraceable(Exception):
    """Its message is the reason, as a report gives it."""


@dataclass(frozen=True)
class Paths:
    """The ways through a module's forward, its submodules as opaque calls.

    Attributes:
        graphs: one for every way.
        methods: the other methods of its class that forward calls.
    """

    graphs: list[fx.Graph]
    methods: set[str]

    @property
    def one(self) -> bool:
        """Whether all ways are one."""
        return len({graph.python_code("self").src for graph in self.graphs}) == 1


def paths(module: nn.Module) -> Paths:
    """The ways through ``module.forward``.

    Raises:
        Untraceable: a graph might not be what the code does.
    """
    if isinstance(module, jit.ScriptModule):
        raise Untraceable("its container is a TorchScript module")
    if "forward" in vars(module):
        raise Untraceable("its container's forward was replaced")
    graphs: list[fx.Graph] = []
    codes: set[CodeType] = set()
    for training in (True, False):
        tracer = _Tracer(is_tensor=True)
        graphs.append(_trace(tracer, module, training, codes))
        if tracer.asked_for_a_type:
            graphs.append(_trace(_Tracer(is_tensor=False), module, training, codes))
    for code in codes:
        _check(code)
    methods = {
        code.co_name
        for code in codes
        if code is not type(module).forward.__code__ and _is_method(type(module), code)
    }
    return Paths(graphs, methods)


def _is_method(cls: type, code: CodeType) -> bool:
    return getattr(getattr(cls, code.co_name, None), "__code__", None) is code


def _trace(tracer: _Tracer, module: nn.Module, training: bool, codes: set[CodeType]) -> fx.Graph:
    with _in_mode(module, training), _restored(module) as changed, _watched(codes):
        try:
            with _OnlyProxies():
                graph = tracer.trace(module)
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


def _check(code: CodeType) -> None:
    """A proxy is never None, and random numbers that Python draws are drawn once."""
    if "random" in code.co_names:
        raise Untraceable("its container draws random numbers")
    instructions = list(dis.get_instructions(code))
    for at, instruction in enumerate(instructions):
        if instruction.opname == "IS_OP":
            operands = instructions[at - 2 : at]
        elif instruction.opname.endswith("_NONE"):  # a jump
            operands = instructions[at - 1 : at]
        else:
            continue
        for operand in operands:  # an attribute of the module is no proxy
            if operand.opname.startswith(("LOAD_FAST", "STORE_FAST", "LOAD_DEREF")):
                raise Untraceable(f"its container asks whether {operand.argval} is None")
