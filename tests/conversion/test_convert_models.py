"""bnext.convert and bnext.fold on networks that people use; `make matrix` writes down what convert
does."""

from __future__ import annotations

import pytest
import torch

import bnext
from tools import model_matrix
from tools.model_matrix import MODELS, Model

NOT_FOLDED = {"torchvision densenet121": 62, "timm resnest14d": 1, "pytorch-tabnet": 21}


def package_of(model: Model) -> str:
    package = model.name.partition(" ")[0].replace("-", "_")
    if package in ("torchvision", "timm", "pytorch_tabnet"):
        pytest.importorskip(package)
    return package


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_converted_networks_train_and_predict_as_before(model: Model) -> None:
    package = package_of(model)
    result = model_matrix.compare(model)
    report = result.report
    residuals = sum(entry.residual for entry in report.fused)
    assert (len(report.fused), residuals, len(report.swapped)) == model.counts
    assert not report.left
    assert result.checkpoints
    # float64. A step of training multiplies the rounding of the one before by up to 1e3 in
    # the deepest of these networks, whose last batch norms see 16 values per channel.
    assert result.output < 1e-12
    assert result.loss < 1e-8
    if package != "pytorch_tabnet":  # its running statistics follow every ghost
        assert result.buffers < 1e-7


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_folded_networks_predict_as_before(model: Model) -> None:
    package_of(model)
    torch.manual_seed(0)
    plain = model.build().double().eval()
    model_matrix.spread_statistics(plain)
    folded = bnext.fold(bnext.convert(plain))
    left = sum(map(bnext.is_batch_norm, folded.modules()))
    assert left == NOT_FOLDED.get(model.name, 0)
    x = torch.randn(model.shape, dtype=torch.float64)
    with torch.no_grad():
        assert model_matrix.difference(folded(x), plain(x)) < 1e-12
