"""Statistics over processes: 2 and 4 of them (gloo) against one that has all their batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sync_cases
import torch
from sync_cases import CASES, Case
from torch import Tensor

import bnext


def start(world: int, folder: Path, what: str) -> list[subprocess.Popen[str]]:
    script, meeting = sync_cases.__file__, str(folder / "meeting")
    return [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), meeting, str(folder), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def one_process(case: Case, together: list[int], world: int) -> dict[str, list[Tensor]]:
    """What the ranks `together` compute, in one batch."""
    layer = sync_cases.make_layer(case)
    if case.how == "accumulated":
        bnext.accumulate(layer, 2)
    tensors = []
    for step in range(2):
        batches = [sync_cases.make_batch(case, rank, world, step) for rank in together]
        joined = [torch.cat(parts) for parts in zip(*batches, strict=True)]
        if "ghost_batch_size" in case.options:
            tensors.append(ghosts_within_ranks(case, layer, batches))
        else:
            layer.zero_grad()
            tensors.append(sync_cases.run(layer, joined, case.residual))
    return {
        "tensors": [t for step_tensors in tensors for t in step_tensors],
        "grads": [p.grad for p in layer.parameters()],
        "buffers": [b.clone() for b in layer.buffers()],
    }


def ghosts_within_ranks(case: Case, layer: torch.nn.Module, batches: list[list[Tensor]]) -> list:
    """Each rank's ghosts by themselves; the running statistics of the joined batch."""
    alone = [sync_cases.make_layer(case) for _ in batches]
    parts = [sync_cases.run(m, b, case.residual) for m, b in zip(alone, batches, strict=True)]
    for i, parameter in enumerate(layer.parameters()):
        parameter.grad = sum(list(m.parameters())[i].grad for m in alone)
    layer(torch.cat([batch[0] for batch in batches]).detach())
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def differences(case: Case, world: int, results: list[dict]) -> list[str]:
    found = []

    def compare(what: str, actual: Tensor, expected: Tensor) -> None:
        try:
            # The bound; at an offset the inputs themselves are rounded at 1e4 * 2^-24.
            tolerance = 1e-6 if case.dtype == torch.float64 else 2e-5
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            found.append(f"{case.name}, {what}: {error}")

    for rank in range(world):
        together = sync_cases.ranks_together(case, rank, world)
        if rank != together[0]:
            continue
        expected = one_process(case, together, world)
        mine = [results[r][case.name] for r in together]
        for i, whole in enumerate(expected["tensors"]):
            joined = torch.cat([m["tensors"][i] for m in mine])
            compare(f"tensor {i}", joined, whole)
        for i, whole in enumerate(expected["grads"]):
            grads = [m["grads"][i] for m in mine]
            if case.how.startswith("ddp"):  # DDP has averaged them
                for grad in grads:
                    compare(f"grad {i}", grad * len(together), whole)
            else:
                compare(f"grad {i}", torch.stack(grads).sum(0), whole)
        for i, whole in enumerate(expected["buffers"]):
            for m in mine:
                compare(f"buffer {i}", m["buffers"][i], whole)
                if not torch.equal(m["buffers"][i], mine[0]["buffers"][i]):
                    found.append(f"{case.name}, buffer {i}: the ranks' differ")
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_compute_what_one_process_does(world: int, tmp_path: Path) -> None:
    for process in start(world, tmp_path, "cases"):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    found = [line for case in CASES for line in differences(case, world, results)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("what", ["dies", "other channels", "another layer"])
def test_a_rank_that_fails_is_an_error_on_the_others(what: str, tmp_path: Path) -> None:
    first, second = start(2, tmp_path, what)
    output, _ = first.communicate(timeout=90)
    assert (first.returncode, output.count("RuntimeError")) == (0, 1), output
    second.communicate(timeout=90)


def test_without_processes_a_synchronised_layer_is_a_plain_one() -> None:
    layer, plain = bnext.convert_sync(bnext.BatchNorm1d(4)), bnext.BatchNorm1d(4)
    assert "synchronised" in repr(layer)
    x = torch.randn(6, 4)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_var, plain.running_var)
