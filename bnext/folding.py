"""``bnext.fold``: batch norms of a model in eval folded into the layer before them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from bnext import modules
from bnext.convert import convert, revert
from bnext.fusion_plan import is_sequential
from bnext.norms import is_alone, is_timm_act
from bnext.pairs import has_hooks
from bnext.reference import ACTIVATIONS
from bnext.tracing import Untraceable, paths

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class FoldedBatchNormAct(nn.Module):
    """What is left of a ``BatchNormAct*d``: ``activation(input + residual)``."""

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return ACTIVATIONS[self.activation](input if residual is None else input + residual)

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
    places: Counter[nn.Module] = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    owners: Counter[Any] = Counter(p for m in places for p in m.parameters(recurse=False))
    pairs = [(container, *names) for container in list(places) for names in _pairs(container)]
    called: Counter[nn.Module] = Counter()
    for container, layer_name, norm_name in pairs:
        called.update(map(container.get_submodule, (layer_name, norm_name)))
    for container, layer_name, norm_name in pairs:
        layer, norm = map(container.get_submodule, (layer_name, norm_name))
        alone = all(places[m] == called[m] == 1 and not has_hooks(m) for m in (layer, norm))
        tied = any(owners[p] > 1 for p in layer.parameters(recurse=False))
        if alone and not tied and _fits(layer, norm):
            container.set_submodule(layer_name, _folded(layer, norm))
            container.set_submodule(norm_name, _rest(norm))
    return convert(model, inplace=True)


def _pairs(container: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of layers and of the norms that alone get their outputs."""
    if is_sequential(container):
        names = list(container._modules)
        yield from (
            (before, name)
            for before, name in zip(names, names[1:], strict=False)
            if _is_norm(container._modules[name])
        )
    elif any(map(_is_norm, container.modules())) and not isinstance(
        container, (nn.ModuleList, nn.ModuleDict)
    ):
        try:
            graphs = paths(container).graphs
        except Untraceable:
            return
        found = [set(_pairs_of(container, graph)) for graph in graphs]
        yield from sorted(set.intersection(*found))


def _pairs_of(container: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or not _is_norm(container.get_submodule(str(node.target))):
            continue
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        if len(before.users) == calls[node.target] == calls[before.target] == 1:
            yield str(before.target), str(node.target)


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and (
        is_alone(module) or is_timm_act(module) or isinstance(module, modules._FusedBatchNormAct)
    )


def _fits(layer: Any, norm: Any) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return False
    if type(layer) is nn.Linear:
        return bool(layer.out_features == norm.num_features)
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
    if is_timm_act(norm):
        return nn.Sequential(copy.deepcopy(norm.drop), copy.deepcopy(norm.act)).eval()
    return nn.Identity().eval()
