"""Natural loops of a control-flow graph."""

from __future__ import annotations

from collections.abc import Sequence


def dominators(successors: Sequence[Sequence[int]]) -> dict[int, int]:
    """The immediate dominator of every block that block 0 reaches (Cooper, Harvey and Kennedy,
    A Simple, Fast Dominance Algorithm, 2001)."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        node, rest = stack[-1]
        for target in rest:
            if target not in seen:
                seen.add(target)
                stack.append((target, iter(successors[target])))
                break
        else:
            order.append(node)
            stack.pop()
    rank = {node: at for at, node in enumerate(order)}
    before: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for target in successors[node]:
            before[target].append(node)
    above = {0: 0}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [b for b in before[node] if b in above]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    if rank[best] < rank[other]:
                        best = above[best]
                    else:
                        other = above[other]
            if above.get(node) != best:
                above[node] = best
                changed = True
    return above


def natural_loops(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """First block -> blocks of each loop: what reaches a branch back to it without passing it."""
    above = dominators(successors)
    before: dict[int, list[int]] = {node: [] for node in above}
    for node in above:
        for target in successors[node]:
            before[target].append(node)

    def dominates(first: int, node: int) -> bool:
        while node != first and node != 0:
            node = above[node]
        return node == first

    loops: dict[int, set[int]] = {}
    for node in above:
        for first in successors[node]:
            if dominates(first, node):
                body = loops.setdefault(first, {first})
                todo = [node]
                while todo:
                    inside = todo.pop()
                    if inside not in body:
                        body.add(inside)
                        todo += before[inside]
    return loops
