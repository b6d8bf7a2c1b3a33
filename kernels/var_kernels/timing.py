"""Honest times of device work, and the two ceilings to hold them against.

On CUDA a call is captured in a graph where it can be, so that gaps between launches do not count, and timed by events
around a replay. Inputs must not come out of the L2 cache just because the call ran a moment ago: before every replay a
buffer of several times its size is read (read, not written, so that no write-back falls into the timed region), and a
replay runs the call once on each of several sets of buffers, which also shares out the cost of starting a replay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

Call = Callable[[], Any]

FLUSH_FACTOR = 4  # times the L2 cache, read before every replay
MIN_REPEATS = 5  # whatever the time limit
WARMUP_SECONDS = 0.05  # at least, so that an idle GPU raises its clocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiles:
    """Seconds of one call over the repeats of a timing."""

    median: float
    p10: float
    p90: float
    p99: float
    minimum: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float], **more: Any) -> Self:
        """Quantile q of n sorted values lies at position q·(n − 1), linear between neighbours, as NumPy's default."""
        if not seconds:
            raise ValueError("seconds: got none, expected at least one")
        ordered = sorted(seconds)

        def quantile(q: float) -> float:
            position = q * (len(ordered) - 1)
            below = math.floor(position)
            above = min(below + 1, len(ordered) - 1)
            return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

        levels = {"median": 0.5, "p10": 0.1, "p90": 0.9, "p99": 0.99}
        found = {name: quantile(q) for name, q in levels.items()}
        return cls(**found, minimum=ordered[0], count=len(ordered), **more)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing(Quantiles):
    """Quantiles, and how they came about."""

    how: str


def time_cuda(
    fn: Call | Sequence[Call],
    *,
    device: torch.device | str = "cuda",
    repeats: int = 100,
    warmup: int = 10,
    graph: bool = True,
    flush: bool = True,
    limit_seconds: float = 1.0,
) -> Timing:
    """Times a call, or the mean of one call on each of several sets of buffers.

    `repeats` replays after at least `warmup` ones; fewer, but at least five, where they would take longer than
    `limit_seconds`. Results of a call are dropped. `flush=False` leaves L2 as the replay before left it, for calls
    that move many times its size. On a device without CUDA the same calls are timed by the host's clock.
    """
    calls = [fn] if callable(fn) else list(fn)
    if not calls or repeats < 1 or warmup < 1:
        raise ValueError("time_cuda: expected at least one call, one repeat and one warm-up")
    device = torch.device(device)
    if device.type != "cuda":
        return _time_on_host(calls, repeats, warmup, limit_seconds)
    with torch.cuda.device(device):
        return _time_on_cuda(calls, repeats, warmup, graph, flush, limit_seconds)


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _warm_up(run: Call, warmup: int, least_seconds: float, wait: Call) -> float:
    """Runs `warmup` times and for at least so long; returns seconds per run, the first left out."""
    run()
    wait()
    begin, runs, elapsed = time.perf_counter(), 0, 0.0
    while runs < warmup or elapsed < least_seconds:
        run()
        wait()
        runs += 1
        elapsed = time.perf_counter() - begin
    return elapsed / runs


def _repeats_within(limit_seconds: float, seconds_each: float, repeats: int) -> int:
    affordable = int(limit_seconds / max(seconds_each, 1e-9))
    return min(repeats, max(affordable, MIN_REPEATS))


def _time_on_host(calls: Sequence[Call], repeats: int, warmup: int, limit_seconds: float) -> Timing:
    each = _warm_up(lambda: _run(calls), warmup, 0.0, lambda: None)
    seconds = []
    for _ in range(_repeats_within(limit_seconds, each, repeats)):
        begin = time.perf_counter()
        _run(calls)
        seconds.append((time.perf_counter() - begin) / len(calls))
    return Timing.of(seconds, how=f"host clock, sets of buffers: {len(calls)}")


