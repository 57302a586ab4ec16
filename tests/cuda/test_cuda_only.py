"""What only a GPU can show: graphs, streams, devices, the allocator, launches, huge tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from assertions import assert_same
from cases import Case
from conftest import cuda_missing
from layers import make_layer
from torch import Tensor, nn

import bnext

needs_gpu = pytest.mark.skipif(cuda_missing() is not None, reason=str(cuda_missing()))

# One that fits on chip, and one that takes two passes also on an H100 (64 MiB in 16 channels, and
# 30 MiB of shared memory in all).
SMALL, LARGE = Case((64, 13, 7, 7)), Case((16, 16, 256, 256), "channels_last")
by_case = pytest.mark.parametrize("case", [SMALL, LARGE], ids=str)


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)


def prepared(case: Case, device: str = "cuda") -> tuple[nn.Module, Tensor, Tensor]:
    layer = make_layer(case, act=True, activation="relu", device=device)
    return layer, case.input(device).requires_grad_(), case.grad_output(device)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(case: Case) -> tuple[torch.cuda.CUDAGraph, nn.Module, Tensor, tuple[Tensor, ...]]:
    """A graph of a training step, after warming up on another stream as torch asks for."""
    layer, x, grad = prepared(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(layer, x, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer, x, grad)
    return graph, layer, x, results


@needs_gpu
@by_case
def test_graph_of_a_training_step_replays(case: Case) -> None:
    graph, layer, x, results = captured(case)
    twin, other, grad = prepared(case)
    step(twin, other, grad)  # the warm-up; the capture itself runs nothing
    for seed in (1, 2, 3):
        values = Case(case.shape, case.layout, seed=seed).input("cuda")
        for tensor in (x, other):
            with torch.no_grad():
                tensor.copy_(values)
        graph.replay()
        for have, want in zip(results, step(twin, other, grad), strict=True):
            assert_same(have, want)
        for name, buffer in twin.named_buffers():
            assert_same(layer.get_buffer(name), buffer, name)
    assert int(layer.num_batches_tracked) == 4


@needs_gpu
@by_case
def test_two_graphs_on_two_streams(case: Case) -> None:
    """They share no counters and no workspace."""
    graphs = [captured(case) for _ in range(2)]
    want = [r.clone() for r in step(*prepared(case))]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, *_) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, layer, _, results in graphs:
        assert int(layer.num_batches_tracked) == 51
        for have, expected in zip(results, want, strict=True):
            assert_same(have, expected)


@needs_gpu
@by_case
def test_no_call_waits_for_the_device(case: Case) -> None:
    layer, x, grad = prepared(case)
    step(layer, x, grad)  # the first call asks for the device's properties and allocates
    with no_synchronisation():
        step(layer, x, grad)
        layer.eval()
        step(layer, x, grad)


@needs_gpu
@by_case
def test_current_stream_is_honoured(case: Case) -> None:
    """The input is written late on a stream: a kernel on any other would read the old one."""
    layer, x, grad = prepared(case)
    want = step(layer, x, grad)
    twin, late, grad = prepared(case)
    with torch.no_grad():
        late.fill_(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            late.copy_(x)
        have = step(twin, late, grad)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(have, want, strict=True):
        assert_same(a, b)


@needs_gpu
@by_case
def test_tensors_of_another_device_than_the_current_one(case: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    have, want = step(*prepared(case, "cuda:1")), step(*prepared(case, "cuda:0"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(have, want, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu())


@needs_gpu
@by_case
def test_memory_comes_from_the_allocator_of_torch(case: Case) -> None:
    """What the device has free changes by what that allocator took, after the first call."""
    layer, x, grad = prepared(case)
    step(layer, x, grad)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    for _ in range(20):
        step(layer, x, grad)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() == free


def kernels(run) -> list[str]:
    """The kernels that `run` launches, after a call that is not watched."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [e.name for e in profile.events() if e.device_type == on_device]


@needs_gpu
@pytest.mark.parametrize(("case", "most"), [(SMALL, 1), (LARGE, 2)], ids=str)
def test_launches_per_call(case: Case, most: int) -> None:
    layer, x, grad = prepared(case)
    with torch.no_grad():
        forward = kernels(lambda: layer(x))
    y = layer(x)
    wanted = [x, *layer.parameters()]
    backward = kernels(lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True))
    for names in (forward, backward):
        assert 1 <= len(names) <= most, names
    with torch.no_grad():
        assert len(kernels(lambda: layer.eval()(x))) == 1


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(layout: str) -> None:
    """Half precision, 4.3 GB a tensor; the last channel and the last sample are looked at."""
    shape = (2**15 + 1, 64, 32, 32)
    free = torch.cuda.mem_get_info()[0]
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free GPU memory, has {free >> 30}")
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, device="cuda", dtype=torch.half, memory_format=format).normal_()
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    y = bnext.batch_norm(x, mean, var, training=True, momentum=1.0)
    for channel in (0, 63):
        values = x[:, channel].float()
        want_var, want_mean = torch.var_mean(values.double())
        torch.testing.assert_close(mean[channel].double(), want_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var[channel].double(), want_var, rtol=1e-5, atol=0)
        want = (values[-1] - mean[channel]) / (var[channel] + 1e-5).sqrt()
        torch.testing.assert_close(y[-1, channel].float(), want, rtol=2e-3, atol=2e-3)


# --- Without a GPU


def test_import_and_cpu_tensors_need_no_driver() -> None:
    """In a process that sees no GPU, whatever this machine has."""
    code = (
        "import torch, bnext; assert not torch.cuda.is_available(); "
        "x = torch.randn(8, 4); y = bnext.BatchNorm1d(4)(x); assert y.device == x.device; "
        "assert not torch.cuda.is_initialized(); bnext.show_config()"
    )
    script = f"import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''; {code}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"CUDA: {'yes' if bnext.config.build_info()['cuda'] else 'no'}" in result.stdout


def test_device_without_kernels_is_named() -> None:
    """As for a CUDA tensor in a build for the CPU: a backend of test tensors stands in for it."""
    x = torch.empty(4, 3, device="lazy") if _has_lazy() else None
    if x is None:
        pytest.skip("torch without the lazy backend has no third device to try")
    with pytest.raises(RuntimeError, match=r"input is on device lazy.*show_config"):
        torch.ops.bnext.batch_norm_reduce(x)


def _has_lazy() -> bool:
    try:
        import torch._lazy.ts_backend

        torch._lazy.ts_backend.init()
    except (ImportError, RuntimeError):
        return False
    return True
