"""Images → files, by threads beside the engine; few wait, and what a disk refuses ends the run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from .folder import SampleFolder
from .maker import ENCODERS

#: Images that may wait to be written: a few batches, at 512 px 200 MB.
_WAITING = 256


class Writer:
    """Puts images in their places; leaving the block waits for all that it was given, in whatever way it is left."""

    def __init__(self, folder: SampleFolder, on_written: Callable[[], object]) -> None:
        """on_written: called after every image, one at a time, in a thread of the writer."""
        self._folder, self._on_written = folder, on_written
        self._pool = ThreadPoolExecutor(ENCODERS)
        self._waiting: deque[Future[None]] = deque()
        self._telling = threading.Lock()

    def put(self, index: int, png: Callable[[], bytes]) -> None:
        """Writes image `index`; png is called in another thread. Raises RequestError for this or an earlier image."""
        self._waiting.append(self._pool.submit(self._write, index, png))
        self._settle(_WAITING)

    def _write(self, index: int, png: Callable[[], bytes]) -> None:
        self._folder.write(index, png())
        with self._telling:
            self._on_written()

    def _settle(self, most: int) -> None:
        """Until no more than `most` wait."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self._waiting.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            self._pool.shutdown()
