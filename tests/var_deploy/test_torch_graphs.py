"""What counts as too little GPU memory, in the words of each library; and the clock on a CPU."""

from __future__ import annotations

import pytest
import torch

from var_deploy.engines.torch.graphs import Clock, out_of_memory


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


def test_seconds_of_stages_of_one_name_add_up(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("var_deploy.engines.torch.graphs.time.perf_counter", lambda: next(now))
    clock = Clock(None)
    for name in ("scale", "draw", "scale"):
        clock.mark(name)
    assert clock.seconds() == {"scale": 5.0, "draw": 2.0}
