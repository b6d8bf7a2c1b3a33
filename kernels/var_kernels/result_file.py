"""Files that results go to: refused before the work where they cannot be written, replaced by one step after it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import typer


def refuse_unwritable(*paths: Path | None) -> None:
    """Says on one line which file could not be written and why, and exits with status 1. Leaves nothing behind."""
    for path in paths:
        if path is not None and (wrong := _obstacle(path)):
            print(f"error: {path}: {wrong}", file=sys.stderr)
            raise typer.Exit(1)


def _obstacle(path: Path) -> str | None:
    """Missing directories are none."""
    if path.is_dir():
        return "got a directory, expected a file name; add one"
    nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=nearest):  # permissions say nothing to root, nor of a disk that is full
            return None
    except OSError as error:
        return f"cannot write ({error.strerror}: {nearest}); choose another place"


def replace_file(path: Path, text: str) -> None:
    """Replaces the file by one step, so that it is whole whenever the run is cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def slug(name: str) -> str:
    """A GPU's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
