"""What a layer's running statistics get in training, where that is not the batch of every call: the
batches of all processes, those of several calls, or none that is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from bnext import ops
from bnext.autograd import unchanged_on_error
from bnext.functional import layer_forward
from bnext.ops import ForwardCall
from bnext.unfused import Triple, gather, unfused_batch_norm

DEFAULT_GROUP = "default"  # torch.distributed's, whatever it is when a layer is called


@dataclass
class Accumulation:
    """The triples of micro-batches that wait for their update."""

    steps: int
    triples: list[Triple] = field(default_factory=list)


class SharedGroup:
    """A process group in the state of a layer: copies share it, and a pickle has the default one,
    since another process has other groups."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedGroup, (DEFAULT_GROUP,)


@dataclass(frozen=True)
class Running:
    """A layer's running statistics and how they move; None where there are none."""

    mean: Tensor | None
    var: Tensor | None
    counter: Tensor | None
    momentum: float | None

    @classmethod
    def of(cls, layer: Any) -> Running:
        """A layer's, as ``nn.BatchNorm`` uses them in training."""
        if not layer.track_running_stats:
            return cls(None, None, None, layer.momentum)
        momentum = layer.momentum
        if momentum is None and layer.num_batches_tracked is None:
            momentum = 0.0
        return cls(layer.running_mean, layer.running_var, layer.num_batches_tracked, momentum)

    def update(self, triples: list[Triple], eps: float) -> None:
        """With the merged triples, once."""
        if self.mean is not None:
            count, mean, m2 = (torch.cat(parts) for parts in zip(*triples, strict=True))
            counter = None if self.counter is None else self.counter.long()  # itself if it is that
            settings = self.mean, self.var, counter, self.momentum, eps, self.mean.dtype
            ops.batch_norm_fold(count, mean, m2, *settings)
            if self.counter is not None and counter is not None and counter is not self.counter:
                self.counter.copy_(counter)


def training_forward(
    layer: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Training's forward of a layer that has a process group, accumulates, or skips batches."""
    running = Running.of(layer)
    group = _group(layer.process_group)
    if group is None and layer._accumulation is None:
        with _guarded(layer, running):
            call = ForwardCall(
                input, weight, bias, running.mean, running.var, running.counter, residual, True,
                running.momentum, layer.eps, activation, layer.ghost_batch_size,
            )  # fmt: skip
            return layer_forward(call, layer._dims)

    def update(triple: Triple) -> None:
        if ops.in_backward():
            return  # a checkpoint's second forward: the first has updated
        triples = [triple]
        if layer._accumulation is not None:
            waiting = layer._accumulation.triples
            waiting.append(triple)
            if len(waiting) < layer._accumulation.steps:
                return
            triples, layer._accumulation.triples = waiting, []
        with _guarded(layer, running):
            running.update(triples, layer.eps)

    _check_rank_and_ghosts(layer, input)
    accumulation = layer._accumulation
    waiting = [] if accumulation is None else [*accumulation.triples]
    if group is not None and not torch.compiler.is_compiling():
        _agree_once(layer, group, input.device)
    try:
        with unchanged_on_error(running.mean, running.var, running.counter):
            return unfused_batch_norm(
                input, weight, bias, residual, layer.eps, activation, layer.ghost_batch_size,
                group, update,
            )  # fmt: skip
    except BaseException:
        if accumulation is not None:
            accumulation.triples = waiting
        raise


def drop_waiting(layer: Any) -> None:
    """Forgets the micro-batches that wait."""
    if layer._accumulation is not None:
        layer._accumulation.triples = []


def flush(layer: Any) -> None:
    """Updates the running statistics with the micro-batches that wait."""
    if layer._accumulation is not None and layer._accumulation.triples:
        triples, layer._accumulation.triples = layer._accumulation.triples, []
        running = Running.of(layer)
        with _guarded(layer, running):
            running.update(triples, layer.eps)


def check_process_group(process_group: Any) -> Any:
    """Returns it, or raises what a constructor raises for a bad one."""
    if process_group is None or process_group == DEFAULT_GROUP:
        return process_group
    if not dist.is_available() or not isinstance(process_group, ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup, 'default' or None, got "
            f"{process_group!r}"
        )
    return process_group


def _check_rank_and_ghosts(layer: Any, input: Tensor) -> None:
    """What the fused op checks and its parts do not."""
    if input.dim() not in layer._dims:
        expected = " or ".join(f"{d}D" for d in layer._dims)
        raise ValueError(f"expected {expected} input (got {input.dim()}D input)")
    if input.shape[1] != layer.num_features:
        raise RuntimeError(
            f"input must have {layer.num_features} channels (num_features), got {input.shape[1]}"
        )
    samples, size = input.shape[0], layer.ghost_batch_size
    if size is not None and 0 < size < samples:
        smallest = samples // -(-samples // size)
        if smallest * (input[0, 0].numel()) == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got a ghost of one value: "
                f"ghost_batch_size {size} for input of size {tuple(input.shape)}"
            )


def _group(process_group: ProcessGroup | str | None) -> ProcessGroup | None:
    """The group to gather from, None for this process alone."""
    if process_group is None or not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if process_group == DEFAULT_GROUP else process_group
    return group if dist.get_world_size(group) > 1 else None  # type: ignore[arg-type, return-value]


# Layers, and the group whose processes are known to have the same number of channels.
_agreed: WeakKeyDictionary[Any, ProcessGroup] = WeakKeyDictionary()


def _agree_once(layer: Any, group: ProcessGroup, device: torch.device) -> None:
    """Before the first collective of a size that depends on the layer: where they differ, gloo ends
    the process, and NCCL waits."""
    if _agreed.get(layer) is not group:
        channels = gather(torch.tensor([layer.num_features], device=device), group).flatten()
        if not (channels == layer.num_features).all():
            raise RuntimeError(
                "num_features must be the same on all processes of process_group, got "
                f"{channels.tolist()}"
            )
        _agreed[layer] = group


@contextmanager
def _guarded(layer: Any, running: Running) -> Iterator[None]:
    """With ``skip_nonfinite``: takes an update back whose result is not finite, and counts it;
    without waiting for a GPU."""
    if not layer.skip_nonfinite:
        yield
        return
    tensors = [t for t in (running.mean, running.var, running.counter) if t is not None]
    before = [t.clone() for t in tensors]
    yield
    if not tensors:
        return
    with torch.no_grad():
        finite = torch.stack([t.isfinite().all() for t in tensors]).all()
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(finite, tensor, old))
        layer.nonfinite_batches += (~finite).to(layer.nonfinite_batches.dtype)
