"""``python -m bnext``: the demo, the build's configuration, accuracy and speed of a layer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"The command line needs {error.name}: pip install bnext[cli]") from error

app = typer.Typer(
    help="Fused batch norm: a demo, the build's configuration, accuracy and speed of a layer.",
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

        from bnext.demo import QUICK, Settings, run
        from bnext.measure.accuracy import num_threads

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


def _dtype(name: str) -> Any:
    import torch

    dtypes = ("float32", "float16", "bfloat16", "float64")
    if name not in dtypes:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(dtypes)}")
    return getattr(torch, name)


_Shape = Annotated[Any, typer.Option(parser=_shape, metavar="N,C,...", help="Shape of the input.")]
_DType = Annotated[str, typer.Option(help="float32, float16, bfloat16 or float64.")]
_Threads = Annotated[int | None, typer.Option(min=1, help="Default: PyTorch's own.")]


@app.command()
def accuracy(
    shape: _Shape = "64,4,224,224",
    layout: Annotated[
        str | None,
        typer.Option(help="contiguous, channels_last (default of 4-D, 5-D), transposed (2-D)."),
    ] = None,
    dtype: _DType = "float32",
    threads: _Threads = None,
) -> None:
    """How far running_var and the output are from float64, for growing offsets of the input."""
    from bnext.measure.accuracy import LAYOUTS, layers_for, make_sample, measure

    torch_dtype = _dtype(dtype)
    layout = layout or ("channels_last" if len(shape) > 3 else "contiguous")
    if layout not in LAYOUTS:
        raise typer.BadParameter(f"{layout!r} is none of {', '.join(LAYOUTS)}")
    table = Table(title=f"{shape} {layout} {dtype}: largest error of one training step")
    for heading in ("mean", "layer", "running_var (relative)", "output (absolute)"):
        table.add_column(heading, justify="right")
    means = (0.0, 1e2, 1e3) if torch_dtype.itemsize == 2 else (0.0, 1e2, 1e3, 1e4, 1e6)
    for mean in means:
        try:
            sample = make_sample(shape, mean, layout, torch_dtype)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        for name, layer in layers_for(len(shape)).items():
            errors = measure(layer, sample, threads)
            table.add_row(f"{mean:g}", name, f"{errors.running_var:.1e}", f"{errors.output:.1e}")
    Console().print(table)


@app.command()
def bench(
    shape: _Shape = "32,64,56,56",
    layout: Annotated[str, typer.Option(help="contiguous or channels_last.")] = "contiguous",
    dtype: _DType = "float32",
    threads: _Threads = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Per mode.")] = 3.0,
    compiled: Annotated[
        bool, typer.Option("--compiled/--no-compiled", help="torch.compile takes a while.")
    ] = True,
) -> None:
    """Time of BatchNorm + ReLU of one shape, beside PyTorch's, interleaved and paired."""
    import torch

    from bnext.measure import bench as suite
    from bnext.measure.accuracy import num_threads
    from bnext.measure.timing import ratio, spread

    torch_dtype = _dtype(dtype)
    if layout not in ("contiguous", "channels_last"):
        raise typer.BadParameter(f"{layout!r} is neither contiguous nor channels_last")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here")
    with num_threads(threads):
        table = Table(
            title=f"BatchNorm + ReLU {shape} {layout} {dtype}, {device}, "
            f"{torch.get_num_threads()} threads: medians (quartiles) of the rounds"
        )
        for heading in ("mode", "variant", "us", "bnext / variant", "GB/s"):
            table.add_column(heading, justify="right")
        try:
            for inputs, rounds in suite.bench(
                shape, layout, torch_dtype, device, seconds=seconds, compiled=compiled
            ):
                for name, values in rounds.seconds.items():
                    time = spread(values).median
                    passes = suite.PASSES["copy" if name == "copy" else inputs.mode]
                    paired = "" if name == "bnext" else str(ratio(rounds.seconds["bnext"], values))
                    table.add_row(inputs.mode, name, f"{time * 1e6:.1f}", paired,
                                  f"{passes * inputs.nbytes / time / 1e9:.1f}")  # fmt: skip
                table.add_section()
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    Console().print(table)


def _build(source: str) -> Any:
    package, _, name = source.partition(":")
    try:
        if package == "torchvision":
            from torchvision import models

            return models.get_model(name, weights=None)
        module = importlib.import_module(package)
        return module.create_model(name) if package == "timm" else getattr(module, name)()
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{source!r} needs {error.name}, which is missing") from error
    except Exception as error:  # whatever the package says of a name, or a builder of itself
        raise typer.BadParameter(f"{source!r}: {error}") from error


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE:NAME",
            help="torchvision:resnet18, timm:dla34, or a module and a function of it that returns "
            "a model, as my_package.my_models:build.",
        ),
    ],
) -> None:
    """Convert a model to bnext, and print what was fused, what only swapped, and why."""
    from torch import nn

    import bnext

    model = _build(source)
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"{source!r} is a {type(model).__name__}, no torch.nn.Module")
    report = bnext.conversion_report(bnext.convert(model))
    table = Table(title=f"{source}: {report.summary()}")
    for heading in ("batch norm", "", "with, or why not"):
        table.add_column(heading, overflow="fold")
    for entry in report:
        table.add_row(entry.name or "(the model)", entry.action, entry.detail)
    Console().print(table)