def _time_on_cuda(
    calls: Sequence[Call], repeats: int, warmup: int, graph: bool, flush: bool, limit_seconds: float
) -> Timing:
    replay, how = _captured(calls, warmup) if graph else (lambda: _run(calls), "launched one by one")
    buffer = _flush_buffer() if flush else None

    def prepare() -> None:
        if buffer is not None:
            buffer.sum()

    def once() -> None:
        prepare()
        replay()

    each = _warm_up(once, warmup, WARMUP_SECONDS, torch.cuda.synchronize)
    events = []
    for _ in range(_repeats_within(limit_seconds, each, repeats)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepare()
        begin.record()
        replay()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    seconds = [begin.elapsed_time(end) / 1e3 / len(calls) for begin, end in events]
    return Timing.of(seconds, how=f"{how}, sets of buffers: {len(calls)}, L2 {'flushed' if flush else 'as left'}")


def _captured(calls: Sequence[Call], warmup: int) -> tuple[Call, str]:
    """A replay of all calls as one graph; where they cannot be captured the calls themselves, with the reason."""
    stream, outside = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):  # compiles, tunes and creates handles, none of which a capture allows
        for _ in range(min(warmup, 3)):
            _run(calls)
    outside.wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured, stream=stream, capture_error_mode="thread_local"):
            _run(calls)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.set_stream(outside)  # a capture that fails leaves its own stream current
        reason = (str(error.__context__ or error).splitlines() or [type(error).__name__])[0]
        return lambda: _run(calls), f"launched one by one, not capturable: {reason}"
    return captured.replay, "CUDA graph"


def _flush_buffer() -> Tensor:
    size = FLUSH_FACTOR * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.zeros(max(size, 1 << 26) // 4, device="cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the device reached in the same run: the rates that a floor is counted with."""

    bytes_per_second: float  #: device-to-device copy, bytes read plus bytes written
    flops_per_second: dict[str, float | None]  #: matrix product by operand type; None where the device has none
    how: str

    def floor_seconds(self, bytes_moved: int, flops: int, dtype: torch.dtype) -> float:
        """max(bytes/bandwidth, operations/rate). Raises ValueError where the rate of a type was not measured."""
        moving = bytes_moved / self.bytes_per_second
        if not flops:
            return moving
        rate = self.flops_per_second.get(type_name(dtype))
        if rate is None:
            raise ValueError(f"no rate of {type_name(dtype)} products, measured: {sorted(self.flops_per_second)}")
        return max(moving, flops / rate)


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def ceilings(device: torch.device | str) -> Ceilings:
    """Measures both ceilings on random data: medians; takes seconds and, on a GPU, some gigabytes for a moment."""
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    n, repeats = (8192, 20) if on_cuda else (512, 3)
    size = 1 << 24
    if on_cuda:
        size = max(1 << 30, 8 * torch.cuda.get_device_properties(device).L2_cache_size)
    rates: dict[str, float | None] = {
        type_name(dtype): _product_rate(device, n, dtype, repeats)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    fp8, note = None, "needs capability 8.9"
    if on_cuda and torch.cuda.get_device_capability(device) >= (8, 9):
        try:
            fp8, note = _fp8_product_rate(device, n, repeats), "one scale per operand"
        except (RuntimeError, TypeError) as error:  # the call is PyTorch's own and may change
            note = f"failed: {(str(error).splitlines() or [''])[0]}"
    rates[type_name(torch.float8_e4m3fn)] = fp8
    tf32 = "allowed" if torch.backends.cuda.matmul.allow_tf32 else "off"
    return Ceilings(
        bytes_per_second=_copy_rate(device, size, repeats),
        flops_per_second=rates,
        how=f"medians of {repeats}: copy of {size} bytes, reads plus writes; products {n}³ of random numbers, "
        f"float32 with TF32 {tf32}, float8 e4m3: {note}",
    )


def _copy_rate(device: torch.device, size: int, repeats: int) -> float:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_cuda(lambda: target.copy_(source), device=device, repeats=repeats, warmup=3, flush=False)
    return 2 * size / timing.median


def _product_rate(device: torch.device, n: int, dtype: torch.dtype, repeats: int) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = time_cuda(lambda: torch.mm(a, b, out=out), device=device, repeats=repeats, warmup=3, flush=False)
    return 2 * n**3 / timing.median


def _fp8_product_rate(device: torch.device, n: int, repeats: int) -> float:
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> Tensor:
        # It wants b by columns, and is fastest with Hopper's short accumulation, which the engine's fp8 uses too.
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    timing = time_cuda(product, device=device, repeats=repeats, warmup=3, flush=False)
    return 2 * n**3 / timing.median
