"""The run of minutes on a GPU (tools/gpu_run), as far as it shows without one: nothing is lost when
a stage fails, hangs or is killed, or the whole run is; and a rehearsal in small."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import executor
import pytest
import simt_build
import torch

from tools.gpu_run import build, counters, pytest_plugin, records, summary
from tools.gpu_run.__main__ import chosen
from tools.gpu_run.runner import LOG, REPORT, SUMMARY, Run
from tools.gpu_run.stages import ROOT, Options, Stage, stages


def stage(name: str, code: str, limit: float = 20, **options: Any) -> Stage:
    return Stage(name, "", [sys.executable, "-c", code], limit, 1, **options)


def run(tmp_path: Path, *found: Stage, budget: float = 100) -> dict[str, records.Record]:
    """The last word on every stage."""
    Run(tmp_path, budget).run(found)
    return {r["stage"]: r for r in summary.stages(list(records.read(tmp_path / REPORT)))}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


RECORDING = "from tools.gpu_run.records import record; record('fact', name='x', value=1)"


def test_every_stage_runs_whatever_became_of_the_others(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        stage("fails", "print('before'); raise SystemExit(3)"),
        stage("dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        Stage("missing", "", ["no-such-program"], 20, 1),
        stage("records", RECORDING),
    )
    assert {name: r["outcome"] for name, r in found.items()} == {
        "fails": "failed", "dies": "killed", "missing": "failed", "records": "passed",
    }  # fmt: skip
    assert found["fails"]["message"] == "exit status 3"
    assert found["dies"]["message"] == "SIGSEGV"
    assert "no-such-program" in found["missing"]["message"]
    facts = summary.facts(list(records.read(tmp_path / REPORT)))
    assert facts == {"x": 1}
    assert "before" in (tmp_path / LOG).read_text()
    text = (tmp_path / SUMMARY).read_text()
    assert "| fails | failed exit status 3 |" in text and "| records | passed |" in text


def test_a_stage_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    """Also where it does not listen to SIGTERM, and its child holds the pipe of its output."""
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); "
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); "
        f"{RECORDING}; time.sleep(1000)"
    )
    start = time.monotonic()
    found = run(tmp_path / "out", stage("hangs", code, limit=4), stage("next", "pass"))
    assert time.monotonic() - start < 40
    assert found["hangs"]["outcome"] == "timed out"
    assert found["next"]["outcome"] == "passed"
    # What it had recorded is there.
    assert summary.facts(list(records.read(tmp_path / "out" / REPORT))) == {"x": 1}
    own, child = map(int, pids.read_text().split())
    assert not alive(own) and not alive(child)


def test_a_stage_leaves_nothing_running(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(1000)'], stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL).pid, file=open({!r}, 'w'))"
    )
    pid = tmp_path / "pid"
    assert run(tmp_path / "out", stage("a", code.format(str(pid))))["a"]["outcome"] == "passed"
    time.sleep(0.5)
    assert not alive(int(pid.read_text()))


def test_the_budget_ends_what_is_left(tmp_path: Path) -> None:
    begun = stage("begun", "import time; print('{seconds}'); time.sleep(1000)", limit=1000)
    late = stage("late", "pass", limit=100)
    found = run(tmp_path, begun, late, budget=7)
    assert found["begun"]["outcome"] == "timed out" and found["begun"]["limit"] <= 7
    assert found["late"]["outcome"] == "left out" and "0 s left" in found["late"]["message"]
    planned = (tmp_path / LOG).read_text()
    assert "print('1')" in planned  # of 7 seconds, less a margin


def test_without_a_build_what_needs_it_is_left_out(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        stage("build", "raise SystemExit('no compiler')", needs_build=False),
        stage("kernels", "pass"),
        stage("facts", "pass", needs_build=False),
    )
    outcomes = [r["outcome"] for r in found.values()]
    assert outcomes == ["failed", "left out", "passed"]


def test_a_flood_of_output_is_cut_in_the_middle(tmp_path: Path) -> None:
    code = "print('first'); [print('x' * 1000) for _ in range(5000)]; print('last')"
    run(tmp_path, stage("flood", code))
    log = (tmp_path / LOG).read_text()
    assert len(log) < 1_100_000
    assert "first" in log and "[...]" in log and log.rstrip().endswith("last")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_has_lost_nothing(tmp_path: Path, number: int) -> None:
    """Asked to end, it ends its stage, too, and says so in the summary."""
    code = (
        "import sys; from pathlib import Path; from tools.gpu_run.runner import Run; "
        "from tools.gpu_run.stages import Stage; "
        f"body = {RECORDING + '; import time; time.sleep(20)'!r}; "
        "Run(Path(sys.argv[1]), 100).run("
        "[Stage('first', '', [sys.executable, '-c', body], 50, 1)])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    end = time.monotonic() + 30
    report = tmp_path / REPORT
    while time.monotonic() < end and not summary.facts(list(records.read(report))):
        time.sleep(0.1)
    process.send_signal(number)
    process.wait(20)
    found = list(records.read(report))
    assert summary.facts(found) == {"x": 1}
    assert [r["outcome"] for r in summary.stages(found)] == ["cut off"]
    if number == signal.SIGTERM:
        assert "The run was interrupted." in (tmp_path / SUMMARY).read_text()


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / REPORT
    path.write_text('{"kind": "fact", "name": "a", "value": 1}\n{"kind": "fa')
    assert [r["name"] for r in records.read(path)] == ["a"]
    assert list(records.read(tmp_path / "none")) == []


def test_the_summary_shows_measured_beside_predicted() -> None:
    common = {"kind": "kernel", "stage": "kernels", "shape": [32, 50], "layout": "rows",
              "dtype": "float32", "op": "forward", "gb_per_s": 10.0, "floor_us": 1.0,
              "predicted_us": 5.0}  # fmt: skip
    found = [
        {**common, "variant": "bnext", "us": 4.0},
        {**common, "variant": "eager", "us": 10.0},
        {"kind": "check", "stage": "kernels", "name": "c", "outcome": "failed", "message": "off"},
        {"kind": "stage", "stage": "kernels", "outcome": "passed", "message": "", "seconds": 3},
    ]
    text = summary.text(found)
    assert "| 32x50 | rows | float32 | forward | 4.0 | 5 | 1 | 10 | eager 2.50 |" in text
    assert "- kernels: c: off" in text
    assert "| kernels | passed | 3 |  | 1 failed, 2 measured |" in text


def test_stages_are_chosen_by_name() -> None:
    found = stages(Options())
    assert [s.name for s in chosen(found, "kernels,facts")] == ["facts", "kernels"]
    with pytest.raises(SystemExit, match="--stages: no nonsense; there are facts, build"):
        chosen(found, "facts,nonsense")


def test_the_whole_run_fits_into_eight_minutes() -> None:
    found = stages(Options())
    assert sum(s.expected for s in found) <= 480
    assert sum(s.expected for s in stages(Options(prebuilt=Path("x")))) <= 430
    assert all(s.expected < s.limit for s in found)
    assert {s.name for s in found} < {s.name for s in stages(Options(rehearse=True))}


# --- The plug-in of pytest

TESTS = """
import time, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no reason")
@pytest.mark.parametrize("i", range(20))
def test_slow(i): time.sleep(0.2)
"""


@pytest.mark.parametrize(("workers", "seconds"), [(0, 2), (2, 600)])
def test_results_of_tests(tmp_path: Path, workers: int, seconds: int) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    report = tmp_path / REPORT
    command = [sys.executable, "-m", "pytest", "-q", "-p", pytest_plugin.__name__,
               "--seconds", str(seconds), "-n", str(workers), "--rootdir", str(tmp_path),
               "-c", os.devnull, str(tmp_path)]  # fmt: skip
    settings = {records.REPORT: str(report), records.STAGE: "plans", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stdout
    found = {r["id"].split("::")[1]: r for r in summary.of_kind(list(records.read(report)), "test")}
    assert found["test_passes"]["outcome"] == "passed"
    assert "assert 1 == 2" in found["test_fails"]["message"]
    assert found["test_skips"]["outcome"] == "skipped"
    slow = [r["outcome"] for name, r in found.items() if name.startswith("test_slow")]
    assert set(slow) <= {"passed"}
    left_out = [r["what"] for r in summary.of_kind(list(records.read(report)), "left out")]
    if seconds == 2:  # of the four that they take
        assert len(slow) < 18 and left_out == [[f"{20 - len(slow)} tests"]]
    else:
        assert len(slow) == 20 and not left_out


# --- Stages

NCU = """==PROF== Connected to process 77
==PROF== Profiling "reduce_kernel" - 0: 0%....50%....100% - 9 passes
"ID","Process ID","Kernel Name","dram__bytes_read.sum","gpu__time_duration.sum","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","other"
"","","","Mbyte","us","inst","inst","%"
"0","77","void reduce_kernel<float, 1, 4>","102.7","70.5","1.5","1,020.25","3"
"""  # noqa: E501


def test_ncu_is_read() -> None:
    (row,) = counters.parse(NCU)
    assert row["Kernel Name"] == "void reduce_kernel<float, 1, 4>"
    kept = counters.kept(row)
    assert kept["dram__bytes_read.sum"] == "102.7 Mbyte"
    assert kept["gpu__time_duration.sum"] == "70.5 us" and "other" not in kept
    assert list(counters.parse("==PROF== nothing was profiled")) == []
    many = {f"smsp__average_warps_issue_stalled_{i}.ratio": f"{i} inst" for i in range(9)}
    assert sorted(v.split()[0] for v in counters.kept(many).values()) == ["5", "6", "7", "8"]


def archive(path: Path, **files: str) -> Path:
    with tarfile.open(path, "w:gz") as target:
        for name, text in files.items():
            source = path.parent / "part"
            source.write_text(text)
            target.add(source, name)
    return path


def test_a_build_of_another_torch_or_python_is_refused(tmp_path: Path) -> None:
    extension = str(build.EXTENSION.relative_to(ROOT))
    info = "bnext/_build_info.py"
    other = archive(tmp_path / "a", **{"bnext/_C.cpython-39-x.so": "", info: "torch = ''"})
    with pytest.raises(SystemExit, match=r"there is no bnext/_C.*cpython-39"):
        build.unpack(other)
    other = archive(tmp_path / "b", **{extension: "", info: "torch = '1.0'"})
    with pytest.raises(SystemExit, match="was built for torch 1.0, here is "):
        build.unpack(other)
    assert build.EXTENSION.stat().st_size > 0


def test_seconds_of_a_build(tmp_path: Path) -> None:
    log = tmp_path / ".ninja_log"
    log.write_text("# ninja log v5\n100\t2600\t1\tbuild/a.o\tabc\n0\t50\t1\tbuild/b.o\tdef\n")
    assert build.seconds_per_file(log) == {"a.o": 2.5, "b.o": 0.05}
    assert build.seconds_per_file(tmp_path / "none") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["tools.gpu_run --output unused", "tools.gpu_run.facts"])
def test_without_a_gpu_it_says_so_at_once(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1 and "no CUDA device here" in result.stderr


@pytest.mark.skipif(simt_build.cuda_include() is None, reason="no executor without CUDA's headers")
def test_rehearsal_in_small(tmp_path: Path) -> None:
    """The whole of it is `make gpu-rehearsal`."""
    executor.build()  # of the stage "build"; here before the clock starts
    names = ["facts", "plans", "kernels", "counters", "hangs", "killed"]
    command = ["-m", "tools.gpu_run", "--rehearse", "--quick", "--output", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, *command, "--stages", ",".join(names)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + (tmp_path / LOG).read_text()[-3000:]
    found = list(records.read(tmp_path / REPORT))
    outcomes = {r["stage"]: r["outcome"] for r in summary.stages(found)}
    assert outcomes == {**dict.fromkeys(names, "passed"), "hangs": "timed out", "killed": "killed"}
    assert len(summary.of_kind(found, "counter")) == len(counters.TARGETS)
    assert all(r["metrics"]["bytes_loaded"] > 0 for r in summary.of_kind(found, "counter"))
    tests = summary.of_kind(found, "test")
    assert len(tests) > 5 and {r["outcome"] for r in tests} == {"passed"}
    assert {p.name for p in tmp_path.iterdir()} == {LOG, REPORT, SUMMARY}
    assert result.stdout.rstrip().splitlines()[-1].startswith("| killed | killed SIGKILL |")
