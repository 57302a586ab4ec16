"""Accuracy of bnext beside PyTorch, measured against float64.

    python -m benchmarks.accuracy [--table docs/accuracy.md]
    python -m benchmarks.accuracy --full                  # every shape, layout and dtype

With ``--table`` the table is also written between the markers of that file.
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bnext.measure.accuracy import (
    LAYOUTS,
    LayerErrors,
    LayerFactory,
    Sample,
    layers_for,
    make_sample,
    measure,
)

BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
THREADS = (1, 2)
MEANS = (0.0, 1e2, 1e3, 1e4, 1e6)
HALF_MEANS = (0.0, 1e2, 1e3)  # beyond, a half-precision input is one constant: nothing to measure

TABLE_INPUTS: tuple[tuple[tuple[int, ...], str], ...] = (
    ((64, 4, 224, 224), "channels_last"),
    ((64, 4, 224, 224), "contiguous"),
    ((32, 64, 56, 56), "channels_last"),
    ((4096, 16), "contiguous"),
)
FULL_SHAPES = ((64, 4, 224, 224), (32, 64, 56, 56), (4, 8, 32, 56, 56), (4096, 16), (200000, 3))

# (input, library, mean) -> the worse of the thread counts
Results = dict[tuple[str, str, float], LayerErrors]


def _name(shape: Sequence[int], layout: str) -> str:
    return f"`({', '.join(map(str, shape))})`" + ("" if len(shape) == 2 else f" {layout}")


def _worst(errors: Sequence[LayerErrors]) -> LayerErrors:
    """Field by field, the worst of several measurements (a nan is worse than any number)."""

    def worst(values: list[float]) -> float:
        return math.nan if any(map(math.isnan, values)) else max(values)

    ratios = [error.var_ratio for error in errors]
    return LayerErrors(
        running_mean=worst([error.running_mean for error in errors]),
        running_var=worst([error.running_var for error in errors]),
        var_ratio=max(ratios, key=lambda ratio: abs(math.log(ratio)) if ratio > 0 else math.inf),
        output=worst([error.output for error in errors]),
        output_rounding=errors[0].output_rounding,
        grad_input=worst([error.grad_input for error in errors]),
    )


def measure_all_threads(
    layer: LayerFactory, sample: Sample, device: str, *, backward: bool = False
) -> LayerErrors:
    """The worse of the thread counts, of which only the CPU knows more than one."""
    counts = THREADS if device == "cpu" else THREADS[:1]
    return _worst([measure(layer, sample, n, backward=backward, device=device) for n in counts])


def table_results(device: str) -> Results:
    results: Results = {}
    for shape, layout in TABLE_INPUTS:
        for mean in MEANS:
            sample = make_sample(shape, mean, layout)
            for library, layer in layers_for(len(shape)).items():
                errors = measure_all_threads(layer, sample, device)
                results[_name(shape, layout), library, mean] = errors
    return results


def _cell(value: float) -> str:
    if 1 <= value < 1000:
        return f"{value:.2g}" if value < 100 else f"{value:.0f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")


def _error_rows(results: Results, field: str) -> Iterator[str]:
    for name in dict.fromkeys(name for name, _, _ in results):
        for library in ("PyTorch", "bnext"):
            errors = (getattr(results[name, library, mean], field) for mean in MEANS)
            first = name if library == "PyTorch" else ""
            label = f"**{library}**" if library == "bnext" else library
            yield f"| {first} | {label} | " + " | ".join(map(_cell, errors)) + " |"


def _machine(device: str) -> str:
    if device == "cpu":
        threads = " and ".join(map(str, THREADS))
        name = f"the worse of {threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    else:
        name = torch.cuda.get_device_name()
    return f"{name}, PyTorch {torch.__version__}, {datetime.date.today().isoformat()}"


def markdown(results: Results, device: str) -> str:
    """The two tables, without the markers."""
    columns = " | ".join(f"mean {mean:g}" for mean in (0, 100, 1000, 10000))
    lines = []
    for title, field in (
        ("`running_var`, relative error", "running_var"),
        ("output, absolute error", "output"),
    ):
        lines += [
            f"| {title} | | {columns} | mean 10^6 |",
            "|---|---|" + "---:|" * len(MEANS),
            *_error_rows(results, field),
            "",
        ]
    lines.append(
        "Largest error against float64 of one training step on normal values of standard deviation "
        f"1, float32 ({_machine(device)}). "
        "Made by `python -m benchmarks.accuracy --table docs/accuracy.md`."
    )
    return "\n".join(lines)


def write_between_markers(path: Path, table: str) -> None:
    """Replace what stands between the two markers of ``path``; raise ValueError without them."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no {BEGIN} followed by {END}")
    path.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def _layouts(shape: Sequence[int]) -> list[str]:
    if len(shape) == 2:
        return ["contiguous", "transposed"]
    return [layout for layout in LAYOUTS if layout != "transposed"]


def full_cases() -> Iterator[tuple[tuple[int, ...], str, torch.dtype, float, bool]]:
    """Shape, layout, dtype, mean and whether the first value of a channel is an outlier."""
    for shape in FULL_SHAPES:
        for layout in _layouts(shape):
            for mean in MEANS:
                yield shape, layout, torch.float32, mean, False
            yield shape, layout, torch.float32, 0.0, True
            for dtype in (torch.float16, torch.bfloat16):
                for mean in HALF_MEANS:
                    yield shape, layout, dtype, mean, False
                yield shape, layout, dtype, 0.0, True


def print_full(device: str) -> None:
    header = ("input", "dtype", "mean", "library", "mean/std", "var", "output", "floor", "grad")
    widths = (33, 9, 8, 7, 8, 8, 8, 8, 8)
    print("error of: running_mean in standard deviations, running_var relative, output absolute")
    print("(floor: the truth rounded to the output's dtype), grad_input relative to its largest;")
    print(f"{_machine(device)}\n")

    def row(cells: Sequence[str]) -> None:
        print(" ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))

    row(header)
    for shape, layout, dtype, mean, outlier in full_cases():
        sample = make_sample(shape, mean, layout, dtype, outlier=outlier)
        for library, layer in layers_for(len(shape)).items():
            errors = measure_all_threads(layer, sample, device, backward=True)
            row(
                (
                    f"{tuple(shape)} {layout}",
                    str(dtype).removeprefix("torch."),
                    "outlier" if outlier else f"{mean:g}",
                    library,
                    _cell(errors.running_mean),
                    _cell(errors.running_var),
                    _cell(errors.output),
                    _cell(errors.output_rounding),
                    _cell(errors.grad_input),
                )
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.accuracy")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--table", type=Path, help="markdown file whose table is replaced")
    parser.add_argument("--full", action="store_true", help="every shape, layout and dtype")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if options.full:
        print_full(options.device)
        return
    table = markdown(table_results(options.device), options.device)
    print(table)
    if options.table is not None:
        write_between_markers(options.table, table)


if __name__ == "__main__":
    main()
