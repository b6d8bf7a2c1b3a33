"""Threads of the decoder: each takes a share of every step, with buffers of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise

import numpy as np

from ...errors import EngineError


class Workers:
    """A fixed number of threads; NumPy's matrix products and the compiled loops run in them without Python's lock.

    Threads do not live on in a child that is forked, so there it refuses to work instead of waiting for them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="var-decoder")
        self._scratch: list[dict[str, np.ndarray]] = [{} for _ in range(count)]

    def share(self, total: int, work: Callable[[int, int, int], object]) -> None:
        """work(worker, first, last) over equal parts of range(total), side by side; returns when all are done.

        Raises EngineError in a process that was forked after loading.
        """
        if os.getpid() != self._process:
            raise EngineError("decoder: this process was forked after the bundle was loaded; load it after the fork")
        bounds = [total * i // self.count for i in range(self.count + 1)]
        done: list[Future[object]] = []
        try:
            for worker, (first, last) in enumerate(pairwise(bounds)):
                if first < last:
                    done.append(self._pool.submit(work, worker, first, last))
        finally:
            try:
                wait(done)
            except BaseException:  # Ctrl-C, say
                wait(done)  # the caller's buffers are the workers' until all are done
                raise
        for future in done:
            future.result()

    def scratch(self, worker: int, name: str, *shape: int) -> np.ndarray:
        """A float32 buffer of that worker, kept for the next call and grown where it is too small."""
        held, size = self._scratch[worker], int(np.prod(shape))
        if name not in held or held[name].size < size:
            held[name] = np.empty(size, dtype=np.float32)
        return held[name][:size].reshape(shape)
