"""Graphs without a GPU: what counts as too little memory, streams, captures that fail; and the clock on a CPU."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from var_deploy.engines.torch.graphs import Clock, captured, out_of_memory, stream_of_its_own
from var_deploy.errors import EngineError


def _after(first: Exception, second: Exception) -> Exception:
    """`second`, raised while `first` was handled."""
    second.__context__ = first
    return second


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (_after(torch.OutOfMemoryError("first"), RuntimeError("operation failed due to a previous error")), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (_after(ValueError("out of memory"), RuntimeError("another")), False),
    ],
)
def test_out_of_memory_in_every_librarys_words(error, expected):
    assert out_of_memory(error) is expected


class _Stream:
    """A stream as PyTorch hands them out: three per device, in turn, equal where they are the same one."""

    handed_out = count()

    def __init__(self, device: object) -> None:
        self.stream = next(self.handed_out) % 3

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and other.stream == self.stream

    def __hash__(self) -> int:
        return hash(self.stream)


def test_engines_share_no_stream_and_one_that_is_gone_leaves_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr("var_deploy.engines.torch.graphs._STREAMS_PER_DEVICE", 3)
    device = torch.device("cuda", 0)
    held = [stream_of_its_own(device) for _ in range(3)]
    assert {stream.stream for stream in held} == {0, 1, 2}
    with pytest.raises(EngineError, match="cuda:0: 3 engines are open on it, more than streams; close some"):
        stream_of_its_own(device)
    gone = held.pop(1).stream
    assert stream_of_its_own(device).stream == gone


def test_a_stream_of_an_engine_that_hangs_in_a_cycle_is_taken_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr("var_deploy.engines.torch.graphs._STREAMS_PER_DEVICE", 3)
    device = torch.device("cuda", 0)
    held = [stream_of_its_own(device) for _ in range(3)]
    engine: dict[str, object] = {"stream": held.pop()}
    engine["itself"] = engine
    del engine
    held.append(stream_of_its_own(device))
    assert {stream.stream for stream in held} == {0, 1, 2}


def test_a_capture_that_fails_for_another_reason_than_memory_is_one_line(monkeypatch):
    class Failing:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError(self.words)

        words = "CUDA error: operation failed due to a previous error during capture\nmore"

    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    stream = SimpleNamespace(synchronize=lambda: None)
    with pytest.raises(EngineError) as refusal:
        captured([lambda: None], stream, None)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("capturing a CUDA graph failed (CUDA error: operation failed due to a")
    monkeypatch.setattr(Failing, "words", "CUDA out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):  # which the engine knows what to do about
        captured([lambda: None], stream, None)


def test_seconds_of_stages_of_one_name_add_up(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("var_deploy.engines.torch.graphs.time.perf_counter", lambda: next(now))
    clock = Clock(None)
    for name in ("scale", "draw", "scale"):
        clock.mark(name)
    assert clock.seconds() == {"scale": 5.0, "draw": 2.0}
