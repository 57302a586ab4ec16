"""bnext.convert(model, example_inputs=...): both models run on copies, and are compared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from convert_cases import OptionalSkip, ThroughSubmodules, block, small
from torch import Tensor, nn

import bnext
from bnext.conversion import calls


@pytest.mark.parametrize("name", ["sum_in_place", "by_training", "used_twice", "promotion"])
def test_models_that_stay_what_they_are(name: str) -> None:
    plain = nn.Sequential(block(name), nn.Dropout())
    before = copy.deepcopy(plain.state_dict())
    random_state = torch.get_rng_state()
    converted = bnext.convert(plain, example_inputs=torch.randn(4, 4, 5, 6))
    assert len(bnext.conversion_report(converted).entries) == 1
    torch.set_rng_state(random_state)
    for model in (plain, converted):
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        assert all(p.grad is None for p in model.parameters())


def test_nothing_is_drawn_or_changed() -> None:
    plain = small()
    modes = [m.training for m in plain.modules()]
    state = torch.get_rng_state()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    bnext.convert(plain, example_inputs=(x,), ghost_batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept) and x.grad is None
    assert [m.training for m in plain.modules()] == modes


@pytest.mark.parametrize("kind", ["keywords", "tuple"])
def test_kinds_of_inputs(kind: str) -> None:
    x, skip = torch.randn(8, 4), torch.randn(8, 4)
    inputs: Any = {"x": x, "skip": skip} if kind == "keywords" else (x, skip)
    bnext.convert(OptionalSkip(), example_inputs=inputs)


def test_a_model_of_one_dtype_only() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(x.float()))

    bnext.convert(Fixed(), example_inputs=torch.randn(8, 4))


@pytest.mark.parametrize("training", [True, False])
def test_a_difference_is_found_and_its_layer_named(
    monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """With a fault planted in the fused call of one norm."""
    original = calls.follow

    def wrong(norm: Any, input: Any, rest: calls.Rest) -> Any:
        output = original(norm, input, rest)
        is_target = isinstance(norm, nn.BatchNorm1d) and rest.add is not None
        return output + 0.01 if is_target and norm.training == training else output

    monkeypatch.setattr(calls, "follow", wrong)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), OptionalSkip()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.stem(x), x))

    model = Model()
    mode = "training" if training else "eval"
    with pytest.raises(RuntimeError, match=f"in {mode}, output 0 differs.* layer .*block"):
        bnext.convert(model, example_inputs=torch.randn(8, 4), inplace=True)
    assert type(model.block.bn) is nn.BatchNorm1d  # nothing was changed


def test_through_submodules() -> None:
    bnext.convert(ThroughSubmodules(), example_inputs=torch.randn(8, 4, 5))
