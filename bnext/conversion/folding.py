"""``bnext.fold``: batch norms of a model in eval folded into the layer before them."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from bnext import activations, modules
from bnext.conversion.calls import is_watched
from bnext.conversion.convert import convert, revert
from bnext.conversion.norms import is_alone, is_timm_norm
from bnext.conversion.plan import is_sequential
from bnext.conversion.scope import Scope
from bnext.conversion.syntax import TRY, has, statement_before
from bnext.conversion.uses import Uses

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RANK = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_DIMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class FoldedBatchNormAct(nn.Module):
    """What is left of a ``BatchNormAct*d``: ``activation(input + residual)``."""

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return activations.apply(self.activation, input if residual is None else input + residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def fold(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, whose batch norms are part of the convolutions and linear
    layers before them (``torch.nn.utils.fusion``). Activations stay; the norms that follow no such
    layer are bnext's, fused with what follows.

    A layer is folded where its output goes to the norm alone: in an ``nn.Sequential`` or in a
    ``forward`` that ``bnext.convert`` could follow. An ``nn.Linear`` is taken to be called with a
    2-D input.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(m.training for m in model.modules()):
        raise ValueError("model must be in eval mode: call model.eval() first")
    model = revert(model)
    uses = Uses(model)
    places: Counter[nn.Module] = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    owners: Counter[Any] = Counter(p for m in places for p in m.parameters(recurse=False))
    names = {m: name for name, m in model.named_modules()}
    for layer, norm in [pair for module in names for pair in _pairs(module, uses)]:
        alone = all(
            uses.only_called_once(m) and places[m] == 1 and not is_watched(m) for m in (layer, norm)
        )
        tied = any(owners[p] > 1 for p in layer.parameters(recurse=False))
        if alone and not tied and _fits(layer, norm):
            model.set_submodule(names[layer], _folded(layer, norm))
            model.set_submodule(names[norm], _rest(norm))
    return convert(model, inplace=True)


def _pairs(container: nn.Module, uses: Uses) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Layers and the norms that get their outputs."""
    if is_sequential(container):
        children = list(container)
        yield from (
            (layer, norm)
            for layer, norm in zip(children, children[1:], strict=False)
            if _is_norm(norm)
        )
    functions = uses.scopes.get(container, {})
    for scope in functions.values():
        if scope.source.function is not scope.source.inner or has(
            scope.source.tree, (*TRY, ast.Match, ast.Lambda, ast.NamedExpr)
        ):
            continue
        for node in scope.reachable():
            if isinstance(node, ast.Call) and _is_norm(scope.resolve(node.func)):
                layer = _source_of(functions, scope, node)
                if isinstance(layer, nn.Module):
                    yield layer, scope.resolve(node.func)


def _source_of(functions: dict[str, Scope], scope: Scope, call: ast.Call) -> Any:
    """The module whose output alone is what a norm normalises."""
    if not call.args or call.keywords:
        return None
    argument = call.args[0]
    statement = scope.parents[call]
    before = (
        statement_before(scope.parents, statement) if isinstance(statement, ast.Assign) else None
    )
    if isinstance(argument, ast.Name) and isinstance(before, ast.Assign):
        # The layer's output and the norm's one after the other in the same variable.
        assert isinstance(statement, ast.Assign)
        targets = [ast.dump(t) for t in (*before.targets, *statement.targets)]
        if targets == [ast.dump(ast.Name(argument.id, ast.Store()))] * 2:
            nested = argument.id in scope.nested
            return None if nested else _maker(functions, scope, before.value)
    return _maker(functions, scope, argument)


def _maker(functions: dict[str, Scope], scope: Scope, value: ast.expr | None) -> Any:
    """The module that makes a value which is used here alone."""
    nodes = list(scope.reachable())
    if isinstance(value, ast.Name) and value.id not in scope.nested:
        mentions = [n for n in nodes if isinstance(n, ast.Name) and n.id == value.id]
        sets = [n for n in mentions if not isinstance(n.ctx, ast.Load)]
        statement = scope.parents[sets[0]] if sets else None
        if len(mentions) == 2 and isinstance(statement, ast.Assign) and statement.targets == sets:
            is_argument = value.id in scope.arguments
            return None if is_argument else _maker(functions, scope, statement.value)
    if not isinstance(value, ast.Call):
        return None
    module = scope.resolve(value.func)
    if isinstance(module, nn.Module):
        return module if len(value.args) == 1 else None
    method = functions.get(getattr(value.func, "attr", ""))
    if method is None or method is scope or not is_own_method(scope, value.func):
        return None
    if method.source.function is not method.source.inner or len(value.args) != 1:
        return None
    everywhere = [n for s in functions.values() for n in s.reachable()]
    calls = [n for n in everywhere if getattr(n, "attr", "") == value.func.attr]  # type: ignore[attr-defined]
    returns = [n for n in method.reachable() if isinstance(n, ast.Return)]
    return _maker(functions, method, returns[0].value) if len(calls) == len(returns) == 1 else None


def is_own_method(scope: Scope, node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and scope.resolve(node.value) is scope.module


def _is_norm(module: Any) -> bool:
    return isinstance(module, nn.Module) and (
        is_alone(module) or is_timm_norm(module) or isinstance(module, modules._FusedBatchNormAct)
    )


def _fits(layer: Any, norm: Any) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return False
    dims = getattr(norm, "_dims", None) or _DIMS.get(type(norm))
    if type(layer) is nn.Linear:
        return (dims is None or 2 in dims) and bool(layer.out_features == norm.num_features)
    if type(layer) in _RANK and dims is not None and _RANK[type(layer)] not in dims:
        return False  # the norm would refuse
    if type(layer) in _TRANSPOSED and layer.groups > 1:
        return False  # fuse_conv_bn_eval takes the weight's second dimension for all channels
    return type(layer) in (*_CONVS, *_TRANSPOSED) and layer.out_channels == norm.num_features


def _folded(layer: Any, norm: Any) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    return fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, _TRANSPOSED))


def _rest(norm: Any) -> nn.Module:
    """What a norm does after normalising."""
    if isinstance(norm, modules._FusedBatchNormAct):
        return FoldedBatchNormAct(norm.activation).eval()
    if is_timm_norm(norm):
        return nn.Sequential(copy.deepcopy(norm.drop), copy.deepcopy(norm.act)).eval()
    return nn.Identity().eval()
