"""NumPy's matrix products on one thread each, where results must not depend on what else the process does.

A product's last bits depend on how many threads share it, and their number is one setting of the whole process, which
the Winograd decoder changes while it runs. So whatever an image is made of goes through here. (That is OpenBLAS on
threads of its own, which NumPy's wheels have; a library on OpenMP has a number for each thread that calls it.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any


class _OneThread:
    """The first that enters sets the number of threads, the last that leaves restores it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As if nobody had ever entered."""
        self._lock = Lock()
        self._inside = 0
        self._before: list[tuple[Any, int]] = []  # libraries and their numbers of threads

    @contextmanager
    def __call__(self) -> Iterator[None]:
        entered = self._lock
        with entered:
            if self._inside == 0:
                self._before = [(library, library.num_threads) for library in _matrix_libraries()]
                for library, _ in self._before:
                    _set_threads(library, 1)
            self._inside += 1
        try:
            yield
        finally:
            with entered:
                if self._lock is entered:  # not in a child that was forked inside
                    self._inside -= 1
                    if self._inside == 0:
                        for library, threads in self._before:
                            _set_threads(library, threads)


@cache
def _matrix_libraries() -> list[Any]:
    """That of NumPy, and whatever else was loaded before the first product."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # then there is no Winograd decoder either, and nothing changes the number
        return []
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def _set_threads(library: Any, threads: int) -> None:
    """Whichever thread asks: threadpoolctl lets only the first that ever set a number set another."""
    release = getattr(library, "clear_controlling_thread", lambda *, force: None)
    release(force=True)
    library.set_num_threads(threads)
    release(force=True)


single_threaded = _OneThread()
if hasattr(os, "register_at_fork"):  # whoever was inside is not there in the child
    os.register_at_fork(after_in_child=single_threaded.reset)
