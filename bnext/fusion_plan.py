"""What ``bnext.convert`` will do with the batch norms of a model; nothing is changed here."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnext.norms import is_alone, is_batch_norm, is_timm_act, own_activation, reason_to_leave
from bnext.pairs import Finder, Pair, sequential_pair
from bnext.report import ConversionReport, Entry
from bnext.rewrite import original_class, rewritten, subclass
from bnext.tracing import Paths, Untraceable, paths

_NO_FORWARD = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class _Sighting:
    """A call of a norm: by which container, and what that does with the output, or why it is not
    to be fused there."""

    container: nn.Module
    activation: str | None = None
    residual: bool = False
    act_name: str | None = None  # the activation's in the container, where it is a module
    reason: str = ""


class FusionPlan:
    """The plan for ``model``.

    Attributes:
        norms: all to be converted, with the activation that each gets.
        identities: (parent, name) of activation modules that are replaced by identities.
        classes: containers whose forward is rewritten, and their classes then.
        ghosts: the ghost batch size of norms whose container splits the batch for them.
        report: the plan, for people.
    """

    def __init__(self, model: nn.Module) -> None:
        self.norms: dict[nn.Module, str | None] = {}
        self.identities: list[tuple[nn.Module, str]] = []
        self.classes: dict[nn.Module, type[nn.Module]] = {}
        self.ghosts: dict[nn.Module, int] = {}
        self._names: dict[nn.Module, list[str]] = defaultdict(list)
        self._sightings: dict[nn.Module, list[_Sighting]] = defaultdict(list)
        self._paths: dict[nn.Module, Paths] = {}
        # Calls of the module in a place (parent, name): of each container, on the way with most.
        self._calls: Counter[tuple[nn.Module, str]] = Counter()
        for name, module in model.named_modules(remove_duplicate=False):
            self._names[module].append(name)
        for module in self._names:
            if is_sequential(module):
                self._look_into_sequential(module)
            elif is_tabnet_ghost(module):
                self._take_over_ghosts(module)
            elif not isinstance(module, _NO_FORWARD) and _has_norms_inside(module):
                self._look_into_forward(module)
        entries = [self._decide(m) for m in self._names if is_batch_norm(m)]
        reasons = self._fuse_in_containers()
        self.report = ConversionReport(
            [
                Entry(e.name, "swapped", reason=reasons[e.name]) if e.name in reasons else e
                for e in entries
            ]
        )

    def _look_into_sequential(self, sequential: nn.Module) -> None:
        assert isinstance(sequential, nn.Sequential)
        for name, module in sequential._modules.items():
            if module is None:
                continue
            self._calls[sequential, name] += 1
            if not is_alone(module):
                continue
            found = sequential_pair(sequential, name)
            if isinstance(found, str):
                sighting = _Sighting(sequential, reason=found)
            else:
                sighting = _Sighting(sequential, found[0], act_name=found[1])
            self._sightings[module].append(sighting)

    def _take_over_ghosts(self, module: Any) -> None:
        """pytorch-tabnet's GBN, a loop over chunks of the batch, becomes one call."""
        self.ghosts[module.bn] = module.virtual_batch_size
        self.classes[module] = subclass(
            original_class(module), "def forward(self, x):\n    return self.bn(x)\n"
        )
        reason = f"its container's loop became ghosts of {module.virtual_batch_size}"
        self._sightings[module.bn].append(_Sighting(module, reason=reason))

    def _look_into_forward(self, container: nn.Module) -> None:
        try:
            traced = paths(container)
        except Untraceable as error:
            for norm in _own_norms(container):
                self._sightings[norm].append(_Sighting(container, reason=str(error)))
            return
        self._paths[container] = traced
        found: dict[nn.Module, list[Pair | str]] = defaultdict(list)
        for graph in traced.graphs:
            finder = Finder(container, graph)
            for node in finder.norms(is_alone):
                found[container.get_submodule(str(node.target))].append(finder.pair(node))
        calls: Counter[str] = Counter()
        for graph in traced.graphs:
            calls |= Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
        for target, count in calls.items():
            self._calls[_place(container, target)] += count
        for norm, pairs in found.items():
            self._sightings[norm].append(_agreed(container, pairs, len(traced.graphs)))

    def _decide(self, norm: nn.Module) -> Entry:
        name = self._names[norm][0]
        reason = reason_to_leave(norm)
        if reason is not None:
            return Entry(name, "left", reason=reason)
        self.norms[norm] = None
        if is_timm_act(norm) and not is_alone(norm):
            self.norms[norm] = own_activation(norm)
            if self.norms[norm] is not None:
                return Entry(name, "fused", self.norms[norm])
            return Entry(name, "swapped", reason="bnext does not fuse the activation in it")
        sightings = self._sightings[norm]
        if len(self._names[norm]) > 1:
            return Entry(name, "swapped", reason="it is shared by several modules")
        if len(sightings) != 1:
            who = "several modules call it" if sightings else "no module is seen to call it"
            return Entry(name, "swapped", reason=who)
        (sighting,) = sightings
        if sighting.activation is None:
            return Entry(name, "swapped", reason=sighting.reason)
        self.norms[norm] = sighting.activation
        return Entry(name, "fused", sighting.activation, sighting.residual)

    def _fuse_in_containers(self) -> dict[str, str]:
        """How the calls of activations go away; the norms that cannot be fused after all."""
        reasons: dict[str, str] = {}
        by_container: dict[nn.Module, dict[nn.Module, _Sighting]] = defaultdict(dict)
        for norm, activation in self.norms.items():
            if activation is not None and not is_timm_act(norm):
                (sighting,) = self._sightings[norm]
                by_container[sighting.container][norm] = sighting
        for container, sightings in by_container.items():
            places = {norm: self._identity_place(s) for norm, s in sightings.items()}
            if None in places.values():
                try:
                    self.classes[container] = self._rewrite(container, list(sightings))
                    continue
                except Untraceable as error:
                    for norm, place in places.items():
                        if place is None:
                            self.norms[norm] = None
                            reasons[self._names[norm][0]] = str(error)
            self.identities += [place for place in places.values() if place is not None]
        return reasons

    def _identity_place(self, sighting: _Sighting) -> tuple[nn.Module, str] | None:
        """Where the activation is a module that only follows this norm."""
        if sighting.act_name is None or sighting.residual:
            return None
        place = _place(sighting.container, sighting.act_name)
        return place if self._calls[place] == 1 else None

    def _rewrite(self, container: nn.Module, norms: list[nn.Module]) -> type[nn.Module]:
        traced = self._paths.get(container)
        if traced is None:
            raise Untraceable("the activation has other callers")
        if not traced.decided_by_arguments:
            raise Untraceable("its container's forward depends on training or on types")
        if traced.methods:
            raise Untraceable(f"its container's forward calls {', '.join(sorted(traced.methods))}")
        ways = {}
        for none, (graph, *_) in traced.by_none.items():
            finder = Finder(container, graph)
            pairs = [finder.pair(node) for node in list(finder.norms(norms.__contains__))]
            ways[none] = graph, [pair for pair in pairs if isinstance(pair, Pair)]
        return rewritten(original_class(container), ways)


