"""Layers that drop in for ``nn.BatchNorm*d``, alone or with the activation that follows."""

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup

from bnext import activations
from bnext.compat import NormBase
from bnext.functional import check_ghost_batch_size, layer_forward
from bnext.ops import ForwardCall
from bnext.running_stats import (
    Accumulation,
    SharedGroup,
    check_process_group,
    drop_waiting,
    training_forward,
)


class _FusedBatchNorm(NormBase):
    """What all layers share: ``nn.BatchNorm``'s parameters, buffers, state_dict and semantics."""

    _dims: ClassVar[tuple[int, ...]]
    ghost_batch_size: int | None = None
    # Of the class, so that converted layers need none of their own.
    process_group: ProcessGroup | str | None = None
    skip_nonfinite: bool = False
    frozen: bool = False
    _accumulation: Accumulation | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        ghost_batch_size: int | None = None,
        process_group: ProcessGroup | str | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self.ghost_batch_size = check_ghost_batch_size(ghost_batch_size)
        self.process_group = check_process_group(process_group)
        if skip_nonfinite:
            self.start_skipping()

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and isinstance(input, fx.Proxy):
            return self._as_leaf(input)
        return self._fused(input, None, None)

    def _fused(self, input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        training = self._trains()
        # nn.Module.__getattr__ is Python, and searches for each name.
        parameters, buffers = self._parameters, self._buffers
        weight: Tensor | None
        bias: Tensor | None
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
            counter = buffers["num_batches_tracked"]
        except KeyError:  # pruned, parametrized or replaced
            weight, bias = self.weight, self.bias
            running_mean, running_var = self.running_mean, self.running_var
            counter = getattr(self, "num_batches_tracked", None)
        momentum = self.momentum
        if self.frozen:  # also where somebody has asked for their gradients since
            weight = None if weight is None else weight.detach()
            bias = None if bias is None else bias.detach()
        if training and (
            self.process_group is not None or self.skip_nonfinite or self._accumulation is not None
        ):
            return training_forward(self, input, weight, bias, residual, activation)
        ghost_batch_size = self.ghost_batch_size if training else None
        if not training:
            counter = None
            # Without running statistics eval uses the batch's, as nn.BatchNorm.
            training = running_mean is None and running_var is None
        elif not self.track_running_stats:
            running_mean = running_var = counter = None
        elif momentum is None and counter is None:
            momentum = 0.0  # as nn.BatchNorm: nothing to average by
        return layer_forward(
            ForwardCall(
                input,
                weight,
                bias,
                running_mean,
                running_var,
                counter,
                residual,
                training,
                momentum,
                self.eps,
                activation,
                ghost_batch_size,
            ),
            self._dims,
        )

    def _as_leaf(self, *inputs: Any) -> Any:
        """A call of this module in the graph of torch.fx, as of those of ``torch.nn``: so mode,
        momentum and ghosts are those of the module when the graph runs."""
        tracer = inputs[0].tracer
        name = tracer.path_of_module(self) if isinstance(tracer, fx.Tracer) else ""
        if not name:  # traced alone
            return self._fused(inputs[0], (*inputs, None)[1], getattr(self, "activation", None))
        return tracer.create_proxy("call_module", name, inputs, {})

    def _trains(self) -> bool:
        """Whether it normalises by the statistics of the batch, and updates the running ones."""
        return self.training and not self.frozen

    def _is_plain(self) -> bool:
        """Whether forward is the batch norm and no more, also in a subclass made by others."""
        return type(self).forward is _FusedBatchNorm.forward

    def freeze(self) -> None:
        """See :func:`bnext.freeze`."""
        if self.running_mean is None:
            raise ValueError("a layer without running statistics cannot be frozen")
        parameters = own_parameters(self)
        if not self.frozen:
            self.frozen = True
            self._required_grad = {name: p.requires_grad for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer would go on with it

    def unfreeze(self) -> None:
        """See :func:`bnext.unfreeze`."""
        if self.frozen:
            del self.frozen
            required = vars(self).pop("_required_grad")
            for name, parameter in own_parameters(self).items():
                parameter.requires_grad_(required.get(name, parameter.requires_grad))

    def reset_running_stats(self) -> None:
        """Also drops the micro-batches that wait, and counts non-finite ones anew."""
        super().reset_running_stats()
        drop_waiting(self)
        nonfinite_batches = self._buffers.get("nonfinite_batches")
        if nonfinite_batches is not None:
            nonfinite_batches.zero_()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        drop_waiting(self)  # they were to update what was there before

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        group = state.get("process_group")
        if group is not None and not isinstance(group, str):
            state["process_group"] = SharedGroup(group)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = state.get("process_group")
        if isinstance(group, SharedGroup):
            state = {**state, "process_group": group.group}
        super().__setstate__(state)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in place of the layer: the plain one, of the same tensors.

        Raises:
            RuntimeError: there is none that computes the same.
        """
        plain = next((c for c in type(self).__mro__ if c.__module__.startswith("torch.nn")), None)
        special = self.ghost_batch_size or self.process_group or self.skip_nonfinite or self.frozen
        if plain is None or special or self._accumulation or not self._is_plain():
            raise RuntimeError(
                f"torch.jit.script cannot compile this {type(self).__name__}: use torch.compile or "
                "torch.export, or script bnext.revert(model)"
            )
        scriptable: nn.Module = object.__new__(plain)
        scriptable.__dict__.update(self.__dict__)
        return scriptable

    def start_skipping(self) -> None:
        """Counts non-finite batches in ``nonfinite_batches``, instead of learning from them."""
        self.skip_nonfinite = True
        if "nonfinite_batches" not in self._buffers:
            like = self.running_mean if self.running_mean is not None else self.weight
            zero = torch.zeros((), dtype=torch.long, device=None if like is None else like.device)
            self.register_buffer("nonfinite_batches", zero, persistent=False)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.ghost_batch_size is not None:
            text += f", ghost_batch_size={self.ghost_batch_size}"
        for name in ("frozen", "skip_nonfinite"):
            if getattr(self, name):
                text += f", {name}=True"
        if self.process_group is not None:
            text += ", synchronised"
        return text


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A layer's parameters, by name, also of those that are computed from others
    (``torch.nn.utils.parametrize``)."""
    found = dict(layer.named_parameters(recurse=False))
    parametrizations = layer._modules.get("parametrizations")
    if parametrizations is not None:
        for name, parameter in parametrizations.named_parameters():
            found[name.removesuffix(".original")] = parameter
    return found


class _FusedBatchNormAct(_FusedBatchNorm):
    """With an activation and an optional residual.

    Not an ``nn.modules.batchnorm._BatchNorm``: tools that look for one, such as
    ``convert_sync_batchnorm`` and ``fuse_conv_bn_eval``, would drop the activation
    (pytorch issue 187298).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        ghost_batch_size: int | None = None,
        process_group: ProcessGroup | str | None = None,
        skip_nonfinite: bool = False,
        activation: str | None = "relu",
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            ghost_batch_size=ghost_batch_size,
            process_group=process_group,
            skip_nonfinite=skip_nonfinite,
        )
        self.activation = activations.check(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if type(input) is not Tensor and isinstance(input, fx.Proxy):
            return self._as_leaf(input, residual)
        return self._fused(input, residual, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


_BATCH_NORM_DOC = """``nn.BatchNorm{d}d`` with fused kernels, exact statistics and ghost batches.

    A subclass of ``nn.BatchNorm{d}d`` with its constructor, attributes and state_dict; checkpoints
    load both ways.

    Args:
        num_features: C of an input of shape {shapes}.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as ``nn.BatchNorm{d}d``.
        ghost_batch_size: in training, normalise each of ``ceil(N / ghost_batch_size)`` near-equal
            pieces of the batch by its own statistics (Hoffer, Hubara and Soudry 2017); the running
            statistics get one update with those of the whole batch. None: plain batch norm.
        process_group: normalise by the statistics of the batches of all its processes in training
            (ghosts: by their own, and update the running statistics with all). "default": that of
            ``torch.distributed`` when the layer is called. None: of this process alone.
        skip_nonfinite: leave the running statistics as they are where a batch would make one of
            them infinite or NaN, and count it in the buffer ``nonfinite_batches``.

    Raises:
        ValueError: ``ghost_batch_size`` is not positive; on a call, an input of another rank or
            with one value per channel (in the batch or a ghost) in training.
        TypeError: ``ghost_batch_size`` is not an int.
    """

_BATCH_NORM_ACT_DOC = """``activation(batch_norm(input) + residual)`` over {shapes}, in one call.

    Parameters, buffers and state_dict are those of ``nn.BatchNorm{d}d``; checkpoints load both
    ways. ``forward(input, residual=None)``: ``residual`` has the shape, dtype and device of
    ``input`` and is added before the activation.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias,
            ghost_batch_size, process_group, skip_nonfinite: as :class:`bnext.BatchNorm{d}d`.
        activation: "relu" (default), "relu6", "leaky_relu" (slope 0.01), "silu", or None.

    Raises:
        ValueError: an unknown ``activation``; else as :class:`bnext.BatchNorm{d}d`.
    """


class BatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    __doc__ = _BATCH_NORM_DOC.format(d=1, shapes="(N, C) or (N, C, L)")
    _dims = (2, 3)


class BatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    __doc__ = _BATCH_NORM_DOC.format(d=2, shapes="(N, C, H, W)")
    _dims: ClassVar[tuple[int, ...]] = (4,)


class BatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    __doc__ = _BATCH_NORM_DOC.format(d=3, shapes="(N, C, D, H, W)")
    _dims = (5,)


class SyncBatchNorm(BatchNorm2d, nn.SyncBatchNorm):
    """What ``bnext.convert`` makes of an ``nn.SyncBatchNorm``: of any rank, and with a process
    group."""

    _dims: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)


class BatchNormAct1d(_FusedBatchNormAct):
    __doc__ = _BATCH_NORM_ACT_DOC.format(d=1, shapes="(N, C) or (N, C, L)")
    _dims = (2, 3)


class BatchNormAct2d(_FusedBatchNormAct):
    __doc__ = _BATCH_NORM_ACT_DOC.format(d=2, shapes="(N, C, H, W)")
    _dims = (4,)


class BatchNormAct3d(_FusedBatchNormAct):
    __doc__ = _BATCH_NORM_ACT_DOC.format(d=3, shapes="(N, C, D, H, W)")
    _dims = (5,)
