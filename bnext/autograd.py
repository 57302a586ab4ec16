"""The Python autograd wrapper of ``torch.ops.bnext.batch_norm`` (docs/design.md, "Autograd").

One ``torch.autograd.Function``, called directly in eager mode and registered on the op's Autograd
key, so that a compiled or exported graph differentiates the op itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import functional as F

from bnext import activations, ops
from bnext.compat import is_exporting
from bnext.ops import ForwardCall
from bnext.reference import (
    batch_norm_backward_reference,
    batch_norm_reference,
    frozen_backward_reference,
)


class BatchNormFunction(torch.autograd.Function):
    """The first output of ``torch.ops.bnext.batch_norm``; the others are its node's ``stats``.

    The differentiable arguments come first, then all of them again in one tuple, which autograd
    does not look into.
    """

    # The forward(ctx, ...) form: the setup_context form costs twice an eager batch norm's time at
    # (32, 50). That form is what functorch needs, hence `needs_formula` below. One output, few
    # inputs and few saved tensors, since each has its price: docs/performance.md, "Call overhead".
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: ForwardCall,
    ) -> Tensor:
        check_can_be_saved(ctx, input, weight, bias, residual)
        output, *ctx.stats = ops.batch_norm_below_autograd(*call)
        _, _, _, _, _, _, _, training, _, eps, activation, _ = call
        ctx.settings = training, eps, activation
        ctx.set_materialize_grads(False)
        wants_parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        from_output = activation in activations.FROM_OUTPUT
        if not (training or wants_parameters) and (from_output or activation is None):
            # Constants times grad_output: frozen layers need nothing of the input.
            ctx.save_for_backward(None, weight, bias, output if from_output else None)
        elif residual is None or activation is None:
            ctx.save_for_backward(input, weight, bias)
        elif from_output:  # which the next layer keeps anyway
            ctx.save_for_backward(input, weight, bias, output, None)
        else:
            ctx.save_for_backward(input, weight, bias, None, residual)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        input, weight, bias, *extra = ctx.saved_tensors
        output, residual = (*extra, None, None)[:2]
        training, eps, activation = ctx.settings
        save_mean, save_mean_lo, save_invstd = ctx.stats
        wants_input, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
        differentiable = torch.is_grad_enabled() and _requires_grad(
            grad_output, input, weight, bias, residual
        )
        # The saved input is of no level and without a tangent, else the Function was not called.
        if input is None:
            grads = _frozen_backward(ctx, grad_output, weight, bias, output, differentiable)
        elif differentiable or needs_formula(grad_output):
            grads = batch_norm_backward_reference(
                grad_output,
                input,
                weight,
                bias,
                output,
                residual,
                None if training else (save_mean[0], save_invstd[0]),
                eps,
                activation,
                save_mean.shape[0],
            )
        else:
            grads = ops.batch_norm_backward_below_autograd(
                grad_output,
                input,
                weight,
                bias,
                output,
                residual,
                save_mean,
                save_mean_lo,
                save_invstd,
                training,
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
            grad_residual if wants_residual else None,
            None,
        )


_apply = BatchNormFunction.apply


def check_can_be_saved(ctx: Any, *tensors: Tensor | None) -> None:
    """Raises what saving for backward would, but before the running statistics are updated."""
    if torch.compiler.is_compiling():
        return  # dynamo has its own word for inference tensors
    for name, tensor in zip(("input", "weight", "bias", "residual"), tensors, strict=True):
        is_inference = isinstance(tensor, Tensor) and tensor.is_inference()
        if is_inference and any(ctx.needs_input_grad):
            raise RuntimeError(
                f"{name} must not be an inference tensor where gradients are wanted, since it "
                "cannot be saved for backward: clone it outside torch.inference_mode"
            )


@contextmanager
def unchanged_on_error(*buffers: Tensor | None) -> Iterator[None]:
    """Gives the buffers their values back where the code of saved_tensors_hooks raises, which runs
    after the op."""
    given = [b for b in buffers if b is not None]
    before = [b.clone() for b in given] if _has_saved_tensors_hooks() else None
    try:
        yield
    except BaseException:
        if before is not None:
            with torch.no_grad():
                for buffer, value in zip(given, before, strict=True):
                    buffer.copy_(value)
        raise


def _has_saved_tensors_hooks() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _frozen_backward(
    ctx: Any,
    grad_output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    differentiable: bool,
) -> tuple[Tensor | None, ...]:
    """Of running statistics and parameters that want no gradient, without the input."""
    *_, activation = ctx.settings
    if differentiable or needs_formula(grad_output):
        return frozen_backward_reference(grad_output, weight, output, ctx.stats[2][0], activation)
    wants_input, _, _, wants_residual, _ = ctx.needs_input_grad
    grad_input, grad_residual = ops.batch_norm_grad_apply(
        grad_output,
        grad_output,  # in place of the input, on which nothing depends
        weight,
        bias,
        output,
        None,
        *ctx.stats,
        None,
        None,
        None,
        activation,
        [wants_input, wants_residual and activation is not None],
    )
    return grad_input, None, None, grad_residual


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _as_dtype_of(parameter: Tensor, grad: Any) -> Tensor:
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


def batch_norm(call: ForwardCall) -> Tensor:
    """The differentiable ``torch.ops.bnext.batch_norm``: its first output."""
    if torch.compiler.is_compiling():
        if is_exporting() and _torch_has_it(call):
            return _standard_ops(call)
        return ops.batch_norm(*call)[0]  # the graph shall hold the op, not what the Function does
    # Under a functorch transform also an untracked tensor cannot enter the Function.
    if _functorch.peek_interpreter_stack() is not None:
        return _formula(call)
    if forward_ad._current_level >= 0 and needs_formula(*call.tensors()):
        return _formula(call)
    input, weight, bias, mean, var, counter, residual, training, _, _, _, _ = call
    if training and ops.in_backward():  # a checkpoint's second forward: the first has updated
        call = call._replace(
            running_mean=None, running_var=None, num_batches_tracked=None, momentum=0.0
        )
    # torch.jit.trace would record the Function and the op in it, and run both.
    if torch.is_grad_enabled() and not torch._C._is_tracing():
        if training and _has_saved_tensors_hooks():
            with unchanged_on_error(mean, var, counter):
                return _apply(input, weight, bias, residual, call)
        return _apply(input, weight, bias, residual, call)
    return ops.batch_norm_below_autograd(*call)[0]


def _torch_has_it(call: ForwardCall) -> bool:
    """Whether operators of torch alone do the same: then an exported program is for every tool, as
    ONNX and those that move a program exported in training to eval."""
    if not call.training or torch.onnx.is_in_onnx_export():
        return True
    parameters = (call.weight, call.bias, call.running_mean, call.running_var)
    dtypes = [t.dtype for t in parameters if t is not None]
    one_dtype = dtypes in ([call.input.dtype] * len(dtypes), [torch.float32] * len(dtypes))
    return call.ghost_batch_size is None and call.momentum is not None and one_dtype


def _standard_ops(call: ForwardCall) -> Tensor:
    """In operators of torch alone."""
    input, weight, bias, running_mean, running_var, counter, residual = call.tensors()
    assert input is not None
    if call.training and not torch.onnx.is_in_onnx_export():
        if counter is not None:
            counter.add_(1)
        z = F.batch_norm(
            input, running_mean, running_var, weight, bias, True, call.momentum or 0.0, call.eps
        )
        return activations.apply(call.activation, z if residual is None else z + residual)
    if input.dtype in (torch.float16, torch.bfloat16):  # rounded once, at the end
        wide: Any = [None if t is None else t.float() for t in call.tensors()]
        return _standard_ops(ForwardCall(*wide, *call[len(wide) :])).to(input.dtype)
    if call.training:  # ONNX has no such operator
        dims = [0, *range(2, input.dim())]
        var, mean = torch.var_mean(input, dims, correction=0, keepdim=True)
        z = (input - mean) * torch.rsqrt(var + call.eps)
        shape = [1, -1] + [1] * (input.dim() - 2)
        z = z if weight is None else z * weight.view(shape)
        z = z if bias is None else z + bias.view(shape)
    else:
        z = F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, call.eps)
    return activations.apply(call.activation, z if residual is None else z + residual)


def _formula(call: ForwardCall) -> Tensor:
    for name, tensor in zip(call._fields, call.tensors(), strict=False):
        _check_dense_on(call.input.device, name, tensor)
    # The op on meta tensors makes all its checks; outside the functorch levels, which would wrap
    # the meta tensors too.
    with temporarily_clear_interpreter_stack():
        meta = [_like_on_meta(t) for t in call.tensors()]
        ops.batch_norm_below_autograd(*meta, *call[len(meta) :])
    counter = call.num_batches_tracked if call.training else None
    momentum = call.momentum
    if counter is not None and momentum is None:
        momentum = 1.0 / (float(counter) + 1.0)
    output = batch_norm_reference(
        call.input,
        call.running_mean,
        call.running_var,
        call.weight,
        call.bias,
        call.training,
        0.0 if momentum is None else momentum,
        call.eps,
        activation=call.activation,
        residual=call.residual,
        ghost_batch_size=call.ghost_batch_size,
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
    call = ForwardCall(*args)
    if needs_formula(*call.tensors()):
        raise RuntimeError(
            "torch.ops.bnext.batch_norm does not support torch.func transforms or forward-mode "
            "AD: call bnext.batch_norm or a bnext layer, which do"
        )
    differentiable = call.input, call.weight, call.bias, call.residual
    if not (torch.is_grad_enabled() and _requires_grad(*differentiable)):
        return ops.batch_norm_below_autograd(*call)
    output = _apply(*differentiable, call)
    return output, *output.grad_fn.stats


_library = torch.library.Library("bnext", "IMPL")
_library.impl("batch_norm", _autograd_kernel, "Autograd")
