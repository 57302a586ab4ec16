"""The benchmarks themselves, without a look at the clock."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import bnext.cli
from benchmarks import compare, grid, onednn, peers, report, results, suite, targets, worker
from benchmarks.grid import RUNS, Cell
from bnext.measure import timing
from bnext.measure.bench import PASSES, Inputs
from bnext.measure.timing import Clock, Loop, Rounds, Spread, interleave, ratio, spread

MACHINE = {"processor": "none", "isa": "none", "torch": "0", "date": "2026-11-24",
           "last_level_cache_bytes": 32 << 20}  # fmt: skip
needs_onednn = pytest.mark.skipif(onednn.missing() is not None, reason=str(onednn.missing()))


def test_a_machine_that_slows_down_does_not_change_a_ratio() -> None:
    slowness = [1.0, 5.0, 1.2, 9.0, 2.0]
    found = ratio([0.5 * s for s in slowness], slowness)
    assert found == Spread(0.5, 0.5, 0.5)


def test_spread_is_median_and_quartiles() -> None:
    assert spread([5, 1, 4, 2, 3]) == Spread(3, 2, 4)


class FakeClock(Clock):
    """Takes no time; a loop tells its seconds per call."""

    def __call__(self, loop: Loop, calls: int = 1) -> float:
        seconds = loop(calls)
        assert isinstance(seconds, float)
        return seconds


def test_every_round_runs_every_variant_once_in_changing_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "_waited", lambda: 0.0)
    log: list[tuple[str, int]] = []

    def variant(name: str, seconds: float) -> Callable[[int], float]:
        def loop(times: int) -> float:
            log.append((name, times))
            return seconds

        return loop

    loops = {"fast": variant("fast", 1e-5), "slow": variant("slow", 1e-2)}
    found = interleave(loops, 0.0, FakeClock(), min_rounds=20).seconds
    assert found == {"fast": [1e-5] * 20, "slow": [1e-2] * 20}
    measured = log[6:]  # after warming up and choosing the number of calls
    assert {name for name, times in measured if times == 20} == {"fast"}
    assert {name for name, times in measured if times == 1} == {"slow"}
    rounds = [tuple(name for name, _ in measured[i : i + 2]) for i in range(0, 40, 2)]
    assert set(rounds) == {("fast", "slow"), ("slow", "fast")}


@pytest.mark.parametrize("seconds, attempts", [(1e-4, 4), (1e-1, 1)], ids=["short", "long"])
def test_a_short_sample_that_is_disturbed_is_taken_again(
    monkeypatch: pytest.MonkeyPatch, seconds: float, attempts: int
) -> None:
    waited = iter(range(100))  # a second more at each look
    monkeypatch.setattr(timing, "_waited", lambda: float(next(waited)))
    calls = []

    def loop(times: int) -> float:
        calls.append(times)
        return seconds

    found = interleave({"only": loop}, 0.0, FakeClock(), min_rounds=2)
    assert found == Rounds({"only": [seconds] * 2}, disturbed=1.0)
    assert len(calls) - 3 == 2 * attempts  # three to warm up


def made_up(
    ours: float = 1.0, machine: float = 1.0, noise: float = 0.0, seed: int = 0
) -> results.Results:
    """The whole grid with every variant, bnext taking ``ours`` times an eager step."""
    draw = random.Random(seed)

    def times(factor: float) -> list[float]:
        return [1e-4 * factor * machine * draw.lognormvariate(0, noise) for _ in range(30)]

    found = []
    for cell in grid.cells():
        for run, modes in RUNS.items():
            for mode in modes:
                samples = {name: times(ours if name in peers.OURS else 1.0)
                           for name in peers.PEERS[run]}  # fmt: skip
                extra = {"kept_bytes": {"bnext": 20 * cell.shape[1]}} if "back" in mode else {}
                rounds = Rounds(samples, disturbed=0.0)
                found.append(results.summarize(cell, run, mode, rounds, **extra))
    return results.Results(dict(MACHINE), found)


def test_compare_finds_a_planted_slowdown_and_only_it() -> None:
    old, new = made_up(noise=0.05), made_up(noise=0.05, seed=1)
    slow = made_up(ours=1.25, noise=0.05, seed=2).measurements[7]
    new.measurements[7] = slow
    found = [c for c in compare.changes(old, new) if c.slower]
    assert {c.measurement.key for c in found} == {slow.key}
    assert all(c.growth == pytest.approx(1.25, abs=0.1) for c in found)
    assert any("slower" in line and str(slow.cell) in line for line in compare.report(old, new))


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_compare_is_silent_on_noise_and_on_a_slower_machine(noise: float) -> None:
    old, new = made_up(noise=noise), made_up(machine=3.0, noise=noise, seed=1)
    found = list(compare.changes(old, new))
    assert len(found) > len(old.measurements)  # bnext and its ghosts
    assert sum(c.slower for c in found) <= 0.02 * len(found)


def test_results_survive_json(tmp_path: Path) -> None:
    old = made_up(noise=0.1)
    results.save(old, tmp_path / "a.json")
    once = results.load(tmp_path / "a.json")
    assert [m.key for m in once.measurements] == [m.key for m in old.measurements]
    first = once.measurements[0]
    assert first.us["eager"].median == pytest.approx(old.measurements[0].us["eager"].median, 1e-3)
    results.save(once, tmp_path / "b.json")
    assert results.load(tmp_path / "b.json") == once
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ValueError, match=r"c\.json is not a result"):
        results.load(tmp_path / "c.json")


def test_the_targets_cover_the_grid() -> None:
    grid_results = made_up()
    found = targets.verdicts(grid_results)
    assert all(found.values())
    covered = {v.measurement.key for values in found.values() for v in values}
    two_threads = [m for m in grid_results.measurements if m.cell.threads == targets.THREADS]
    assert covered == {m.key for m in two_threads}
    for target, values in found.items():
        assert all(v.met == (target.limit >= 1) for v in values)
    above = {v.measurement.cell.shape for v in found[targets.TARGETS[7]]}
    assert (32768, 256) in above and (4096, 256) not in above


def test_a_target_is_judged_against_the_fastest_peer() -> None:
    cell = Cell((128, 256), "rows", "float32", 2)
    samples = {"copy": [1.0, 1.0], "bnext": [2.0, 2.0], "eager": [8.0, 8.0], "compiled": [4.0, 4.0]}
    measured = results.summarize(cell, "whole", "eval", Rounds(samples, disturbed=0.0))
    target = next(t for t in targets.TARGETS if t.others == peers.TORCH)
    found = targets.verdict(target, measured, 1 << 20)
    assert found is not None and found.other == "compiled" and found.value.median == 0.5


def test_report(tmp_path: Path) -> None:
    found = made_up(noise=0.1)
    text = report.markdown(found)
    assert text.count("\n| (32, 50) | rows | float32 | 2 |") == sum(map(len, RUNS.values()))
    for target in targets.TARGETS:
        assert f"| {target.name} | {target.limit:.2f} |" in text
    results.save(found, tmp_path / "results.json")
    arguments = ["--only", str(tmp_path / "results.json"), "--output", str(tmp_path)]
    app = suite.typer.Typer()
    app.command()(suite.main)
    same = CliRunner().invoke(app, [*arguments, "--compare", str(tmp_path / "results.json")])
    assert same.exit_code == 0 and "0 slower" in same.output, same.output
    assert (tmp_path / "results.png").stat().st_size > 10_000
    results.save(made_up(ours=0.5), tmp_path / "faster.json")
    slower = CliRunner().invoke(app, [*arguments, "--compare", str(tmp_path / "faster.json")])
    assert slower.exit_code == 1 and "slower: bnext" in slower.output


SMALL = [
    Cell((70, 24), "rows", "float32", 1),
    Cell((33, 32, 3, 5), "planes", "bfloat16", 1),
    Cell((33, 32, 3, 5), "channels_last", "float32", 1),
    Cell((2, 16, 3, 4, 5), "channels_last", "bfloat16", 1),
]


@pytest.mark.parametrize("cell", SMALL, ids=str)
def test_every_peer_takes_every_mode(cell: Cell) -> None:
    for run, modes in RUNS.items():
        for mode in modes:
            with torch.set_grad_enabled(run == "whole"):
                loops = peers.loops(cell, run, mode)
                for loop in loops.values():
                    loop(2)
            expected = set(peers.PEERS[run]) - {"compiled"}
            if cell.shape[0] <= 32 or mode == "eval":
                expected.discard("bnext ghosts")
            if cell.shape[0] <= 32 or mode != "forward_backward":
                expected.discard("ghost loop")
            if onednn.missing(getattr(torch, cell.dtype)):
                expected -= {"onednn"}
            assert set(loops) == expected
            assert mode in PASSES


def test_the_loops_of_kernels_call_the_ops_as_often_as_asked() -> None:
    """A compiler that merged the equal calls would make bnext look fast."""
    x, grad = torch.randn(2, 64, 8).unbind()
    ones, zeros = torch.ones(8), torch.zeros(8)
    invstd = (x.var(0, unbiased=False) + 1e-5).rsqrt()
    loops = peers.kernels()
    for times in (1, 7):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            mean = loops.forward(x, ones, zeros, None, 1e-5, times)
            loops.backward(grad, x, ones, zeros, mean, zeros[None], invstd[None], times)
        torch.testing.assert_close(mean[0], x.mean(0))
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["bnext::batch_norm"] == counts["bnext::batch_norm_backward"] == times
    loops.copy(x, grad, 1)
    assert torch.equal(x, grad)


def test_kept_for_backward_is_c_sized(monkeypatch: pytest.MonkeyPatch) -> None:
    for cell in SMALL:
        kept = peers.kept_bytes(cell)
        # weight and bias, which live anyway, the mean in two parts and invstd.
        assert kept == 5 * 4 * cell.shape[1]

    def greedy(inputs: Inputs) -> torch.nn.Module:  # silu keeps its input, which is neither
        return torch.nn.Sequential(inputs.layer(torch.nn), torch.nn.SiLU())

    monkeypatch.setitem(peers.bench.LAYERS, "greedy", greedy)
    assert (peers.kept_bytes(SMALL[0], "greedy") or 0) > SMALL[0].nbytes


def test_outputs_of_kernels_are_reused() -> None:
    cell = Cell((2048, 256), "rows", "float32", 1)
    found = list(worker.spawn("kernel", [cell], 0.2, "none"))
    assert [m.mode for m in found] == list(RUNS["kernel"])
    pages = cell.nbytes / 4096
    assert all(m.faults < 0.1 * pages for m in found), [m.faults for m in found]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("cell", SMALL, ids=str)
def test_onednn_is_right(cell: Cell, training: bool) -> None:
    if reason := onednn.missing(getattr(torch, cell.dtype)):
        pytest.skip(reason)
    inputs = peers.inputs_for(cell, "forward")
    x, grad = inputs.x, inputs.grad
    norm = onednn.BatchNormRelu(x, training, peers.EPS)
    assert len(norm.implementations) == (2 if training else 1)
    generator = torch.Generator().manual_seed(1)
    for tensor in (norm.scale, norm.shift, norm.mean, norm.variance):
        tensor.uniform_(0.5, 1.5, generator=generator)
    exact = x.double().requires_grad_()
    scale, shift = (t.double().requires_grad_() for t in (norm.scale, norm.shift))
    mean, variance = norm.mean.double(), norm.variance.double()
    expected = F.relu(F.batch_norm(exact, mean, variance, scale, shift, training, 0.0, peers.EPS))
    output, workspace = norm.outputs(x)
    norm.forward(x, output, workspace)(2)
    close = torch.testing.assert_close
    # bfloat16 keeps 8 bits: half a unit of the last place is 2^-9 of the value.
    tolerance = {"rtol": 2**-8, "atol": 2**-8} if x.dtype == torch.bfloat16 else {
        "rtol": 1e-5, "atol": 1e-5}  # fmt: skip
    close(output.double(), expected.detach(), **tolerance)
    if not training:
        return
    grad_input = torch.empty_like(x)
    norm.backward(grad, x, workspace, grad_input)(2)
    truth = torch.autograd.grad(expected, (exact, scale, shift), grad.double())
    close(grad_input.double(), truth[0], **tolerance)
    close(norm.diff_scale.double(), truth[1], rtol=1e-3, atol=1e-3)
    close(norm.diff_shift.double(), truth[2], rtol=1e-3, atol=1e-3)


@needs_onednn
def test_onednn_takes_torchs_number_of_threads(set_threads: Callable[[int], None]) -> None:
    for threads in (2, 1):
        set_threads(threads)
        assert onednn.load().threads() == threads


def test_a_missing_onednn_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onednn.native, "PREFIX", tmp_path)
    assert "onednn-devel-cpu-gomp" in str(onednn.missing())
    assert "onednn" not in peers.loops(SMALL[0], "kernel", "forward")


def test_bnext_bench() -> None:
    arguments = ["bench", "--shape", "40,6", "--seconds", "0", "--no-compiled", "--threads", "1"]
    found = CliRunner().invoke(bnext.cli.app, arguments)
    assert found.exit_code == 0, found.output
    for word in ("forward_backward", "eval", "copy", "bnext ghosts", "eager in-place", "GB/s"):
        assert word in found.output
    bad = CliRunner().invoke(bnext.cli.app, [*arguments, "--layout", "channels_last"])
    assert bad.exit_code == 2 and "does not exist" in bad.output


def test_the_grid_has_the_cells_that_were_asked_for() -> None:
    found = grid.cells()
    assert len(found) == len(set(found)) == 17 * 2 * 2
    assert {c.dtype for c in found} == {"float32", "bfloat16"}
    assert [c.nbytes for c in found] == sorted(c.nbytes for c in found)
    assert all(c in found for c in grid.cells(quick=True))
    assert dataclasses.is_dataclass(Cell) and grid.last_level_cache_bytes() > 0
