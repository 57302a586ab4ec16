"""Ghost batches against a loop of nn.BatchNorm over the pieces of torch.tensor_split."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close, assert_same
from cases import DTYPES, Case, Mode
from layers import make_layer
from oracle import activate, assert_matches_torch, per_channel
from torch import Tensor, nn

import bnext

# Batch and ghost sizes: even, uneven by one, ghosts of two, one ghost, and more ghosts than pieces
# of work. (10 in threes: 4 ghosts of 3, 3, 2, 2; never a remainder of 1.)
SPLITS = ((8, 4), (10, 3), (8, 2), (7, 6), (64, 5), (6, 6))
RANKS = ((13,), (5, 7), (13, 5, 5), (64, 3, 3), (3, 2, 3, 5))


def num_ghosts(n: int, ghost_batch_size: int) -> int:
    return -(-n // ghost_batch_size)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_matches_a_loop_over_pieces(
    rank: tuple[int, ...],
    split: tuple[int, int],
    layout: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: str,
) -> None:
    """Outputs and gradients of the loop; running statistics of the whole batch, updated once."""
    if layout == "channels_last" and len(rank) == 1:
        layout = "transposed"
    case = Case((split[0], *rank), layout).with_dtypes(*dtypes)
    layer = make_layer(case, ghost_batch_size=split[1], device=device)
    assert_matches_torch(layer, case, Mode(), ghost_batch_size=split[1], device=device)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_with_activation_and_residual(
    layout: str, activation: str, with_residual: bool, device: str
) -> None:
    case = Case((10, 13, 5, 5), layout)
    layer = make_layer(case, activation=activation, act=True, ghost_batch_size=3, device=device)
    assert_matches_torch(
        layer,
        case,
        Mode(),
        activation=activation,
        with_residual=with_residual,
        ghost_batch_size=3,
        device=device,
    )


@pytest.mark.parametrize("momentum", [None, 1.0, -0.1, 0.0])
def test_momentum(momentum: float | None, device: str) -> None:
    mode = Mode(momentum=momentum)
    layer = make_layer(Case((10, 13)), mode, ghost_batch_size=3, device=device)
    for step in range(3):
        case = Case((10, 13), seed=step)
        assert_matches_torch(layer, case, mode, ghost_batch_size=3, device=device)
    assert int(layer.num_batches_tracked) == 3


def test_pieces_are_those_of_tensor_split(device: str) -> None:
    """Each piece is normalised on its own, so changing a sample changes its piece only."""
    x = Case((10, 13)).input(device)
    changed = x.clone()
    changed[4] += 1.0  # of pieces 0-2, 3-5, 6-7, 8-9
    outputs = [
        bnext.batch_norm(v, None, None, training=True, ghost_batch_size=3) for v in (x, changed)
    ]
    touched = (outputs[0] != outputs[1]).any(1)
    assert touched.tolist() == [i in (3, 4, 5) for i in range(10)]


def forward_backward(ghost_batch_size: int | None, case: Case, device: str) -> list[Tensor]:
    layer = make_layer(
        case, act=True, activation="relu", ghost_batch_size=ghost_batch_size, device=device
    )
    x = case.input(device).requires_grad_()
    y = layer(x, case.residual(device))
    grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), case.grad_output(device))
    return [y, *grads, layer.running_mean, layer.running_var, layer.num_batches_tracked]


@pytest.mark.parametrize("shape", [(6, 13), (300, 64), (6, 64, 7, 7), (6, 3, 40, 40)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ghosts_as_large_as_the_batch_are_plain_bit_for_bit(
    shape: tuple[int, ...], layout: str, device: str
) -> None:
    if layout == "channels_last" and len(shape) == 2:
        layout = "offset"
    case = Case(shape, layout)
    plain = forward_backward(None, case, device)
    for size in (shape[0], shape[0] + 1, 10**9):
        for a, b in zip(forward_backward(size, case, device), plain, strict=True):
            assert_same(a, b)


def test_running_statistics_do_not_depend_on_the_ghost_size(device: str) -> None:
    """One update with the whole batch, though each ghost has a mean of its own."""
    x = Case((64, 5, 6)).input(device)
    x += torch.arange(64.0, device=device)[:, None, None]  # the ghosts' means are far apart
    plain = nn.BatchNorm1d(5, dtype=torch.float64, device=device)
    plain(x.double())
    for size in (2, 5, 7, 32):
        layer = bnext.BatchNorm1d(5, ghost_batch_size=size, device=device)
        layer(x)
        assert int(layer.num_batches_tracked) == 1
        assert_close(layer.running_mean, plain.running_mean, 32.0)
        assert_close(layer.running_var, plain.running_var, plain.running_var)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_eval_does_not_depend_on_the_ghost_size(activation: str | None, device: str) -> None:
    case = Case((10, 13, 5, 5))
    outputs = []
    for size in (None, 1, 3):
        layer = make_layer(
            case,
            training=False,
            act=True,
            activation=activation,
            ghost_batch_size=size,
            device=device,
        )
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        outputs.append(layer(case.input(device)))
        for name, value in layer.state_dict().items():
            assert_same(value, before[name], name)
    assert_same(outputs[1], outputs[0])
    assert_same(outputs[2], outputs[0])


def test_ghosts_of_a_layer_without_running_statistics(device: str) -> None:
    """Such a layer uses batch statistics in eval too, but ghosts are for training only."""
    case = Case((10, 13))
    mode = Mode(track_running_stats=False)
    layer = make_layer(case, mode, ghost_batch_size=3, device=device)
    assert_matches_torch(layer, case, mode, ghost_batch_size=3, device=device)
    plain = make_layer(case, mode, device=device)
    assert_same(layer.eval()(case.input(device)), plain(case.input(device)))


@pytest.mark.parametrize("size", [1, 2])
def test_ghost_of_one_value_is_an_error_that_names_the_ghost_size(size: int, device: str) -> None:
    """3 samples in twos are 2 and 1."""
    layer = make_layer(Case((3, 5)), ghost_batch_size=size, device=device)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match="more than 1 value per channel.*ghost_batch_size"):
        layer(Case((3, 5)).input(device))
    for name, value in layer.state_dict().items():
        assert_same(value, before[name], name)


def test_ghost_of_one_sample_with_several_values_is_instance_norm(device: str) -> None:
    case = Case((4, 5, 7))
    layer = make_layer(case, ghost_batch_size=1, device=device)
    x = case.input(device)
    norm = nn.functional.instance_norm(x.double())
    want = norm * per_channel(layer.weight, x) + per_channel(layer.bias, x)
    assert_close(layer(x), activate(want, None), 8.0)


def test_ghosts_in_half_types_keep_float_statistics(device: str) -> None:
    """Many ghosts in bfloat16: gradients of weight and bias add up over ghosts in float32."""
    case = Case((512, 7, 3), dtype=torch.bfloat16)
    layer = make_layer(case, ghost_batch_size=2, device=device)
    assert num_ghosts(512, 2) == 256
    assert_matches_torch(layer, case, Mode(), ghost_batch_size=2, device=device)
