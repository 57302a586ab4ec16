"""Which batch norms of a graph, or of an ``nn.Sequential``, one fused layer computes with the
addition and the activation that follow."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

_FUNCTIONS: dict[Callable[..., Any], str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    F.silu: "silu", F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu",
}  # fmt: skip
_METHODS = {"relu": "relu", "relu_": "relu"}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FRESH = (nn.modules.conv._ConvNd, nn.Linear)
_FRESH_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear, torch.cat)
_SLOPE = nn.LeakyReLU().negative_slope  # csrc/core/activation.h has the same


@dataclass(frozen=True)
class Pair:
    """The nodes of a graph that one fused layer computes."""

    norm: fx.Node
    activation: str
    act: fx.Node
    add: fx.Node | None = None
    residual: fx.Node | None = None
    between: tuple[fx.Node, ...] = ()  # nn.Identity

    @property
    def name(self) -> str:
        return str(self.norm.target)

    @property
    def act_name(self) -> str | None:
        """The activation's, where it is a module that is called."""
        return str(self.act.target) if self.act.op == "call_module" else None

    @property
    def key(self) -> tuple[str, str, str | None]:
        """What all ways through one forward must agree on."""
        return self.name, self.activation, self.act_name


def module_activation(module: nn.Module) -> str | None:
    """The name of the activation that the fused layer has for a module."""
    kind = type(module)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.LeakyReLU and module.negative_slope == _SLOPE:
        return "leaky_relu"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Hooks that see what a module gets or returns, which fusing would change."""
    return any(
        vars(module).get(name)
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )


class Finder:
    """Looks for the pairs of the graph of ``root``'s forward."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._root = root
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self._taken: set[fx.Node] = set()

    def norms(self, is_norm: Callable[[nn.Module], bool]) -> Iterator[fx.Node]:
        for node in self._order:
            if node.op == "call_module" and is_norm(self._module(node)):
                yield node

    def pair(self, norm: fx.Node) -> Pair | str:
        """The pair that begins with ``norm``, or why there is none."""
        if self._calls[norm.target] > 1:
            return "it is called more than once"
        if has_hooks(self._module(norm)):
            return "it has hooks"
        if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], fx.Node):
            return "it is not called with one tensor"
        found = self._follow(norm)
        if isinstance(found, Pair):
            reason = self._unsafe(found)
            if reason is not None:
                return reason
            self._taken.add(found.act)
        return found

    def _module(self, node: fx.Node) -> nn.Module:
        return self._root.get_submodule(str(node.target))

    def _follow(self, norm: fx.Node) -> Pair | str:
        node, add, residual, between = norm, None, None, []
        while True:
            if len(node.users) != 1:
                return "its output is used more than once" if node.users else "nothing uses it"
            before, node = node, next(iter(node.users))
            if self._is_identity(node):
                between.append(node)
                continue
            other = _other_summand(node, before)
            if other is not None and add is None:
                add, residual = node, other
                continue
            break
        if node in self._taken:
            return "its sum is fused with the other summand"
        activation = self._activation(node)
        if activation is None:
            return f"no activation that bnext fuses follows: {self._describe(node)} does"
        if node.op == "call_module" and has_hooks(self._module(node)):
            return "the activation has hooks"
        return Pair(norm, activation, node, add, residual, tuple(between))

    def _is_identity(self, node: fx.Node) -> bool:
        return (
            node.op == "call_module"
            and type(self._module(node)) is nn.Identity
            and not has_hooks(self._module(node))
        )

    def _activation(self, node: fx.Node) -> str | None:
        if node.op == "call_module":
            return module_activation(self._module(node))
        extra = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
        rest = node.args[1:]
        if node.op == "call_method":
            return _METHODS.get(str(node.target)) if not rest and not extra else None
        name = _FUNCTIONS.get(node.target) if callable(node.target) else None
        if name == "leaky_relu":
            slope = extra.pop("negative_slope", rest[0] if rest else _SLOPE)
            return name if slope == _SLOPE and not extra else None
        return None if extra else name

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self._module(node)).__name__
        if node.op == "output":
            return "the return"
        return getattr(node.target, "__name__", str(node.target))

    def _unsafe(self, pair: Pair) -> str | None:
        """The fused layer runs where the activation did: by then its input must be unchanged."""
        (source,) = pair.norm.args
        assert isinstance(source, fx.Node)
        own = {pair.add, *pair.between}
        begin, end = self._order[pair.norm], self._order[pair.act]
        between = [n for n, at in self._order.items() if begin < at < end and n not in own]
        if all(self._leaves_inputs_alone(node) for node in between):
            return None
        if len(source.users) == 1 and self._is_fresh(source):
            return None
        return "what runs between it and the activation might change its input in place"

    def _leaves_inputs_alone(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return node.op in ("placeholder", "get_attr")
        module = self._module(node)
        if has_hooks(module) or getattr(module, "inplace", False):
            return False
        return isinstance(module, _FRESH) or type(module) in _BATCH_NORMS

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether what the node returns shares no memory with anything else."""
        if node.op == "call_module":
            return isinstance(self._module(node), _FRESH)
        return node.op == "call_function" and node.target in _FRESH_FUNCTIONS


def _other_summand(node: fx.Node, one: fx.Node) -> fx.Node | None:
    is_sum = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    if not is_sum or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    other = second if first is one else first
    return other if isinstance(other, fx.Node) and other is not one else None


def sequential_pair(sequential: nn.Sequential, name: str) -> tuple[str, str] | str:
    """The activation that follows the norm ``name``, and the name of its module; or why not."""
    if has_hooks(sequential._modules[name]):
        return "it has hooks"
    entries = list(sequential._modules.items())
    position = [key for key, _ in entries].index(name)
    for key, module in entries[position + 1 :]:
        if type(module) is nn.Identity and not has_hooks(module):
            continue
        activation = module_activation(module)
        if activation is None:
            return f"no activation that bnext fuses follows: {type(module).__name__} does"
        return "the activation has hooks" if has_hooks(module) else (activation, key)
    return "it is the last of its nn.Sequential"
