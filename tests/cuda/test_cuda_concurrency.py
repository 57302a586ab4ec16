"""Many calls at once, in a row and in graphs: streams, host threads, a busy GPU, torch.compile's
graphs, thousands of repetitions. What needs no GPU runs on all devices."""

from __future__ import annotations

import threading
from collections.abc import Callable

import executor
import pytest
import torch
from assertions import assert_same
from cases import Case
from conftest import cuda_missing
from executor import GPUS
from layers import make_layer
from op_samples import ops
from torch import Tensor, nn

from bnext import BatchNormAct2d
from tools.gpu_run.records import record

needs_gpu = pytest.mark.skipif(cuda_missing() is not None, reason=str(cuda_missing()))

# Lone blocks, a team, two passes; rows and planes (executor.GPUS).
PLANS = [
    ("h100", Case((64, 13, 7, 7))),
    ("two_sms", Case((700, 64))),
    ("two_sms", Case((6, 5, 24, 24))),
    ("no_cache", Case((9, 16, 24, 24), "channels_last")),
]
by_plan = pytest.mark.parametrize(("gpu", "case"), PLANS, ids=str)


def prepared(case: Case, device: str) -> Callable[[], list[Tensor]]:
    """A training step by the raw ops, on inputs made once."""
    x, grad = case.input(device), case.grad_output(device)
    values = case.parameters(device)
    weight, bias = values["weight"], values["bias"]

    def once() -> list[Tensor]:
        running = values["running_mean"].clone(), values["running_var"].clone()
        output, *saved = ops.batch_norm(
            x, weight, bias, *running, None, None, True, 0.1, 1e-5, "relu", None
        )
        grads = ops.batch_norm_backward(
            grad, x, weight, bias, None, None, *saved, True, "relu", [True, False]
        )
        return [output, *saved, *running, *grads[:3]]

    return once


