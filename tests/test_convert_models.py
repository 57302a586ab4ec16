"""bnext.convert on networks that people use: `make matrix` writes the same down."""

from __future__ import annotations

import pytest

from tools import model_matrix
from tools.model_matrix import MODELS, Model


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_converted_networks_train_and_predict_as_before(model: Model) -> None:
    package = model.name.partition(" ")[0].replace("-", "_")
    if package in ("torchvision", "timm", "pytorch_tabnet"):
        pytest.importorskip(package)
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
