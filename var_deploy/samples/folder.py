"""The directory of samples: NNNNNN.png, which are whole or not there, and samples.json, which says what they are.

Different shards may work in it at the same time, from several machines; locks keep overlapping ones apart. What is no
sample has a name that starts with a dot, except samples.json and samples.npz.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..locks import exclusive, is_held, waiting
from ..output_file import replacing, write_text
from .plan import VERSION, SamplePlan, Shard

NOTES, ARCHIVE = "samples.json", "samples.npz"
#: How a PNG file ends: an empty IEND chunk and its checksum.
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_READERS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFolder:
    """The samples of one plan."""

    path: Path
    plan: SamplePlan

    # ---- what it is --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuses a directory of another plan, or of other things. Raises RequestError."""
        if not self.path.is_dir():
            if self.path.exists():
                raise RequestError(f"{self.path}: is a file, expected a directory; choose another name")
            return
        found = self._notes()
        if found is not None:
            self._compare(found, self.plan.to_json())
        elif others := sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")):
            raise RequestError(
                f"{self.path}: holds {others[0]} but no {NOTES}; choose a new or an empty directory, or the one of "
                "samples that are to go on"
            )

    def note(self, computed: Mapping[str, str]) -> None:
        """Writes samples.json, or compares it: before the first image. Raises RequestError."""
        with waiting(self.path / ".samples.lock"):
            found, notes = self._notes(), self.plan.to_json() | dict(computed)
            if found is None:
                write_text(self.path / NOTES, json.dumps(notes, indent=1, ensure_ascii=False) + "\n")
            else:
                self._compare(found, notes)

    def _notes(self) -> dict[str, Any] | None:
        path = self.path / NOTES
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise RequestError(f"{path}: cannot be read ({error}); choose another directory") from error
        if not isinstance(found, dict):
            raise RequestError(f"{path}: got {type(found).__name__}, expected an object; choose another directory")
        return found

    def _compare(self, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        version = found.get("version")
        if version != VERSION:
            raise RequestError(
                f"{self.path / NOTES}: version {version!r}, this program makes {VERSION}; go on with the var_deploy "
                "that began it, or choose another directory"
            )
        there, here = _flat(found), _flat(asked)
        differing = [name for name in here if there.get(name) != here[name]]
        if differing:
            said = ", ".join(f"{name} {_text(there.get(name))}, now {_text(here[name])}" for name in differing)
            raise RequestError(
                f"{self.path}: began with another plan: {said}; choose another directory, or the options it began with"
            )

    # ---- who works in it ---------------------------------------------------------------------------------------------

    @contextmanager
    def held(self, shard: Shard) -> Iterator[None]:
        """Makes the directory and holds this shard. Raises RequestError where a process makes images of it already."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be made ({error.strerror}); choose another place") from error
        what = "these samples" if shard.total == 1 else f"shard {shard} of these samples"
        with exclusive(self.path / f".shard-{shard.index}-of-{shard.total}.lock", what):
            for other in self._other_shards(shard):
                if is_held(other):
                    raise RequestError(
                        f"{other}: another process is at work with another number of shards, this is {shard}; give the "
                        "same number, or wait until it has ended"
                    )
            yield

    def _other_shards(self, shard: Shard) -> list[Path]:
        """Lock files of shards that are cut otherwise, so that they may have images in common with this one."""
        found = sorted(self.path.glob(".shard-*-of-*.lock"))
        return [path for path in found if not path.name.endswith(f"-of-{shard.total}.lock")]

    # ---- samples -----------------------------------------------------------------------------------------------------

    def file(self, index: int) -> Path:
        """Of image `index`: names of one length, so that their order is that of the images."""
        digits = max(6, len(str(self.plan.count - 1)))
        return self.path / f"{index:0{digits}d}.png"

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those whose file is not there, or does not end as a PNG file does: a copy or a machine was cut off."""
        parts = [indices[start::_READERS] for start in range(_READERS)]  # few calls: a call costs more than a look
        with ThreadPoolExecutor(_READERS) as pool:  # for disks of a network, which answer late
            found = pool.map(lambda part: [index for index in part if not _is_whole(self.file(index))], parts)
            return sorted(index for part in found for index in part)

    def write(self, index: int, png: bytes) -> None:
        """Puts a file in its place by one step. Raises RequestError."""
        with replacing(self.file(index)) as partial:
            partial.write_bytes(png)

    def remove_leftovers(self) -> None:
        """What an .npz was that a killed process began; a PNG file's rest is replaced when the image is made."""
        rest = self.path / f".partial-{ARCHIVE}"
        if rest.exists():
            with suppress(RequestError), exclusive(self.path / ".npz.lock", ARCHIVE):
                rest.unlink(missing_ok=True)


def _flat(notes: Mapping[str, Any]) -> dict[str, Any]:
    """With the settings one by one."""
    settings = notes.get("settings")
    return {**notes, **(settings if isinstance(settings, Mapping) else {}), "settings": None}


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else text


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), 2)
            return file.read() == _PNG_END
    except OSError:  # not there, or shorter than that
        return False
