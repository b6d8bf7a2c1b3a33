"""A block of memory that outlives a request, so that the next one need not wait for fresh pages.

Fresh pages are zeroed, and in a virtual machine first had from its host: 178 MB, the caches of one guided d16 image,
took 0.7 s of an image's 7.6 s so. Between requests the system may take the pages back, without asking and without
writing them anywhere (MADV_FREE): until it does they count as this process's, and as free. As free they count even when
they are in use again, until the system looks for memory; `reused` says how much of that there is.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from threading import RLock

from .errors import EngineError


class Workspace:
    """Keeps the largest block that was given back, for whoever takes one next; any number may be out."""

    def __init__(self) -> None:
        self._lock = RLock()  # `give` may run in the middle of `give`: states end when the collector says so
        self._spare: mmap.mmap | None = None
        self._again: dict[int, mmap.mmap] = {}  # blocks that are out not for the first time, by identity

    @property
    def reused(self) -> int:
        """Bytes that are out and that the system may take for free."""
        with self._lock:
            return sum(len(block) for block in self._again.values())

    def take(self, size: int) -> mmap.mmap:
        """At least `size` bytes of whatever content, on a page boundary; alive for as long as any array over it."""
        with self._lock:
            spare, self._spare = self._spare, None
            if spare is not None and len(spare) >= size:
                self._again[id(spare)] = spare
                return spare
        del spare  # before more is taken
        try:
            # Shared, as Python maps by default, it could be neither given back nor huge.
            private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
            block = mmap.mmap(-1, max(size, 1), **private)
        except OSError as error:
            raise EngineError(
                f"{size / 1e6:,.0f} MB for a request: {error.strerror}; free memory, or make the batch smaller"
            ) from error
        _advise(block, "MADV_HUGEPAGE")  # fewer faults, where the system leaves it to us
        return block

    def give(self, block: mmap.mmap) -> None:
        """Takes back what `take` gave; nothing may read or write it any more."""
        freed = _advise(block, "MADV_FREE")
        with self._lock:
            self._again.pop(id(block), None)
            if not freed:
                return  # it would stay with this process
            if self._spare is None or len(self._spare) < len(block):
                self._spare = block


def _advise(block: mmap.mmap, advice: str) -> bool:
    """Whether the system knows that advice."""
    with suppress(OSError, AttributeError):
        block.madvise(getattr(mmap, advice))
        return True
    return False
