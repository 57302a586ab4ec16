"""Training's forward by the separate ops, with something between reduce and apply: triples of other
processes, or an update of the running statistics that waits.

The ops are those of docs/ops.md. One collective forward and one backward: every process gathers
the others' rows and merges them in rank order, so that all have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from bnext import activations, ops
from bnext.autograd import check_can_be_saved

Triple = tuple[Tensor, Tensor, Tensor]


class UnfusedBatchNormFunction(torch.autograd.Function):
    """``activation(batch_norm(input) + residual)`` of training; ``rest``: eps, activation, ghosts,
    group, and what takes the merged triple of the whole batch."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        eps, activation, ghost_batch_size, group, update = rest
        check_can_be_saved(ctx, input, weight, bias, residual)
        triples = ops.batch_norm_reduce(input, ghost_batch_size)
        # Not the number of ghosts: a process with a small batch may have one, and another several.
        together = ghost_batch_size is None
        total = ops.batch_norm_merge(*triples)
        if group is not None:
            total = ops.batch_norm_merge(*_gather_triples(total, group))
        stats_of = total if together else triples
        stats = ops.batch_norm_fold(*stats_of, None, None, None, None, eps, input.dtype)
        output = ops.batch_norm_apply(input, weight, bias, residual, *stats, activation)
        update(total)
        ctx.settings = activation, group if together else None
        ctx.stats, ctx.count = stats, stats_of[0]
        extra: tuple[Tensor | None, Tensor | None] = (None, None)
        if residual is not None and activation is not None:
            from_output = activation in activations.FROM_OUTPUT
            extra = (output, None) if from_output else (None, residual)
        ctx.save_for_backward(input, weight, bias, *extra)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, output, residual = ctx.saved_tensors
        activation, group = ctx.settings
        wants_input, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
        args = (grad_output, input, weight, bias, output, residual, *ctx.stats)
        sums = torch.stack(ops.batch_norm_grad_reduce(*args, activation))
        grad_bias = sums[0].sum(0)
        grad_weight = (sums[1] * ctx.stats[2]).sum(0)
        if group is not None:
            sums = gather(sums, group).sum(0)
        grad_input, grad_residual = ops.batch_norm_grad_apply(
            *args, ctx.count, *sums, activation, [wants_input, wants_residual]
        )
        return (
            grad_input if wants_input else None,
            grad_weight.to(weight.dtype) if wants_weight else None,
            grad_bias.to(bias.dtype) if wants_bias else None,
            grad_residual if wants_residual else None,
            None,
        )


def unfused_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    ghost_batch_size: int | None,
    group: ProcessGroup | None,
    update: Callable[[Triple], None],
) -> Tensor:
    """Training's forward. ``group``: whose batches are normalised together, None for this process's
    alone; ghosts are always normalised by themselves. ``update`` gets the merged (count, mean, M2),
    of shapes (1,), (1, C), (1, C)."""
    rest = (eps, activation, ghost_batch_size, group, update)
    return UnfusedBatchNormFunction.apply(input, weight, bias, residual, rest)


def _gather_triples(triple: Triple, group: ProcessGroup) -> Triple:
    count, mean, m2 = triple
    n_channel = mean.shape[1]
    # A count below 2^53 is exact in double.
    head = torch.stack([torch.full_like(count, n_channel), count], 1).to(mean.dtype)
    rows = gather(torch.cat([head, mean, m2], 1), group).squeeze(1)
    # gloo takes a shorter message of a process that calls another layer. A GPU would have to wait.
    if rows.is_cpu and not torch.compiler.is_compiling() and not (rows[:, 0] == n_channel).all():
        raise RuntimeError(
            f"the processes of process_group do not call the same layer: here of {n_channel} "
            "channels"
        )
    means, m2s = rows[:, 2:].split(n_channel, 1)
    return rows[:, 1].to(count.dtype), means, m2s


def gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """(ranks, *tensor.shape), in the order of ranks."""
    ranks = dist.get_world_size(group)
    if torch.compiler.is_compiling():
        from torch.distributed._functional_collectives import all_gather_tensor

        return all_gather_tensor(tensor.flatten(), 0, group).reshape(ranks, *tensor.shape)
    gathered = [torch.zeros_like(tensor) for _ in range(ranks)]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return torch.stack(gathered)
