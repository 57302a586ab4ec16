"""Inputs of half size beside float32 parameters, and autocast."""

from __future__ import annotations

import pytest
import torch
from layers import randn
from op_samples import ops
from torch import nn

import bnext

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_types_of_their_tensors(dtype: torch.dtype) -> None:
    x = randn(6, 4, 3).to(dtype).requires_grad_()
    r = randn(6, 4, 3).to(dtype).requires_grad_()
    layer = bnext.BatchNormAct1d(4, device=ops.device)
    output = layer(x, r)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert x.grad.dtype == r.grad.dtype == dtype
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    # Under create_graph the types are the same.
    grads = torch.autograd.grad(
        layer(x, r).float().square().sum(), [x, r, *layer.parameters()], create_graph=True
    )
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training: bool) -> None:
    """As nn.BatchNorm2d: a bfloat16 input (a convolution's output) stays bfloat16, beside float32
    parameters; the gradients too."""
    torch.manual_seed(0)
    norms = {
        "ours": bnext.BatchNorm2d(5, device=ops.device),
        "theirs": nn.BatchNorm2d(5, device=ops.device),
    }
    convolution = nn.Conv2d(3, 5, 3, device=ops.device)
    x = randn(4, 3, 6, 6)
    grads = {}
    for name, norm in norms.items():
        convolution.zero_grad()
        norm.train(training)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            hidden = convolution(x)
            output = norm(hidden)
            assert hidden.dtype == output.dtype == torch.bfloat16
            loss = output.float().square().sum() + output.float().sum()
        loss.backward()
        grads[name] = [p.grad.clone() for p in (*convolution.parameters(), *norm.parameters())]
        assert all(g.dtype == torch.float32 for g in grads[name])
    for a, e in zip(grads["ours"], grads["theirs"], strict=True):
        # Two roundings to bfloat16 (2^-9 each) per element of sums of 64.
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2 * e.abs().max().item() + 1e-2)
