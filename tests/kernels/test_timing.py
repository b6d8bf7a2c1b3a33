"""Timing: quantiles against NumPy's, what runs how often, the order of what is queued on CUDA, and the ceilings."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from var_kernels import timing
from var_kernels.timing import Ceilings, Quantiles, ceilings, time_cuda

FIELDS = {"median": 0.5, "p10": 0.1, "p90": 0.9, "p99": 0.99}


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11, 100, 101])
def test_quantiles_are_numpys(count):
    seconds = torch.rand(count, dtype=torch.float64).tolist()
    found = Quantiles.of(seconds)
    for field, q in FIELDS.items():
        assert getattr(found, field) == pytest.approx(np.quantile(seconds, q), rel=1e-12)
    assert (found.minimum, found.count) == (min(seconds), count)


def test_quantiles_by_hand():
    found = Quantiles.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found.median, found.minimum, found.count) == (3.0, 1.0, 5)
    assert found.p10 == pytest.approx(1.4)  # position 0.4 between 1 and 2
    assert found.p90 == pytest.approx(4.6)
    assert found.p99 == pytest.approx(4.96)
    assert Quantiles.of([7.0]) == Quantiles(median=7.0, p10=7.0, p90=7.0, p99=7.0, minimum=7.0, count=1)


def test_no_times_have_no_quantiles():
    with pytest.raises(ValueError, match="seconds: got none, expected at least one"):
        Quantiles.of([])


def test_on_a_cpu_every_set_runs_once_per_repeat():
    ran = []
    found = time_cuda([lambda: ran.append(0), lambda: ran.append(1)], device="cpu", repeats=7, warmup=2)
    assert ran == [0, 1] * (1 + 2 + 7)
    assert found.count == 7
    assert 0 <= found.minimum <= found.p10 <= found.median <= found.p90 <= found.p99
    assert found.how == "host clock, sets of buffers: 2"


def test_on_a_cpu_a_time_is_the_mean_over_the_sets(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        def call():
            clock[0] += seconds

        return call

    found = time_cuda([takes(1.0), takes(3.0)], device="cpu", repeats=3, warmup=1, limit_seconds=100.0)
    assert (found.median, found.minimum, found.count) == (2.0, 2.0, 3)


def test_slow_calls_repeat_less_often_but_at_least_five_times(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += 0.1

    assert time_cuda(call, device="cpu", repeats=100, warmup=1, limit_seconds=2.05).count == 20
    assert time_cuda(call, device="cpu", repeats=100, warmup=1, limit_seconds=0.01).count == 5
    assert time_cuda(call, device="cpu", repeats=3, warmup=1, limit_seconds=0.01).count == 3


@pytest.mark.parametrize(("fn", "options"), [([], {}), (print, {"repeats": 0}), (print, {"warmup": 0})])
def test_a_wrong_request_is_told_what_would_be_right(fn, options):
    with pytest.raises(ValueError, match="expected at least one call, one repeat and one warm-up"):
        time_cuda(fn, device="cpu", **options)


@pytest.fixture
def queued(monkeypatch):
    """A stand-in for torch.cuda that keeps what is queued, so that the order can be tested without a GPU."""
    log: list[str] = []

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            assert log[-1] == "synchronize", "read before the device has finished"
            return 8.0

    class Graph:
        def replay(self):
            log.append("replay")

    class Buffer:
        def sum(self):
            log.append("flush")

    @contextmanager
    def entered(*_, **__):
        yield

    @contextmanager
    def capture(graph, stream, capture_error_mode):
        log.append("capture")
        yield
        log.append("captured")

    outside = Stream()
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": entered,
        "device": entered,
        "current_stream": lambda: outside,
        "set_stream": lambda stream: log.append("stream restored"),
        "synchronize": lambda: log.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "_flush_buffer", Buffer)
    monkeypatch.setattr(timing, "WARMUP_SECONDS", 0.0)
    return log


def test_on_cuda_a_replay_lies_between_its_events_after_a_flush(queued):
    found = time_cuda([lambda: queued.append("a"), lambda: queued.append("b")], device="cuda", repeats=2, warmup=1)
    assert queued == [
        *["wait", "a", "b", "wait", "capture", "a", "b", "captured"],
        *["flush", "replay", "synchronize"] * 2,
        *["flush", "event", "replay", "event"] * 2,
        "synchronize",
    ]
    assert found.median == pytest.approx(8e-3 / 2)  # events count milliseconds, and two sets shared them
    assert found.how == "CUDA graph, sets of buffers: 2, L2 flushed"


def test_on_cuda_graph_and_flush_can_be_left_out(queued):
    found = time_cuda(lambda: queued.append("a"), device="cuda", repeats=1, warmup=1, graph=False, flush=False)
    assert queued == ["a", "synchronize"] * 2 + ["event", "a", "event", "synchronize"]
    assert found.how == "launched one by one, sets of buffers: 1, L2 as left"


def test_on_cuda_a_call_that_cannot_be_captured_is_launched_and_says_why(queued, monkeypatch):
    @contextmanager
    def capture(*_, **__):
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error

    monkeypatch.setattr(torch.cuda, "graph", capture)
    calls = []

    def call():
        calls.append(0)
        if len(calls) == 2:  # the first is the warm-up
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    found = time_cuda(call, device="cuda", repeats=1, warmup=1)
    assert "stream restored" in queued
    assert found.how.startswith(
        "launched one by one, not capturable: operation not permitted when stream is capturing, sets"
    )


def test_ceilings_of_a_cpu_are_rates_of_this_machine():
    found = ceilings("cpu")
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e8 < found.flops_per_second["float32"] < 1e14
    assert found.flops_per_second["bfloat16"] > 0
    assert found.flops_per_second["float8_e4m3fn"] is None
    assert "512³" in found.how


def test_the_floor_is_the_larger_of_both_times():
    found = Ceilings(bytes_per_second=100.0, flops_per_second={"float16": 10.0, "float8_e4m3fn": None}, how="")
    assert found.floor_seconds(200, 0, torch.bfloat16) == 2.0
    assert found.floor_seconds(200, 10, torch.float16) == 2.0
    assert found.floor_seconds(200, 30, torch.float16) == 3.0
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"no rate of {timing.type_name(dtype)} products, measured: \["):
            found.floor_seconds(200, 30, dtype)


@pytest.mark.gpu
def test_a_gpu_replays_a_graph_and_reaches_a_plausible_rate():
    x = torch.randn(1 << 26, device="cuda")
    found = time_cuda(lambda: x.add_(1.0), repeats=20)
    assert found.how == "CUDA graph, sets of buffers: 1, L2 flushed"
    assert 1e10 < 2 * 4 * x.numel() / found.median < 1e14


@pytest.mark.gpu
def test_on_a_gpu_the_flush_keeps_a_small_input_out_of_the_cache():
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    x = torch.randn(cache // 8, device="cuda")  # half of the cache
    cold, warm = (time_cuda(lambda: x.sum(), repeats=200, flush=flush).median for flush in (True, False))
    assert warm < cold


@pytest.mark.gpu
def test_a_gpu_goes_on_after_a_capture_that_failed():
    """In a process of its own: PyTorch leaves the capture of random numbers on."""
    program = (
        "import torch; from var_kernels.timing import time_cuda\n"
        "x = torch.ones(8, device='cuda')\n"
        "found = time_cuda(lambda: x.sum().item(), repeats=3)\n"
        "assert 'not capturable' in found.how, found.how\n"
        "assert torch.cuda.current_stream() == torch.cuda.default_stream()\n"
        "assert 'CUDA graph' in time_cuda(lambda: x.add_(1), repeats=3).how\n"
    )
    kernels = Path(timing.__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=kernels)


@pytest.mark.gpu
def test_ceilings_of_a_gpu():
    found = ceilings("cuda")
    assert found.flops_per_second["bfloat16"] > found.flops_per_second["float32"] > 1e11
    assert (found.flops_per_second["float8_e4m3fn"] is not None) == (torch.cuda.get_device_capability() >= (8, 9))
    assert found.bytes_per_second > 1e10
