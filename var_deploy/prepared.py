"""Weights in the form that this machine computes with, kept between runs: mapped instead of made again at every start.

An entry is a directory in `$XDG_CACHE_HOME/var-deploy` (default `~/.cache/var-deploy`), named by a digest of all that
it was made from: the bundle's files, library versions, the CPU. It is written beside its name and renamed into place
when whole, by one process at a time, for which others that need it wait. Everything in it may be deleted at any time;
what is damaged is said and made again; what no process has opened for long is removed; where it cannot be written,
nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from .bundle import FileSeal, sha256_of
from .errors import RequestError, VarDeployError
from .locks import try_lock, unlock

log = logging.getLogger("var_deploy")

SEALS = "seals.json"
#: Held by the process that makes an entry.
LOCK = ".lock"
#: How long that is waited for, in seconds.
PATIENCE = 300.0
#: Staging directories older than this, in seconds, are of a process that died.
STALE = 3600.0
#: Entries that were not opened for this long, in seconds, are removed when another is made.
UNUSED = 60 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedCache:
    """Where entries are kept; `verify_digests=False` compares sizes only."""

    directory: Path
    verify_digests: bool = True

    def entry(self, kind: str, made_from: Iterable[str], size: int, make: Callable[[Path], object]) -> Path | None:
        """The directory of an entry, made by make(directory) where there is none yet; None where none can be kept.

        made_from: all that decides the content. size: bytes that it will take at most.
        """
        path = self._path(kind, made_from)
        try:
            for after_waiting in (False, True):
                if self._usable(path):
                    return path
                self.directory.mkdir(parents=True, exist_ok=True)
                with self._alone(path) as waited:
                    if waited and not after_waiting and path.is_dir():
                        continue  # made by the process that was waited for: looked at side by side with the others
                    if path.is_dir():
                        if (problem := self._problem(path)) is None:
                            return path
                        self.discard(path, problem)
                    self._sweep()
                    free = shutil.disk_usage(self.directory).free
                    if free < size:
                        needs = f"needs {size / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
                        log.warning("%s: %s; nothing is kept", path, needs)
                        return None
                    return self._made(path, make)
        except (OSError, SafetensorError, VarDeployError) as error:  # a full disk comes as any of them
            log.warning("%s: cannot be kept (%s)", path, getattr(error, "strerror", None) or error)
        return None

    def find(self, kind: str, made_from: Iterable[str]) -> Path | None:
        """The directory of a whole entry; None where there is none. For what takes too long to make under a lock."""
        path = self._path(kind, made_from)
        with suppress(OSError):  # a directory that may not be entered
            return path if self._usable(path) else None
        return None

    def _path(self, kind: str, made_from: Iterable[str]) -> Path:
        name = f"{kind}-{hashlib.sha256(chr(0).join([*made_from, processor()]).encode()).hexdigest()[:32]}"
        return self.directory / name

    def discard(self, path: Path, problem: object) -> None:
        """Removes an entry that cannot be used and says so; the next start makes it again."""
        log.warning("%s: %s; making it again", path, problem)
        condemned = path.with_name(f".{path.name}-{os.getpid()}")
        with suppress(OSError):  # in one step, so that no other process meets a half of it
            path.rename(condemned)
        shutil.rmtree(condemned, ignore_errors=True)

    def _usable(self, path: Path) -> bool:
        """Whether there is a whole entry."""
        if not path.is_dir() or self._problem(path) is not None:
            return False
        with suppress(OSError):  # of another user, or on a disk that is read alone
            os.utime(path)  # it is in use
        return True

    @contextmanager
    def _alone(self, path: Path) -> Iterator[bool]:
        """Holds the directory's lock, if it can be had; whether another process was waited for."""
        with (self.directory / LOCK).open("w") as file:
            waited, deadline = False, time.monotonic() + PATIENCE
            while (held := try_lock(file)) is False:
                if not waited:
                    log.info("%s: waiting for another process that prepares weights", path)
                    waited = True
                if time.monotonic() > deadline:
                    log.warning("%s: held for %.0f s by another process; going on without it", file.name, PATIENCE)
                    break
                time.sleep(0.1)
            try:
                yield waited
            finally:
                if held:
                    unlock(file)

    def _made(self, path: Path, make: Callable[[Path], object]) -> Path | None:
        log.info("%s: preparing weights for this machine, once", path)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=self.directory))
        try:
            make(staging)
            files = sorted(file for file in staging.iterdir())
            seals = {file.name: FileSeal(size=file.stat().st_size, sha256=sha256_of(file)) for file in files}
            (staging / SEALS).write_text(json.dumps({name: asdict(seal) for name, seal in seals.items()}))
            try:  # without waiting for the disk: what a crash leaves does not fit its seals
                staging.rename(path)
            except OSError:
                if not path.is_dir():  # else another process was quicker: its entry is the same
                    raise
            return path
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _problem(self, path: Path) -> str | None:
        """What is wrong with an entry, if anything."""
        try:
            seals = {name: FileSeal(**seal) for name, seal in json.loads((path / SEALS).read_text()).items()}
            for name, seal in seals.items():
                file = path / name
                if (size := file.stat().st_size) != seal.size:
                    return f"{name} has {size} bytes, expected {seal.size}"
                if self.verify_digests and sha256_of(file) != seal.sha256:
                    return f"{name} has changed"
        except (OSError, ValueError, TypeError, AttributeError, VarDeployError) as error:
            return f"damaged ({error})"
        return None if seals else "empty"

    def _sweep(self) -> None:
        """Removes what a process that died has left, and what nobody has used for long."""
        for path in self.directory.iterdir():
            with suppress(OSError):  # renamed or removed by another process meanwhile, or not ours
                limit = STALE if path.name.startswith(".") else UNUSED
                if path.is_dir() and time.time() - path.stat().st_mtime > limit:
                    shutil.rmtree(path, ignore_errors=True)


def entries(directory: Path) -> dict[str, int]:
    """Bytes of every entry, unfinished ones too."""
    found = {}
    for path in sorted(path for path in directory.glob("*") if path.is_dir()):
        with suppress(FileNotFoundError):  # gone meanwhile
            found[path.name] = sum(file.stat().st_size for file in path.iterdir())
    return found


def remove_entries(directory: Path) -> None:
    """Deletes everything that is kept. Raises RequestError where it may not be deleted."""
    for name in entries(directory):
        try:
            shutil.rmtree(directory / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RequestError(
                f"{directory / name}: cannot be deleted ({error.strerror}); delete it by hand"
            ) from error


def default_directory() -> Path | None:
    """By the XDG Base Directory specification: $XDG_CACHE_HOME where it is an absolute path, else ~/.cache.

    None for a user without a home: nothing is read from where others may write.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "var-deploy"
    except RuntimeError:
        return None


def default_cache(*, verify_digests: bool) -> PreparedCache | None:
    """The cache in the default directory, if there is one."""
    directory = default_directory()
    return None if directory is None else PreparedCache(directory=directory, verify_digests=verify_digests)


def processor() -> str:
    """Model and instruction set of the CPU: packed weights differ between them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = [re.search(rf"^(?:{field})\s*:\s*(.*)$", text, re.MULTILINE) for field in ("model name", "flags|Features")]
    return " ".join([platform.machine(), *(match.group(1) for match in found if match)])
