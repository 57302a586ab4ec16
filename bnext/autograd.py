"""The Python autograd wrapper of ``torch.ops.bnext.batch_norm`` (docs/design.md, "Autograd").

One ``torch.autograd.Function``, called directly in eager mode and registered on the op's Autograd
key, so that a compiled or exported graph differentiates the op itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from bnext import ops
from bnext.reference import batch_norm_backward_reference, batch_norm_reference

# batch_norm's leading arguments.
_TENSOR_NAMES = (
    "input",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "residual",
)
_NUM_TENSORS = len(_TENSOR_NAMES)


class BatchNormFunction(torch.autograd.Function):
    """Takes the arguments of ``torch.ops.bnext.batch_norm`` and returns its outputs."""

    # The forward(ctx, ...) form: the setup_context form costs twice an eager batch norm's time at
    # (32, 50). That form is what functorch needs, hence `needs_formula` below.
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output, *stats = ops.batch_norm(*args)
        input, weight, bias, _, _, _, residual, training, _, eps, activation, _ = args
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats)
        # The derivative of relu and leaky_relu is the sign of the output, which the next layer
        # keeps anyway; silu is not monotonic and needs the residual itself.
        from_output = residual is not None and activation in ("relu", "leaky_relu")
        from_residual = residual is not None and activation == "silu"
        ctx.save_for_backward(
            input,
            weight,
            bias,
            output if from_output else None,
            residual if from_residual else None,
            *stats,
        )
        return output, *stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        no_grads = (None,) * 12
        if grad_output is None:
            return no_grads
        input, weight, bias, output, residual, *stats = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_residual = ctx.needs_input_grad[6]
        activation = ctx.activation
        differentiable = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (grad_output, input, weight, bias, residual)
        )
        if differentiable or needs_formula(grad_output, input):
            save_mean, _, save_invstd = stats
            grads = batch_norm_backward_reference(
                grad_output,
                input,
                weight,
                bias,
                output,
                residual,
                None if ctx.training else (save_mean[0], save_invstd[0]),
                ctx.eps,
                activation,
                save_mean.shape[0],
            )
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = ops.batch_norm_backward(
                    grad_output,
                    input,
                    weight,
                    bias,
                    output,
                    residual,
                    *stats,
                    ctx.training,
                    activation,
                    [wants_input, wants_residual and activation is not None],
                )
        grad_input, grad_weight, grad_bias, grad_residual = grads
        if activation is None:
            grad_residual = grad_output
        return (
            grad_input if wants_input else None,
            _as_dtype_of(weight, grad_weight) if wants_weight else None,
            _as_dtype_of(bias, grad_bias) if wants_bias else None,
            *no_grads[:3],
            grad_residual if wants_residual else None,
            *no_grads[:5],
        )


def _as_dtype_of(parameter: Tensor, grad: Tensor) -> Tensor:
    return grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)  # `to` costs 3 us


def needs_formula(*tensors: Tensor | None) -> bool:
    """Whether a forward-mode tangent or a functorch level rules the fused kernels out."""
    dual_level = forward_ad._current_level >= 0
    for tensor in tensors:
        if tensor is None:
            continue
        # The tensor's own state: "functorch is active" would also divert torch.compile.
        if _functorch.is_gradtrackingtensor(tensor) or _functorch.is_batchedtensor(tensor):
            return True
        if dual_level and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
    return False


def batch_norm(*args: Any) -> Tensor:
    """The differentiable ``torch.ops.bnext.batch_norm``: its arguments, its first output."""
    if torch.compiler.is_compiling():  # the graph shall hold the op, not what the Function does
        return ops.batch_norm(*args)[0]
    # Under a functorch transform also an untracked tensor cannot enter the Function.
    if _functorch.peek_interpreter_stack() is not None:
        return _formula(*args)
    if forward_ad._current_level >= 0 and needs_formula(*args[:_NUM_TENSORS]):
        return _formula(*args)
    # torch.jit.trace would record the Function and the op in it, and run both.
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        return BatchNormFunction.apply(*args)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return ops.batch_norm(*args)[0]


def _formula(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    ghost_batch_size: int | None,
) -> Tensor:
    tensors = (input, weight, bias, running_mean, running_var, num_batches_tracked, residual)
    for name, tensor in zip(_TENSOR_NAMES, tensors, strict=True):
        _check_dense_on(input.device, name, tensor)
    # The op on meta tensors makes all its checks; outside the functorch levels, which would wrap
    # the meta tensors too.
    with temporarily_clear_interpreter_stack(), torch._C._AutoDispatchBelowAutograd():
        ops.batch_norm(
            *(_like_on_meta(t) for t in tensors),
            training,
            momentum,
            eps,
            activation,
            ghost_batch_size,
        )
    counter = num_batches_tracked if training else None
    if counter is not None and momentum is None:
        momentum = 1.0 / (float(counter) + 1.0)
    output = batch_norm_reference(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        0.0 if momentum is None else momentum,
        eps,
        activation=activation,
        residual=residual,
        ghost_batch_size=ghost_batch_size,
    )
    if counter is not None:  # last: the update of the running statistics may have raised (vmap)
        counter.add_(1)
    return output


def _check_dense_on(device: torch.device, name: str, tensor: Tensor | None) -> None:
    """What the meta tensors cannot show."""
    if tensor is None:
        return
    if tensor.layout != torch.strided:
        raise RuntimeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.device != device:
        raise RuntimeError(f"{name} must be on input's device {device}, got {tensor.device}")


def _like_on_meta(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return like.requires_grad_(tensor.requires_grad)


def _autograd_kernel(*args: Any) -> Any:
    if needs_formula(*args[:_NUM_TENSORS]):
        raise RuntimeError(
            "torch.ops.bnext.batch_norm does not support torch.func transforms or forward-mode "
            "AD: call bnext.batch_norm or a bnext layer, which do"
        )
    return BatchNormFunction.apply(*args)


_library = torch.library.Library("bnext", "IMPL")
_library.impl("batch_norm", _autograd_kernel, "Autograd")
