"""benchmarks.models and benchmarks.scaling, without a look at the clock."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from typer import Typer
from typer.testing import CliRunner

from benchmarks import models, scaling
from benchmarks.models import NETWORKS, bare, training_step
from bnext.measure.timing import Rounds


def test_the_bare_network_has_no_norm_and_trains() -> None:
    network = NETWORKS["tabular mlp"]
    without = bare(network.build())
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.ReLU)) for m in without.modules())
    training_step(without, (8, *network.shape[1:]))(2)
    grads = [p.grad for p in without.parameters()]
    assert grads and all(grad is not None and grad.isfinite().all() for grad in grads)


def test_a_row_of_the_table() -> None:
    times = {"eager": [4e-3] * 5, "bnext": [3e-3] * 5, "bare": [2e-3] * 5}
    assert models.row("a", Rounds(times, 0.0)) == [
        "a", "4.0", "0.75 (0.75-0.75)", "50%", "33%"
    ]  # fmt: skip


def test_scaling_measures_every_size_on_every_number_of_threads(tmp_path: Path) -> None:
    app = Typer()
    app.command()(scaling.main)
    arguments = ["--output", str(tmp_path), "--minutes", "0.01", "--most", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "scaling.md").read_text().splitlines()
    for layout in scaling.ROW:
        assert sum(line.startswith(f"| {layout} | 1 |") for line in lines) == 2
    sizes = sorted(cell.nbytes / 2**20 for cell in scaling.cells(1024))
    assert 0.7 < sizes[0] <= 1 and sizes[-1] == 1024
