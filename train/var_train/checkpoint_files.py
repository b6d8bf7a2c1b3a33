"""A checkpoint's files: tensors → safetensors shards, their seals → `manifest.json`, and back.

Loading executes nothing. PyTorch's own storage (FileSystemReader) would: it reads `.metadata` by an unrestricted
`pickle.load`, and its planner every value that is no tensor by `torch.load(weights_only=False)`; a forged file runs any
code. So the shards are safetensors (HuggingFaceStorageWriter and -Reader), whose headers are JSON, and which keep the
offsets of sharded tensors; what is no tensor is JSON in the manifest, which seals itself too.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from .processes import distributed, rank, world

MANIFEST = "manifest.json"
FORMAT = 1

#: A file is serialised in memory before it is written, which takes up to twice its size. Of 1 GiB on a 2-core machine,
#: files of 1 GiB took 1.6 GiB of memory and 9.2 s, of 256 MiB 0.24 GiB and 6.7 s, of 128 MiB 0.03 GiB and 5.0 s.
FILE_BYTES = 2**27

#: Sealed content of a manifest, and what is wrong with the checkpoint or "".
Checked = tuple[dict[str, Any], str]


def write_shards(directory: Path, tensors: dict[str, Tensor], of_one_process: Collection[str]) -> None:
    """Writes each sharded or replicated tensor once, by all processes together. Raises OSError in all of them.

    `of_one_process` are the names, of all processes, of tensors that only one of them has.
    """
    numbers = dict.fromkeys(of_one_process, 1)
    total = 0
    for key, tensor in tensors.items():
        if key not in numbers:
            numbers[key] = 1 + total // FILE_BYTES
            total += tensor.numel() * tensor.element_size() // world()
    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True, fqn_to_index_mapping=numbers)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _own_errors():
        dcp.save(tensors, storage_writer=writer, planner=planner, no_dist=not distributed())


def seals_of_own_shards(directory: Path) -> dict[str, dict[str, Any]]:
    """Seals of the files that this process has written: it reads them from memory, another would from the disk."""
    return {file.name: _seal(file) for file in directory.glob(f"shard-{rank() + 1:05d}-*")}


def read_shards(directory: Path, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fills tensors in place; `alone`: this process only. Their names and shapes must be among those stored."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = dcp.HuggingFaceStorageReader(str(directory))
    with _own_errors():
        dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=alone or not distributed())


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Writes the file that makes a checkpoint whole; it and the directory are on the disk after this."""
    sealed = json.loads(json.dumps({"format": FORMAT, **content}))  # as it is read again: keys are strings, say
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(sealed | {"sha256": _digest_of(sealed)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def checked_manifest(directory: Path) -> Checked:
    """The manifest; the files that it seals are not read."""
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        sealed = {key: value for key, value in content.items() if key != "sha256"}
        if content["sha256"] != _digest_of(sealed):
            return {}, f"{MANIFEST} is altered"
        if sealed["format"] != FORMAT:
            return {}, f"{MANIFEST} has format {sealed['format']}, expected {FORMAT}"
        # the reader takes every file that is there, so none may be there that is not sealed
        strangers = sorted({file.name for file in directory.iterdir()} - sealed["files"].keys() - {MANIFEST})
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except OSError as error:
        return {}, f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return {}, f"{MANIFEST} is altered or truncated"
    return sealed, f"{strangers[0]} is not in {MANIFEST}" if strangers else ""


def damages(directory: Path, manifest: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """What is wrong, by file, with those of the names that are not as they were sealed; they are read whole."""
    found = {name: _damage(directory / name, manifest["files"][name]) for name in names}
    return {name: damage for name, damage in found.items() if damage}


def sync_directory(path: Path) -> None:
    """Names in a directory are on the disk after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damage(file: Path, sealed: dict[str, Any]) -> str:
    try:
        size = file.stat().st_size
        if size != sealed["size"]:
            return f"has {size} bytes, expected {sealed['size']}"
        return "" if _seal(file) == sealed else "is altered: its sha256 is not the sealed one"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _seal(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, which is on the disk after this."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest_of(sealed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raises the error itself where PyTorch raises a collection of all processes' errors, no `Exception` at that."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