def is_sequential(module: nn.Module) -> bool:
    """Whether its forward is a call of its children in order."""
    is_kind = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return is_kind and "forward" not in vars(module)


def is_tabnet_ghost(module: nn.Module) -> bool:
    cls = type(module)
    from_tabnet = cls.__name__ == "GBN" and cls.__module__.partition(".")[0] == "pytorch_tabnet"
    return from_tabnet and is_alone(module.bn)  # type: ignore[arg-type]


def _agreed(container: nn.Module, pairs: list[Pair | str], graphs: int) -> _Sighting:
    for pair in pairs:
        if isinstance(pair, str):
            return _Sighting(container, reason=pair)
    keys = {pair.key for pair in pairs if isinstance(pair, Pair)}
    if len(keys) > 1 or len(pairs) != graphs:
        return _Sighting(container, reason="the paths through its container's forward differ")
    ((_, activation, act_name),) = keys
    residual = any(isinstance(pair, Pair) and pair.residual is not None for pair in pairs)
    return _Sighting(container, activation, residual, act_name)


def _place(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return root.get_submodule(parent), name


def _has_norms_inside(module: nn.Module) -> bool:
    return any(is_alone(m) for m in module.modules() if m is not module)


def _own_norms(container: nn.Module) -> list[nn.Module]:
    """Norms that no module between has a forward for."""
    found = []
    for child in container.children():
        if is_alone(child):
            found.append(child)
        elif isinstance(child, _NO_FORWARD):
            found += _own_norms(child)
    return found
