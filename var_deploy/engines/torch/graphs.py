"""Capturing launches as CUDA graphs, and the time that stages take on a device."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch

from ...errors import EngineError

#: Launches: a stage as it is, or the replay of its graph.
Launch = Callable[[], object]

#: One capture at a time in the process: PyTorch synchronises the device when one begins.
_CAPTURING = Lock()

#: How many streams PyTorch has per device and priority, and those of them that engines hold.
_STREAMS_PER_DEVICE = 32
_TAKEN: WeakSet[torch.cuda.Stream] = WeakSet()

#: Of the driver and Triton; of cuBLAS; of cuDNN, none of whose algorithms found room.
_NO_MEMORY = "out of memory|ALLOC_FAILED|unable to find an engine"


def captured(launches: list[Launch], stream: torch.cuda.Stream, pool: Any) -> list[Launch]:
    """Runs every launch once, then captures each as a graph of its own; returns their replays.

    The run before compiles kernels and lets libraries choose their algorithms and allocate what they keep, none of
    which a capture may do. Graphs of one pool share memory for what lives within a graph, so two of them must never
    run at once. Other threads may use the GPU meanwhile, other captures wait.
    """
    with _CAPTURING:
        for launch in launches:
            launch()
        stream.synchronize()
        return [_capture(launch, stream, pool).replay for launch in launches]


def _capture(launch: Launch, stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            launch()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        # What invalidates a capture is outside our launches: a debugger, or work forced onto this stream.
        raise EngineError(
            f"capturing a CUDA graph failed ({str(error).strip().splitlines()[0]}); if it happens again, restart the "
            "process without tools that synchronise the GPU"
        ) from error
    return graph


def stream_of_its_own(device: torch.device) -> torch.cuda.Stream:
    """A stream that no other engine of the process uses: a capture would take up what the other launches on it.

    PyTorch hands out the same few streams in turn. Raises EngineError when all are taken.
    """
    with _CAPTURING:
        for turn in range(2 * _STREAMS_PER_DEVICE):
            if turn == _STREAMS_PER_DEVICE:
                gc.collect()  # engines that nobody holds may hang in cycles
            stream = torch.cuda.Stream(device)
            if stream not in _TAKEN:
                _TAKEN.add(stream)
                return stream
    raise EngineError(f"{device}: {_STREAMS_PER_DEVICE} engines are open on it, more than streams; close some")


def out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's memory did not suffice, in the words of whichever library said so.

    Ending a failed capture may raise an error of its own over the first, so what came before counts too.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError):
            return True
        if isinstance(cause, RuntimeError) and re.search(_NO_MEMORY, str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def give_back_memory() -> None:
    """Returns to the GPU what nothing refers to any more; waits for captures, during which PyTorch would not."""
    with _CAPTURING:
        gc.collect()  # what a failed capture held may hang in cycles with its trace
        torch.cuda.empty_cache()


class Clock:
    """Seconds between marks: on a GPU by events in stream order, so that marking waits for nothing."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._names: list[str] = []
        self._marks: list[torch.cuda.Event | float] = [self._now()]

    def _now(self) -> torch.cuda.Event | float:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def mark(self, name: str) -> None:
        """Ends the stage `name`, which began at the mark before."""
        self._names.append(name)
        self._marks.append(self._now())

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, those of one name added up; the stream must have been synchronised."""
        total: dict[str, float] = {}
        for name, begin, end in zip(self._names, self._marks, self._marks[1:], strict=False):
            if isinstance(begin, torch.cuda.Event):
                assert isinstance(end, torch.cuda.Event)
                elapsed = begin.elapsed_time(end) / 1000
            else:
                assert isinstance(end, float)
                elapsed = end - begin
            total[name] = total.get(name, 0.0) + elapsed
        return total