def assert_all_same(have: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(have, want, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("case", [case for _, case in PLANS], ids=str)
def test_repetitions_are_the_same_bit_for_bit(case: Case, device: str) -> None:
    """A result that moves is a race."""
    step = prepared(case, device)
    want = step()
    for _ in range(3):
        assert_all_same(step(), want)


@needs_gpu
@by_plan
def test_ten_thousand_repetitions(gpu: str, case: Case) -> None:
    """Of all plans together, compared on the GPU."""
    step = prepared(case, "cuda")
    with executor.limited_to(GPUS[gpu]):
        want = step()
        differing = torch.zeros((), dtype=torch.long, device="cuda")
        for _ in range(10_000 // len(PLANS)):
            for have, expected in zip(step(), want, strict=True):
                differing += (have != expected).any()
    assert int(differing) == 0


@needs_gpu
@by_plan
def test_two_streams_at_once(gpu: str, case: Case) -> None:
    """Launches of two streams overlap: they share no counters and no workspace."""
    step = prepared(case, "cuda")
    with executor.limited_to(GPUS[gpu]):
        want = step()
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        have: list[list[Tensor]] = []
        for _ in range(100):
            for stream in streams:
                with torch.cuda.stream(stream):
                    have.append(step())
        torch.cuda.synchronize()
    for found in have:
        assert_all_same(found, want)


def in_threads(body: Callable[[int], None], n: int) -> None:
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            body(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_host_threads_with_different_shapes(where: str) -> None:
    """One kernel, two amounts of shared memory: neither thread lowers the other's limit."""
    cases = [Case((256 // n, 8, 12 * n, 12)) for n in (1, 2, 3, 4)]
    steps = [prepared(case, where) for case in cases]
    want = [step() for step in steps]
    if where == "cuda":
        torch.cuda.synchronize()

    def body(i: int) -> None:
        stream = torch.cuda.Stream() if where == "cuda" else None
        with torch.cuda.stream(stream):
            for _ in range(100 if where == "cuda" else 3):
                have = steps[i]()
            if stream is not None:
                stream.synchronize()
        assert_all_same(have, want[i])

    in_threads(body, len(cases))


@needs_gpu
@by_plan
def test_beside_a_kernel_that_spins(gpu: str, case: Case) -> None:
    """A kernel of another stream holds a multiprocessor for long. The call ends, with the right
    result; how long it waited is put into the report."""
    step = prepared(case, "cuda")
    with executor.limited_to(GPUS[gpu]):
        want = step()
        torch.cuda.synchronize()
        other, this = torch.cuda.Stream(), torch.cuda.Stream()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        with torch.cuda.stream(other):
            events[0].record()
            torch.cuda._sleep(100_000_000)  # cycles: about 60 ms
            events[1].record()
        with torch.cuda.stream(this):
            have = step()
            events[2].record()
        torch.cuda.synchronize()
    assert_all_same(have, want)
    record("fact", name=f"ms beside a kernel that spins, {gpu} {case}",
           value=round(events[0].elapsed_time(events[2]), 3),
           spinning_ms=round(events[0].elapsed_time(events[1]), 3))  # fmt: skip


@needs_gpu
def test_a_large_launch_beside_a_kernel_that_spins() -> None:
    """A team of blocks on all multiprocessors, one of which is taken."""
    case = Case((32, 64, 56, 56))
    step = prepared(case, "cuda")
    want = step()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
    assert_all_same(step(), want)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), BatchNormAct2d(16), nn.Conv2d(16, 24, 3), BatchNormAct2d(24)
    ).cuda()


@needs_gpu
def test_reduce_overhead() -> None:
    """torch.compile with CUDA graphs warms up in a memory pool of its own, where nothing may be
    kept: counters that lay there would be handed out again, or counted as leaked."""
    plain, graphed = network(), network()
    compiled = torch.compile(graphed, mode="reduce-overhead")
    optimisers = [torch.optim.SGD(m.parameters(), 0.01) for m in (plain, graphed)]
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(8, 3, 20, 20, device="cuda")
        losses = []
        for model, optimiser in zip((plain, compiled), optimisers, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            optimiser.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        # Convolutions in TF32, in other orders: ten bits. Counters in foreign hands would make
        # other numbers altogether, or never return.
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    for (name, a), b in zip(plain.named_buffers(), graphed.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, msg=name)


@needs_gpu
def test_nothing_is_kept_in_a_memory_pool() -> None:
    """The first call on a stream, within a pool: what it leaves behind lies elsewhere."""
    case = Case((700, 64))
    pool = torch.cuda.MemPool()
    stream = torch.cuda.Stream()
    x, grad = case.input("cuda"), case.grad_output("cuda")
    layer = make_layer(case, act=True, activation="relu", device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):
        x.requires_grad_()
        torch.autograd.grad(layer(x), [x], grad)
    torch.cuda.synchronize()
    live = [
        block
        for segment in pool.snapshot()
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]
    assert live == []


@needs_gpu
def test_capture_while_another_thread_makes_its_first_call() -> None:
    """Its counters are allocated although a stream is being captured, which forbids cudaMalloc in
    all threads (CUDA's global mode)."""
    x = Case((700, 64)).input("cuda")
    want = torch.ops.bnext.batch_norm_reduce(x, None)
    torch.cuda.synchronize()
    ready, entered, done = (threading.Event() for _ in range(3))
    found: list[Tensor] = []

    def other() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                # torch has memory for this stream now, also once the capture has emptied its cache.
                kept = torch.empty(1000, device="cuda")
                ready.set()
                entered.wait(30)
                found.extend(torch.ops.bnext.batch_norm_reduce(x, None))
                del kept
        finally:
            ready.set()
            done.set()

    worker = threading.Thread(target=other)
    worker.start()
    ready.wait(30)
    graph, y = torch.cuda.CUDAGraph(), torch.zeros(32, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y.add_(1)
        entered.set()
        done.wait(30)
    worker.join()
    graph.replay()
    torch.cuda.synchronize()
    assert float(y[0]) == 1
    for have, expected in zip(found, want, strict=True):
        assert_same(have, expected)
