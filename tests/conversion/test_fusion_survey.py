"""docs/fusion.md: what is fused as networks run is what the report says."""

from __future__ import annotations

import pytest
import torch
from convert_cases import OptionalPlaces, ThroughSubmodules, TwoNorms
from torch import nn

import bnext
from tools import fusion_survey

X = torch.randn(8, 4)


@pytest.mark.parametrize("make", [OptionalPlaces, TwoNorms])
def test_small_networks(make: type[nn.Module]) -> None:
    model = make()
    found = fusion_survey.survey(model, X)
    report = bnext.conversion_report(bnext.convert(model))
    assert found.fused == {entry.name for entry in report.fused}
    assert found.possible == {name for name, m in model.named_modules() if bnext.is_batch_norm(m)}
    assert set(found.missed) == found.possible - found.fused
    assert all(found.missed.values())


def test_through_submodules() -> None:
    found = fusion_survey.survey(ThroughSubmodules(), torch.randn(8, 4, 5))
    assert found.possible == found.fused
    assert found.norms == len(found.fused) == 4


@pytest.mark.parametrize(
    "name",
    ["torchvision resnet18", "torchvision mobilenet_v2", "timm resnet50", "timm efficientnet_b0"],
)
def test_networks(name: str) -> None:
    pytest.importorskip(name.split()[0])
    ((_, build, shape),) = [n for n in fusion_survey.networks() if n[0] == name]
    model = build().to("meta")
    found = fusion_survey.survey(model, torch.empty(shape, device="meta"))
    report = bnext.conversion_report(bnext.convert(model))
    assert found.fused == {entry.name for entry in report.fused}
    assert len(found.possible & found.fused) > 0.6 * len(found.possible)


def test_the_page_adds_up() -> None:
    surveys = {
        name: fusion_survey.survey(TwoNorms(), X) for name in ("torchvision a", "timm b", "timm c")
    }
    page = fusion_survey.page(surveys)
    assert "torchvision: 1 networks, 1 of 2 fused (50%)." in page
    assert "timm: 2 networks, 2 of 4 fused (50%)." in page
    assert "| 3 | its sum is fused with the other summand |" in page
