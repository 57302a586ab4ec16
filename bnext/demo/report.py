"""The demo's tables and its picture. Everything shown is passed in, measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from bnext.demo.check import NOISE, Comparison
from bnext.demo.training import PairedTime, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: distinct for colour-blind readers too.
ORANGE, BLUE, GREEN, PURPLE, GREY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#777777"


@dataclass(frozen=True)
class VariantResult:
    name: str
    is_baseline: bool
    steps: Sequence[int]
    scores: Sequence[Score]  # held-out, at those steps
    time: PairedTime
    eval_difference: float  # largest |logit - float64 nn.BatchNorm's logit|, same state


@dataclass(frozen=True)
class TaskResult:
    title: str
    n_held_out: int
    constant: Score
    variants: Sequence[VariantResult]


@dataclass(frozen=True)
class VarianceCurve:
    """running_var / true variance, where it is furthest from 1, for each mean offset."""

    label: str
    ratios: Sequence[float]
    is_bnext: bool
    dashed: bool = False


@dataclass(frozen=True)
class VariancePicture:
    shape: tuple[int, ...]
    means: Sequence[float]
    curves: Sequence[VarianceCurve]


def task_table(task: TaskResult) -> Table:
    table = Table(title=task.title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("layer")
    for heading in ("loss", "accuracy, %", "ms/step", "ratio", "eval diff"):
        table.add_column(heading, justify="right", no_wrap=True)
    for variant in task.variants:
        last = variant.scores[-1]
        error = (last.accuracy * (1 - last.accuracy) / task.n_held_out) ** 0.5
        table.add_row(
            variant.name,
            f"{last.loss:.4f}",
            f"{last.accuracy * 100:.2f} ± {error * 100:.2f}",
            f"{variant.time.seconds * 1e3:.2f}",
            "1" if variant.is_baseline else f"{variant.time.ratio:.2f}",
            f"{variant.eval_difference:.1e}",
        )
    table.add_row(
        "[dim]best constant guess[/]",
        f"[dim]{task.constant.loss:.4f}[/]",
        f"[dim]{task.constant.accuracy * 100:.2f}       [/]",
        *["[dim]–[/]"] * 3,
    )
    return table


TASK_LEGEND = (
    "loss, accuracy: held-out, after one run from one seed; ± is the binomial standard error, and "
    "smaller differences show nothing. ms/step: forward, backward and Adam of the whole network. "
    "ratio: median over pairs of such steps, each run right beside one with nn.BatchNorm + ReLU in "
    "the same memory layout. eval diff: largest difference of a held-out logit from a float64 "
    "nn.BatchNorm network with the same parameters and statistics."
)


def check_table(comparisons: Iterable[Comparison]) -> Table:
    table = Table(
        title="Check against float64 nn.BatchNorm: same state, same batch, one step",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("of")
    table.add_column("quantity")
    for heading in ("compared", "bnext", "nn.BatchNorm"):
        table.add_column(heading, justify="right")
    table.add_column("")
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.kind, comparison.quantity), []).append(comparison)
    for (kind, quantity), group in sorted(groups.items()):
        passed = all(comparison.passed for comparison in group)
        table.add_row(
            kind,
            quantity,
            str(len(group)),
            f"{_worst(comparison.difference for comparison in group):.3g}",
            f"{_worst(comparison.torch_difference for comparison in group):.3g}",
            "[green]ok[/]" if passed else "[bold red]FAILED[/]",
        )
    return table


def _worst(values: Iterable[float]) -> float:
    return max(values, key=lambda value: float("inf") if value != value else value)


CHECK_LEGEND = (
    "Largest difference in units of the tolerance: 1 is just tolerated; nn.BatchNorm is shown for "
    "comparison, not judged. layer: a rounding bound per element, 16 float32 roundings of every "
    "term, 64 for sums over the batch, whatever the offset of the input. network: what noise of "
    f"{NOISE:.0e} on every layer does to the float64 network. bnext/demo/check.py derives both."
)


def _times(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"


def draw(path: Path, picture: VariancePicture, tasks: Sequence[TaskResult], versions: str) -> None:
    """Write the picture (PNG, 1800 pixels wide)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, 1 + len(tasks), figsize=(12, 4.7), width_ratios=[1.35] + [1] * len(tasks)
        )
        _draw_variance(axes[0], picture)
        for axis, task in zip(axes[1:], tasks, strict=True):
            _draw_task(axis, task)
        figure.text(0.995, 0.012, versions, ha="right", fontsize=8, color=GREY)
        figure.tight_layout(rect=(0, 0.02, 1, 1), w_pad=2)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_variance(axis: Axes, picture: VariancePicture) -> None:
    for curve in picture.curves:
        axis.plot(
            picture.means,
            curve.ratios,
            label=curve.label,
            color=BLUE if curve.is_bnext else ORANGE,
            linestyle="--" if curve.dashed else "-",
            linewidth=3 if curve.is_bnext else 1.8,
            marker="o",
            markersize=5 if curve.is_bnext else 4,
            zorder=2 if curve.is_bnext else 3,
        )
    worst = max(picture.curves, key=lambda curve: max(curve.ratios))
    at = min(range(len(picture.means)), key=lambda i: abs(picture.means[i] - 1000))
    axis.set(xscale="log", yscale="log")
    if worst.ratios[at] > 1.5:
        axis.annotate(
            f"{_times(worst.ratios[at])} times too large\nat mean {picture.means[at]:g}",
            (picture.means[at], worst.ratios[at]),
            xytext=(-12, 24),
            textcoords="offset points",
            ha="right",
            color=ORANGE,
            arrowprops={"arrowstyle": "-", "color": ORANGE},
        )
    axis.set_title("Batch variance of data with an offset", loc="left", fontweight="bold")
    axis.set_xlabel("mean of the input, in standard deviations")
    axis.set_ylabel("running_var / true variance  (1 is right)")
    axis.legend(loc="upper left", frameon=False, fontsize=10, title=_shape_title(picture.shape),
                title_fontsize=10, alignment="left")  # fmt: skip
    axis.grid(True, alpha=0.25)


def _shape_title(shape: tuple[int, ...]) -> str:
    return f"input {shape}, float32, CPU"


def _draw_task(axis: Axes, task: TaskResult) -> None:
    colors = iter((BLUE, GREEN, PURPLE))
    for variant in task.variants:
        losses = [score.loss for score in variant.scores]
        color = ORANGE if variant.is_baseline else next(colors)
        axis.plot(
            variant.steps,
            losses,
            label=variant.name,
            color=color,
            linewidth=3 if variant.is_baseline else 1.8,
            alpha=0.7 if variant.is_baseline else 1,
            zorder=2 if variant.is_baseline else 3,
        )
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.09 * len(task.variants) * (high - low))  # room for the legend
    axis.set_title(task.title.split(":")[0], loc="left", fontweight="bold")
    axis.set_xlabel("training step")
    axis.set_ylabel("held-out loss (cross-entropy, nats)")
    axis.legend(frameon=False, fontsize=10, loc="upper right")
    axis.grid(True, alpha=0.25)
