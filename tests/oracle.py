"""The oracle: torch's own batch norm in float64, and the sizes that the tolerances are relative to.

Nothing here uses bnext. `run` works alike for a layer of bnext and for `TorchLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from assertions import GRAD_EPS, OUTPUT_EPS, arithmetic_tolerance, assert_close
from cases import Case, Mode
from torch import Tensor, nn

TORCH_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# Where an activation has no derivative; those that are not here are smooth.
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,)}


def activate(z: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return z
    return getattr(F, activation)(z)  # leaky_relu's default slope is 0.01


class TorchLayer(nn.Module):
    """activation(nn.BatchNorm<d>d(input) + residual) in float64, in ghost batches when asked."""

    def __init__(
        self, case: Case, mode: Mode, activation: str | None, ghost_batch_size: int | None = None
    ) -> None:
        super().__init__()
        options = {**vars(mode)}
        bias = options.pop("bias")
        self.norm = TORCH_LAYERS[case.spatial_rank - 1](
            case.channels, **options, dtype=torch.float64
        )
        if not bias and mode.affine:
            self.norm.bias = None
        self.activation = activation
        self.ghost_batch_size = ghost_batch_size

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.training and self.ghost_batch_size is not None:
            ghosts = input.tensor_split(-(-len(input) // self.ghost_batch_size))
            n = self.norm
            pieces = [
                F.batch_norm(g, None, None, n.weight, n.bias, True, eps=n.eps) for g in ghosts
            ]
            z = torch.cat(pieces)
            with torch.no_grad():  # one update, with the statistics of the whole batch
                n(input)
        else:
            z = self.norm(input)
        return activate(z if residual is None else z + residual, self.activation)


@dataclass
class Run:
    """Everything that a forward and a backward pass leave behind."""

    output: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


def run(
    layer: nn.Module, input: Tensor, grad_output: Tensor, residual: Tensor | None = None
) -> Run:
    """One forward and one backward pass."""
    input = input.detach().requires_grad_()
    wanted = {"input": input}
    args = [input]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        wanted["residual"] = residual
        args.append(residual)
    wanted |= {name.removeprefix("norm."): p for name, p in layer.named_parameters()}
    output = layer(*args)
    grads = torch.autograd.grad(output, list(wanted.values()), grad_output)
    buffers = {name.removeprefix("norm."): b.clone() for name, b in layer.named_buffers()}
    return Run(output.detach(), dict(zip(wanted, grads, strict=True)), buffers)


def per_channel(vector: Tensor | None, like: Tensor) -> Tensor | float:
    """A vector of C broadcast against (N, C, *)."""
    return 1.0 if vector is None else vector.double().view(1, -1, *[1] * (like.dim() - 2))


class Magnitudes:
    """The sizes of the terms in every result (see `assertions.py`), from the definition of batch
    norm in float64; a ghost's statistics where there are ghosts.

    z = (x - mean) * scale + bias + residual,  scale = weight * invstd,  dz = activation'(z) * dy
    dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat)),  d weight = sum(dz * xhat)
    """

    def __init__(
        self,
        input: Tensor,
        grad_output: Tensor,
        layer: nn.Module,
        *,
        training: bool,
        activation: str | None,
        residual: Tensor | None = None,
        num_ghosts: int = 1,
    ) -> None:
        x = input.detach().double().cpu().contiguous()
        eps = layer.eps
        weight = None if layer.weight is None else layer.weight.detach().cpu()
        bias = None if layer.bias is None else layer.bias.detach().cpu()
        dims = [0, *range(2, x.dim())]
        ghosts: Sequence[Tensor] = x.tensor_split(num_ghosts) if training else (x,)
        centred, means, invstds = [], [], []
        for ghost in ghosts:
            if training:
                mean = ghost.mean(dims, keepdim=True)
                var = (ghost - mean).square().mean(dims, keepdim=True)
            else:
                mean = per_channel(layer.running_mean.detach().cpu(), x)
                var = per_channel(layer.running_var.detach().cpu(), x)
            centred.append((ghost - mean).abs())
            means.append(mean.expand_as(ghost))
            invstds.append((var + eps).rsqrt().expand_as(ghost))
        scale = torch.cat(invstds) * per_channel(weight, x)
        shift = 0.0 if bias is None else per_channel(bias, x).abs()
        added = 0.0 if residual is None else residual.detach().double().cpu().abs()
        # An error of the mean is one of every x - mean of the channel. The mean is a sum of rounded
        # differences: it is off by a rounding of their size. It is held to twice the precision of
        # float: what is left of it is all there is in a constant channel. (In float64 it is held
        # plainly, and torch's own x * scale + (bias - mean * scale) rounds as coarsely.)
        left = 1.0 if input.dtype == torch.float64 else torch.finfo(torch.float32).eps
        deviation = torch.cat(centred) + left * (x.abs() + torch.cat(means).abs())
        if training:
            deviation = deviation + torch.cat([c.mean(dims, True).expand_as(c) for c in centred])
        xhat = deviation * torch.cat(invstds)
        self.output = deviation * scale.abs() + shift + added

        dz = 1.1 * grad_output.detach().double().cpu().abs()  # |silu'| <= 1.1, the others' <= 1
        if activation == "silu":  # |silu''| <= 0.5: an error of z is one of silu'(z)
            dz = dz * (1 + 0.5 * self.output)
        self.grads = {"residual": dz, "bias": dz.sum(dims), "weight": (dz * xhat).sum(dims)}
        inner = dz
        if training:
            parts = zip(dz.tensor_split(num_ghosts), xhat.tensor_split(num_ghosts), strict=True)
            inner = torch.cat(
                [
                    d + d.mean(dims, keepdim=True) + h * (d * h).mean(dims, keepdim=True)
                    for d, h in parts
                ]
            )
        self.grads["input"] = scale.abs() * inner

        mean = x.mean(dims)
        count = x.numel() // x.shape[1]
        var = (x - per_channel(mean, x)).square().sum(dims) / max(1, count - 1)
        self.batch = {"running_mean": x.abs().mean(dims), "running_var": var}


def away_from_kink(
    grad_output: Tensor, z: Tensor, magnitude: Tensor, activation: str | None
) -> Tensor:
    """`grad_output`, 0 where it is not certain on which side of a kink the pre-activation z is:
    there relu's derivative is 0 or 1 by the last bit, and both are right. In half types a tiny z
    (times the leaky slope) may also underflow to 0, which loses its sign."""
    if activation not in KINKS:
        return grad_output
    dtype = grad_output.dtype
    margin = 2 * arithmetic_tolerance(dtype, magnitude, OUTPUT_EPS)
    info = torch.finfo(dtype)
    margin = margin + 100 * info.smallest_normal * info.eps
    near = torch.stack([(z - kink).abs() <= margin for kink in KINKS[activation]]).any(0)
    return torch.where(near.to(grad_output.device), 0.0, grad_output)


def load_into_torch(layer: nn.Module, theirs: TorchLayer) -> None:
    """Copies parameters and buffers into the float64 layer."""
    theirs.norm.load_state_dict(layer.state_dict())
    theirs.train(layer.training)


def assert_matches_torch(
    layer: nn.Module,
    case: Case,
    mode: Mode,
    *,
    activation: str | None = None,
    with_residual: bool = False,
    ghost_batch_size: int | None = None,
    device: str = "cpu",
) -> None:
    """One step (output, gradients, buffers) of `layer` against nn.BatchNorm in float64, from the
    same state and the same input, as the layer's dtype holds them."""
    input = case.input(device)
    grad_output = case.grad_output(device)
    residual = case.residual(device) if with_residual else None
    theirs = TorchLayer(case, mode, activation, ghost_batch_size)
    load_into_torch(layer, theirs)
    num_ghosts = 1
    if layer.training and ghost_batch_size is not None:
        num_ghosts = -(-len(input) // ghost_batch_size)
    before = {k: v.detach().double().cpu().clone() for k, v in layer.named_buffers()}
    training = layer.training or layer.running_mean is None

    sizes = Magnitudes(
        input,
        grad_output,
        layer,
        training=training,
        activation=activation,
        residual=residual,
        num_ghosts=num_ghosts,
    )
    x64 = input.double().cpu().contiguous()
    residual64 = None if residual is None else residual.double().cpu().contiguous()
    if activation is not None:
        linear = TorchLayer(case, mode, None, ghost_batch_size)
        load_into_torch(layer, linear)
        with torch.no_grad():
            z = linear(x64, residual64)
        grad_output = away_from_kink(grad_output, z, sizes.output, activation)

    want = run(theirs, x64, grad_output.double().cpu().contiguous(), residual64)
    have = run(layer, input, grad_output, residual)

    assert have.output.dtype == case.dtype
    assert_close(have.output, want.output, sizes.output, name="output")
    assert have.grads.keys() == want.grads.keys()
    for name, grad in have.grads.items():
        assert grad.dtype == (case.dtype if name in ("input", "residual") else case.param_dtype)
        size = sizes.grads[name]
        assert_close(grad, want.grads[name], size, eps_count=GRAD_EPS, name=f"grad of {name}")
    assert have.buffers.keys() == want.buffers.keys()
    for name, buffer in have.buffers.items():
        if name == "num_batches_tracked":
            assert buffer.dtype == torch.int64 and buffer.dim() == 0
            assert int(buffer) == int(want.buffers[name])
            continue
        assert buffer.dtype == case.param_dtype
        size = before[name].abs()
        if layer.training:
            steps = int(want.buffers["num_batches_tracked"])
            momentum = 1 / steps if mode.momentum is None else mode.momentum
            size = abs(1 - momentum) * size + abs(momentum) * sizes.batch[name]
        assert_close(buffer, want.buffers[name], size, name=name)
