"""A run's directory: `run.json`, which says what the run is and holds it to that; its lock; the finished weights.

RUN/run.json  metrics.jsonl  tensorboard/  samples/  checkpoints/step_00001000/  var.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from var_deploy.config import ConfigError
from var_deploy.errors import CheckpointError

RUN_FILE, CHECKPOINTS, SAMPLES = "run.json", "checkpoints", "samples"
FORMAT = 1

ASKED = "configuration."  #: before the options' names

#: What may differ when a run goes on: it changes no result, but rounding.
FREE = ("configuration.keeping", "configuration.execution", "configuration.data.workers", "parameters")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process alone. Raises ConfigError."""
    import fcntl  # no Windows has it, where checkpoints can be read nevertheless

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write ({error.strerror}); choose another --out") from error
    with lock:
        try:
            # not flock, which workers that outlive a killed trainer for some seconds would inherit
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"{folder}: another process trains here; wait for it or choose another --out") from None
        except OSError:  # a file system without locks
            pass
        yield


def begin(folder: Path, record: dict[str, Any]) -> None:
    """Writes what the run is, or compares it with what is written. Raises ConfigError with the first difference."""
    record = json.loads(json.dumps({"format": FORMAT, **record}))
    path = folder / RUN_FILE
    if not path.exists():
        _write(path, record)
        return
    stored = read_run_file(folder)
    before, now = _flat(stored), _flat(record)
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    differing = [key for key in differing if not any(key == free or key.startswith(f"{free}.") for free in FREE)]
    differing.sort(key=lambda key: not key.startswith(ASKED))  # what was asked for, before what follows from it
    if differing:
        key, more = differing[0], f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise ConfigError(
            f"{folder}: {key.removeprefix(ASKED)}: got {_short(now.get(key))}, this run was started with "
            f"{_short(before.get(key))}{more}; go on with that, or choose another --out"
        )


def read_run_file(folder: Path) -> dict[str, Any]:
    """What `begin` wrote. Raises ConfigError."""
    path = folder / RUN_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore it or choose another --out") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ConfigError(f"{path}: not of format {FORMAT}; choose another --out")
    return stored


def finished_file(folder: Path, kind: str) -> Path:
    """Where a run's finished weights lie; `kind` is "var" or "vqvae"."""
    return folder / f"{kind}.safetensors"


def write_finished(
    path: Path, state: dict[str, Tensor], metadata: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """A plain state dict in the published layout; `metadata` as JSON in its header. Raises CheckpointError."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        dense = {
            key: (tensor.detach().to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
            for key, tensor in state.items()
        }
        save_file(dense, partial, metadata={key: json.dumps(value) for key, value in metadata.items()})
        _sort_metadata(partial)
        partial.replace(path)
    except Exception as error:  # of the file system or of safetensors
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot write ({error}); make room, then run the same command again") from error


def _sort_metadata(path: Path) -> None:
    """safetensors writes these in a new order every time, and the same weights are to make the same file."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length  # the data start behind it
        file.seek(8)
        file.write(text)


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(value, dict):
        return {place: value}
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flat(entry, f"{place}.{key}" if place else key)
    return flat


def _short(value: Any) -> str:
    """Both ends of what is long: paths commonly begin alike."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:20]}...{text[-37:]}"
