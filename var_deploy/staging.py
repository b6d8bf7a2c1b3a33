"""A directory that is written beside its final place, so that it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import VarDeployError


@contextmanager
def staging_directory(out: Path, kind: str = "partial") -> Iterator[Path]:
    """An empty private directory beside `out`, on the same disk, for the block to fill.

    At the end it is deleted, unless the block has renamed it, and so are those parents of `out` that were made for it
    and hold nothing. Raises OSError.
    """
    made_parents = [parent for parent in out.parents if not os.path.lexists(parent)]  # innermost first
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.{kind}-", dir=out.parent))
        yield staging
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for parent in made_parents:
            with suppress(OSError):  # not empty, or never made
                parent.rmdir()


def put_in_place(staging: Path, out: Path, error: type[VarDeployError]) -> None:
    """Renames a staging directory to `out`. Raises OSError, and `error` where that was made meanwhile."""
    staging.chmod(0o755)  # mkdtemp makes it private
    require_absent(out, error)  # rename would replace an empty directory
    staging.rename(out)


def require_absent(out: Path, error: type[VarDeployError]) -> None:
    """Raises `error` where there is anything at `out`."""
    if os.path.lexists(out):  # unlike Path.exists, false for a name that is too long; making it says so
        raise error(f"{out}: exists already; nothing is overwritten, choose another name or remove it")
