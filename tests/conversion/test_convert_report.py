"""What bnext.convert says of what it did, and of bad arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from convert_cases import small
from torch import nn
from typer.testing import CliRunner

from bnext import conversion_report, convert, revert
from bnext.cli import app


def test_the_command_prints_the_report() -> None:
    result = CliRunner().invoke(app, ["convert", "convert_cases:TwoNorms"])
    assert result.exit_code == 0, result.output
    assert "1 fused with what follows" in result.output and "+ residual, relu" in result.output
    for source in ("convert_cases:Missing", "no_such_package:f", "math:pi", "convert_cases"):
        assert CliRunner().invoke(app, ["convert", source]).exit_code == 2, source


def test_the_report_is_readable() -> None:
    text = str(conversion_report(convert(small())))
    assert text.splitlines()[0] == (
        "3 batch norms: 2 fused with what follows (1 with a residual), 1 swapped, 0 left"
    )
    assert "1.bn: + residual, relu" in text
    with pytest.raises(ValueError, match="bnext.convert"):
        conversion_report(small())


@pytest.mark.parametrize("function", [convert, revert])
def test_bad_model(function: Callable[..., nn.Module]) -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        function({})


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_bad_ghost_batch_size_changes_nothing(size: object, error: type[Exception]) -> None:
    model = small()
    with pytest.raises(error, match="ghost_batch_size"):
        convert(model, ghost_batch_size=size, inplace=True)
    assert str(model) == str(small())
