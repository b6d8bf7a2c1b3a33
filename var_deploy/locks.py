"""Locks between processes: held by the one that writes what others want to write too; gone when it dies."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .errors import RequestError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("var_deploy")

#: Seconds between two tries for a lock that is held briefly.
_WAIT = 0.05


def try_lock(file: TextIO) -> bool | None:
    """Whether the lock could be had; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.info("%s: cannot be locked (%s)", file.name, error.strerror)
        return None
    return True


def is_held(path: Path) -> bool:
    """Whether another process holds a lock file. Looking takes a shared lock, so that two may look at once."""
    if fcntl is None:
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        unlock(file)
    return False


def unlock(file: TextIO) -> None:
    """Of a lock that is held; closing alone would leave it to a child that was forked meanwhile."""
    fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Holds a lock file. Raises RequestError where another process does, and OSError."""
    with path.open("w") as file:
        held = try_lock(file)
        if held is False:
            raise RequestError(f"{path}: another process makes {what} here; wait until it has ended")
        try:
            yield
        finally:
            if held:
                unlock(file)


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Holds a lock file, once no other process does; at once where there are no locks. Raises OSError."""
    with path.open("w") as file:
        while (held := try_lock(file)) is False:
            time.sleep(_WAIT)
        try:
            yield
        finally:
            if held:
                unlock(file)
