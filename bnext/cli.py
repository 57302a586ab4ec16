"""``python -m bnext``: the demo, the build's configuration, and the accuracy of a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"The command line needs {error.name}: pip install bnext[cli]") from error

app = typer.Typer(
    help="Fused batch norm: a demo, the build's configuration, accuracy against float64.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def config() -> None:
    """Print what this build of bnext contains and what it uses on this machine."""
    import bnext

    bnext.show_config()


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where to draw the picture.")] = Path("demo.png"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: does it run? Numbers mean nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of splits, weights and batches.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: PyTorch's own. Fewer on a busy machine.")
    ] = None,
) -> None:
    """Train on scikit-learn's digits and on New York's flights of 2013, beside nn.BatchNorm.

    Exits with status 1 when bnext and float64 nn.BatchNorm disagree beyond rounding.
    """
    import dataclasses

    try:
        import matplotlib  # noqa: F401

        from bnext.accuracy import num_threads
        from bnext.demo import QUICK, Settings, run

        settings = dataclasses.replace(QUICK if quick else Settings(), seed=seed)
        with num_threads(threads):
            passed = run(output, settings)
    except ModuleNotFoundError as error:
        raise SystemExit(f"The demo needs {error.name}: pip install bnext[cli,demo]") from error
    raise typer.Exit(0 if passed else 1)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not 2 <= len(shape) <= 5 or min(shape, default=0) < 1:
        raise typer.BadParameter("expected 2 to 5 positive sizes, such as 64,4,224,224")
    return shape


@app.command()
def accuracy(
    shape: Annotated[
        Any, typer.Option(parser=_shape, metavar="N,C,...", help="Shape of the input.")
    ] = "64,4,224,224",
    layout: Annotated[
        str | None,
        typer.Option(help="contiguous, channels_last (default of 4-D, 5-D), transposed (2-D)."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or float64.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: PyTorch's own.")] = None,
) -> None:
    """How far running_var and the output are from float64, for growing offsets of the input."""
    import torch

    from bnext.accuracy import LAYOUTS, layers_for, make_sample, measure

    dtypes = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
    if dtype not in dtypes:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(dtypes)}")
    layout = layout or ("channels_last" if len(shape) > 3 else "contiguous")
    if layout not in LAYOUTS:
        raise typer.BadParameter(f"{layout!r} is none of {', '.join(LAYOUTS)}")
    table = Table(title=f"{shape} {layout} {dtype}: largest error of one training step")
    for heading in ("mean", "layer", "running_var (relative)", "output (absolute)"):
        table.add_column(heading, justify="right")
    means = (0.0, 1e2, 1e3) if dtypes[dtype].itemsize == 2 else (0.0, 1e2, 1e3, 1e4, 1e6)
    for mean in means:
        try:
            sample = make_sample(shape, mean, layout, dtypes[dtype])
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        for name, layer in layers_for(len(shape)).items():
            errors = measure(layer, sample, threads)
            table.add_row(f"{mean:g}", name, f"{errors.running_var:.1e}", f"{errors.output:.1e}")
    Console().print(table)
