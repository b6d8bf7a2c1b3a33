"""Output files that are whole or not there: written beside their place, then put there in one step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RequestError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A partial file beside `path` that takes its place when the block succeeds. Raises RequestError.

    A block that fails leaves nothing behind, not even directories made for it.
    """
    partial = path.with_name(f".partial-{path.name}")
    made_parents = [parent for parent in path.parents if not os.path.lexists(parent)]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
        made_parents = []
    except OSError as error:
        raise RequestError(f"{path}: cannot write ({error.strerror or error}); choose another place") from error
    finally:
        with suppress(OSError):  # it may never have existed
            partial.unlink()
        for parent in made_parents:
            with suppress(OSError):
                parent.rmdir()


def write_text(path: Path, text: str) -> None:
    """Replaces a text file by one step. Raises RequestError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_output(path: Path) -> None:
    """Refuses a file that could not be written, before the work whose result it would hold. Raises RequestError."""
    if path.is_dir():
        raise RequestError(f"{path}: got a directory, expected a file name; add one")
    nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=nearest):  # permissions say nothing to root, nor of a disk that is full
            return
    except OSError as error:
        raise RequestError(f"{path}: cannot write ({error.strerror}: {nearest}); choose another place") from error
