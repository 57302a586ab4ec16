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
from bnext.reference import (
    batch_norm_backward_reference,
    batch_norm_reference,
    frozen_backward_reference,
)

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
    """The first output of ``torch.ops.bnext.batch_norm``; the others are its node's ``stats``.

    The differentiable arguments come first; the rest, as one tuple, is nothing to autograd.
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
        rest: tuple[Any, ...],
    ) -> Tensor:
        running_mean, running_var, counter, training, momentum, eps, activation, ghosts = rest
        check_can_be_saved(ctx, input, weight, bias, residual)
        output, *ctx.stats = ops.batch_norm_below_autograd(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            counter,
            residual,
            training,
            momentum,
            eps,
            activation,
            ghosts,
        )
        ctx.settings = training, eps, activation
        ctx.set_materialize_grads(False)
        wants_parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        from_output = activations.from_output(activation)
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


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rest: tuple[Any, ...],
) -> Tensor:
    """The differentiable ``torch.ops.bnext.batch_norm``: its first output.

    ``rest``: the op's other arguments, in its order.
    """
    if is_exporting() and _torch_has_it(input, weight, bias, rest):
        return _standard_ops(input, weight, bias, residual, rest)
    if torch.compiler.is_compiling():  # the graph shall hold the op, not what the Function does
        return ops.batch_norm(input, weight, bias, *rest[:3], residual, *rest[3:])[0]
    # Under a functorch transform also an untracked tensor cannot enter the Function.
    if _functorch.peek_interpreter_stack() is not None:
        return _formula(input, weight, bias, residual, rest)
    if forward_ad._current_level >= 0 and needs_formula(input, weight, bias, *rest[:3], residual):
        return _formula(input, weight, bias, residual, rest)
    if rest[3] and ops.in_backward():  # a checkpoint's second forward: the first has updated
        rest = (None, None, None, True, 0.0, *rest[5:])
    # torch.jit.trace would record the Function and the op in it, and run both.
    if torch.is_grad_enabled() and not torch._C._is_tracing():
        if rest[3] and _has_saved_tensors_hooks():
            with unchanged_on_error(*rest[:3]):
                return _apply(input, weight, bias, residual, rest)
        return _apply(input, weight, bias, residual, rest)
    return ops.batch_norm_below_autograd(input, weight, bias, *rest[:3], residual, *rest[3:])[0]


def _torch_has_it(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]
) -> bool:
    """Whether operators of torch alone do the same: then an exported program is for every tool, as
    ONNX and those that move a program exported in training to eval."""
    running_mean, running_var, _, training, momentum, _, _, ghost_batch_size = rest
    if not training or torch.onnx.is_in_onnx_export():
        return True
    given = [t.dtype for t in (weight, bias, running_mean, running_var) if t is not None]
    one_dtype = given in ([input.dtype] * len(given), [torch.float32] * len(given))
    return ghost_batch_size is None and momentum is not None and one_dtype


def _standard_ops(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rest: tuple[Any, ...],
) -> Tensor:
    """In operators of torch alone."""
    running_mean, running_var, counter, training, momentum, eps, activation, _ = rest
    if training and not torch.onnx.is_in_onnx_export():
        if counter is not None:
            counter.add_(1)
        z = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        return activations.apply(activation, z if residual is None else z + residual)
    if input.dtype in (torch.float16, torch.bfloat16):  # rounded once, at the end
        tensors = (input, weight, bias, residual, running_mean, running_var)
        wide: Any = [None if t is None else t.float() for t in tensors]
        output = _standard_ops(wide[0], wide[1], wide[2], wide[3], (*wide[4:], *rest[2:]))
        return output.to(input.dtype)
    if training:  # ONNX has no such operator
        dims = [0, *range(2, input.dim())]
        var, mean = torch.var_mean(input, dims, correction=0, keepdim=True)
        z = (input - mean) * torch.rsqrt(var + eps)
        shape = [1, -1] + [1] * (input.dim() - 2)
        z = z if weight is None else z * weight.view(shape)
        z = z if bias is None else z + bias.view(shape)
    else:
        z = F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    return activations.apply(activation, z if residual is None else z + residual)


def _formula(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rest: tuple[Any, ...],
) -> Tensor:
    running_mean, running_var, num_batches_tracked, *settings = rest
    training, momentum, eps, activation, ghost_batch_size = settings
    tensors = (input, weight, bias, running_mean, running_var, num_batches_tracked, residual)
    for name, tensor in zip(_TENSOR_NAMES, tensors, strict=True):
        _check_dense_on(input.device, name, tensor)
    # The op on meta tensors makes all its checks; outside the functorch levels, which would wrap
    # the meta tensors too.
    with temporarily_clear_interpreter_stack():
        ops.batch_norm_below_autograd(*(_like_on_meta(t) for t in tensors), *settings)
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
    input, weight, bias, *buffers, residual = args[:_NUM_TENSORS]
    if not (torch.is_grad_enabled() and _requires_grad(input, weight, bias, residual)):
        return ops.batch_norm_below_autograd(*args)
    output = _apply(input, weight, bias, residual, (*buffers, *args[_NUM_TENSORS:]))
    return output, *output.grad_fn.stats


_library = torch.library.Library("bnext", "IMPL")
_library.impl("batch_norm", _autograd_kernel, "Autograd")
