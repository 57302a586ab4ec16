"""Which bnext ops a traced graph holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule


def ops_in(graph_module: GraphModule) -> Counter[str]:
    """How often each function is called: bnext's ops by name, others as torch prints them; looks
    into nested graphs.

    Functionalisation wraps an op that mutates its arguments: auto_functionalized(op, ...)."""
    found: Counter[str] = Counter()
    for module in graph_module.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            candidates = [node.target, *node.args[:1]]
            names = [
                c._schema.name.removeprefix("bnext::")
                for c in candidates
                if isinstance(c, torch._ops.OpOverload) and c.namespace == "bnext"
            ]
            found[names[0] if names else getattr(node.target, "__name__", str(node.target))] += 1
    return found


def recording_backend(
    forward: list[Counter[str]], backward: list[Counter[str]]
) -> Callable[..., object]:
    """A torch.compile backend that runs the traced graphs as they are, and notes what they hold."""

    def compiler(into: list[Counter[str]]) -> Callable[..., object]:
        def compile_graph(graph: GraphModule, _: Sequence[torch.Tensor]) -> object:
            into.append(ops_in(graph))
            return make_boxed_func(graph.forward)

        return compile_graph

    return aot_autograd(fw_compiler=compiler(forward), bw_compiler=compiler(backward))
