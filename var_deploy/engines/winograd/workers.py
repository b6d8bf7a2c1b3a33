"""Threads of the decoder: each takes a share of every step, with buffers of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController


class _Products:
    """Keeps NumPy's matrix library to one thread while any decoder of this process runs.

    Its setting is one for the whole process, so the first decoder to start sets it and the last to end restores it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._running = 0
        self._before: list[tuple[Any, int]] = []  # libraries and their numbers of threads

    @contextmanager
    def single_threaded(self) -> Iterator[None]:
        with self._lock:
            if self._running == 0:
                libraries = ThreadpoolController().select(user_api="blas").lib_controllers
                self._before = [(library, library.num_threads) for library in libraries]
                for library, _ in self._before:
                    _set_threads(library, 1)
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    for library, threads in self._before:
                        _set_threads(library, threads)


def _set_threads(library: Any, threads: int) -> None:
    """Whichever thread asks: threadpoolctl lets only the first that ever set a number set another."""
    release = getattr(library, "clear_controlling_thread", lambda *, force: None)
    release(force=True)
    library.set_num_threads(threads)
    release(force=True)


products = _Products()


class Workers:
    """A fixed number of threads; NumPy's matrix products and the compiled loops run in them without Python's lock."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="var-decoder")
        self._scratch: list[dict[str, np.ndarray]] = [{} for _ in range(count)]

    def share(self, total: int, work: Callable[[int, int, int], object]) -> None:
        """work(worker, first, last) over equal parts of range(total), side by side; returns when all are done."""
        bounds = [total * i // self.count for i in range(self.count + 1)]
        parts = enumerate(pairwise(bounds))
        done = [self._pool.submit(work, worker, first, last) for worker, (first, last) in parts if first < last]
        wait(done)  # all of them, whatever fails: the caller's buffers are theirs until then
        for future in done:
            future.result()

    def scratch(self, worker: int, name: str, *shape: int) -> np.ndarray:
        """A float32 buffer of that worker, kept for the next call and grown where it is too small."""
        held, size = self._scratch[worker], int(np.prod(shape))
        if name not in held or held[name].size < size:
            held[name] = np.empty(size, dtype=np.float32)
        return held[name][:size].reshape(shape)
