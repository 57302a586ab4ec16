"""benchmarks.models and benchmarks.scaling, without a look at the clock."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer import Typer
from typer.testing import CliRunner

import bnext
from benchmarks import models, scaling
from benchmarks.models import NETWORKS, bare, fused, pairs, training_step
from bnext.timing import Rounds


class Shared(nn.Module):
    """Norms that must keep what follows them: an output with two users, a sum of two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.BatchNorm1d(6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = F.relu(y) + y
        return F.relu(self.second(z) + self.third(x))


def counts(model: nn.Module) -> tuple[int, int, int]:
    """Norms, those with a ReLU, and of these those with a residual."""
    found = pairs(torch.fx.symbolic_trace(model))
    with_relu = [pair for pair in found if pair.relu is not None]
    return len(found), len(with_relu), sum(pair.add is not None for pair in with_relu)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (NETWORKS["resnet18"].build, (20, 17, 8)),
        (NETWORKS["mobilenet_v2"].build, (52, 0, 0)),  # its activation is relu6
        (NETWORKS["tabular mlp"].build, (4, 4, 0)),
        (Shared, (3, 1, 1)),
    ],
    ids=["resnet18", "mobilenet_v2", "tabular mlp", "shared"],
)
def test_pairs_that_are_found(build: type[nn.Module], expected: tuple[int, int, int]) -> None:
    assert counts(build()) == expected


@pytest.mark.parametrize("name", ["resnet18", "tabular mlp", "shared"])
def test_the_fused_network_is_the_same_function(name: str) -> None:
    """In double, where nothing but a different computation exceeds 1e-9 after 20 layers."""
    torch.manual_seed(0)
    build = Shared if name == "shared" else NETWORKS[name].build
    shape = (8, 6) if name == "shared" else (4, *(min(n, 64) for n in NETWORKS[name].shape[1:]))
    model = build().double()
    replaced = fused(copy.deepcopy(model))
    x = torch.randn(shape, dtype=torch.double)
    for _ in range(2):
        expected, got = model(x), replaced(x)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(y.square().sum(), list(m.parameters()), allow_unused=True)
             for m, y in ((model, model(x)), (replaced, replaced(x)))]  # fmt: skip
    by_name = dict(zip((n for n, _ in replaced.named_parameters()), grads[1], strict=True))
    for (n, _), grad in zip(model.named_parameters(), grads[0], strict=True):
        torch.testing.assert_close(by_name[n], grad, rtol=1e-7, atol=1e-7)
    assert replaced.state_dict().keys() == model.state_dict().keys()
    assert any(isinstance(m, (bnext.BatchNormAct1d, bnext.BatchNormAct2d))
               for m in replaced.modules())  # fmt: skip


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
