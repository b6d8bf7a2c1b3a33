"""The checkpoints of a training run: whole directories `step_00001200`, put in place by one rename, or not there.

Killed anywhere, a run has its previous whole checkpoint; a damaged newest one is passed over for the one before it.
The directory must lie where all processes of the run see it. Loading executes nothing (`checkpoint_files` says how).
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from var_deploy.errors import CheckpointError

from .checkpoint_files import (
    Checked,
    checked_manifest,
    damages,
    read_shards,
    seals_of_own_shards,
    sync_directory,
    write_manifest,
    write_shards,
)
from .processes import by_first_process, merged_dicts, rank, world
from .run_state import Filling, RunState, Tensors, generators_key, saved_form

log = logging.getLogger("var_train")

# A kill leaves directories with these names: never complete; on its way out; to go back if its successor did not come.
_PARTIAL, _DELETED, _REPLACED = ".partial-", ".deleted-", ".replaced-"


class RunCheckpoints:
    """Writes, finds and thins out the checkpoints in a directory; every process of the run calls every method."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1")
        self.directory, self.keep = directory, keep
        self._damaged: set[str] = set()

    def check_space(self, checkpoint_bytes: int) -> None:
        """Refuses a place that cannot hold `keep` + the best + the one being written. Raises CheckpointError."""
        by_first_process(lambda: self._check_space(checkpoint_bytes))

    def _check_space(self, checkpoint_bytes: int) -> None:
        nearest = next(path for path in (self.directory, *self.directory.absolute().parents) if os.path.lexists(path))
        try:
            with tempfile.TemporaryFile(dir=nearest) as probe:  # permissions say nothing to root
                probe.write(b"\0")
            free = shutil.disk_usage(nearest).free
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: cannot write ({error.strerror}: {nearest}); choose another place"
            ) from error
        files = self.directory.rglob("*") if self.directory.is_dir() else []
        held = sum(file.stat().st_size for file in files if file.is_file())  # makes room as the run goes on
        needed = (self.keep + 2) * checkpoint_bytes
        if needed > free + held:
            raise CheckpointError(
                f"{self.directory}: too little disk: got {_size(free + held)} free, expected {_size(needed)} for "
                f"{self.keep + 2} checkpoints of {_size(checkpoint_bytes)}; make room or choose another place"
            )

    def save(self, step: int, state: RunState, *, score: float | None = None) -> Path:
        """Writes the checkpoint of a step, then deletes those that need not be kept. Raises CheckpointError.

        Kept are the last `keep` and the one with the lowest `score`. An error leaves all earlier ones as they are.
        """
        final = self.directory / f"step_{step:08d}"
        partial = self.directory / (_PARTIAL + final.name)
        try:
            by_first_process(lambda: self._begin(step, partial))
            tensors, record = saved_form(state, rank())
            write_shards(partial, tensors, [generators_key(number) for number in range(world())])
            files = merged_dicts(lambda: seals_of_own_shards(partial))
            sealed = {"step": step, "score": score, **record, "files": files}
            by_first_process(lambda: self._put_in_place(partial, final, sealed))
        except OSError as error:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final}: cannot write ({error.strerror or error}); earlier checkpoints are as they were; make room "
                "or choose another place"
            ) from error
        by_first_process(self._thin_out)
        return final

    def load_newest(self, state: RunState) -> int | None:
        """Fills the state from the newest whole checkpoint and returns its step; None where there is no checkpoint.

        A damaged one is named in the log, and the one before it taken. Call it before the first step, as it also
        removes what a killed run left. Raises CheckpointError where all are damaged or one does not fit the state.
        """
        names: list[str] = by_first_process(self._recover_and_list)
        for name in names:
            path = self.directory / name
            manifest, problem = _verified(path)
            if problem:
                self._damaged.add(name)
                if rank() == 0:
                    log.warning("%s is damaged (%s); falling back to the checkpoint before it", path, problem)
                continue
            try:
                filling = Filling(state, manifest, HuggingFaceStorageReader(str(path)).read_metadata(), rank())
                read_shards(path, filling.tensors)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
            filling.finish()
            if not filling.has_generators:
                log.warning("%s has no random generators of process %d, which starts with new ones", path, rank())
            return int(manifest["step"])
        if names:
            raise CheckpointError(
                f"{self.directory}: all {len(names)} checkpoints are damaged; restore one, or remove them to start over"
            )
        return None

    def _begin(self, step: int, partial: Path) -> None:
        newer = [name for name in self._steps() if _step(name) > step and name not in self._damaged]
        if newer:  # it would be taken for the newest at the next start
            raise CheckpointError(
                f"{self.directory}: got step {step} to save, expected one after {newer[0]}; continue from that, or "
                "choose another directory"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()

    def _put_in_place(self, partial: Path, final: Path, sealed: dict[str, Any]) -> None:
        missing = [name for name in sealed["files"] if not (partial / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{partial}: {missing[0]} of another process is not there; give a directory that all machines share"
            )
        write_manifest(partial, sealed)
        replaced = final.with_name(_REPLACED + final.name)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync_directory(self.directory)
        self._damaged.discard(final.name)
        shutil.rmtree(replaced, ignore_errors=True)

    def _thin_out(self) -> None:
        scores: dict[str, float | None] = {}  # of the whole ones, newest first
        for name in self._steps():
            manifest, problem = checked_manifest(self.directory / name)
            if not problem and name not in self._damaged:
                scores[name] = manifest["score"]
        kept = set(list(scores)[: self.keep])
        rated = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
        if rated:
            kept.add(min(rated, key=lambda name: rated[name]))
        for name in self._steps():
            if name in kept or (name not in scores and name not in self._damaged):
                continue
            try:
                self._delete(self.directory / name)
            except OSError as error:
                log.warning("%s: cannot delete this old checkpoint (%s)", self.directory / name, error.strerror)
        self._damaged.clear()

    def _delete(self, path: Path) -> None:
        # renamed first: a kill half-way leaves no checkpoint with files missing
        deleted = path.with_name(_DELETED + path.name)
        path.rename(deleted)
        shutil.rmtree(deleted)

    def _recover_and_list(self) -> list[str]:
        for replaced in self.directory.glob(f"{_REPLACED}*"):
            final = self.directory / replaced.name.removeprefix(_REPLACED)
            if not final.exists():
                replaced.rename(final)
        for prefix in (_PARTIAL, _DELETED, _REPLACED):
            for leftover in self.directory.glob(f"{prefix}*"):
                log.info("%s: removing what a killed run left", leftover)
                shutil.rmtree(leftover)
        return self._steps()

    def _steps(self) -> list[str]:
        return _steps_in(self.directory)


def weights(checkpoint: Path, *prefixes: str) -> Tensors:
    """Tensors of a checkpoint whose names start with "ema." or "models.NAME.", without that; whole, on the CPU.

    Of several prefixes the first that has a tensor of a name gives it. For one process alone, whatever number of them
    saved it. Raises CheckpointError.
    """
    manifest = manifest_of(checkpoint)
    if problem := _listed(damages(checkpoint, manifest, manifest["files"])):
        raise _damaged(checkpoint, problem)
    stored = stored_tensors(checkpoint)
    chosen: dict[str, str] = {}  # stored name by the name without prefix
    for prefix in prefixes:
        for key in stored:
            if key.startswith(prefix):
                chosen.setdefault(key.removeprefix(prefix), key)
    if not chosen:
        known = sorted({f"models.{key.split('.')[1]}." for key in stored if key.startswith("models.")} | {"ema."})
        asked = " or ".join(map(repr, prefixes))
        raise CheckpointError(f"{checkpoint}: holds nothing under {asked}; known: {', '.join(known)}")
    tensors = {key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype) for key in chosen.values()}
    read_shards(checkpoint, tensors, alone=True)
    return {name: tensors[key] for name, key in chosen.items()}


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; its other files are not read. Raises CheckpointError."""
    manifest, problem = checked_manifest(checkpoint)
    if not problem:
        problem = _listed({name: "is missing" for name in manifest["files"] if not (checkpoint / name).is_file()})
    if problem:
        raise _damaged(checkpoint, problem)
    return manifest


def stored_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and type of every tensor of a checkpoint by its name, from headers alone: no digest is compared.

    Raises CheckpointError.
    """
    manifest_of(checkpoint)
    try:
        stored: dict[str, Any] = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(checkpoint, " ".join(str(error).split())) from error
    return stored


def newest_of(directory: Path) -> Path | None:
    """The checkpoint of the largest step in a directory, whole or not; None where there is none."""
    names = _steps_in(directory)
    return directory / names[0] if names else None


def _damaged(checkpoint: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint}: damaged ({problem}); take another checkpoint of the run")


def _steps_in(directory: Path) -> list[str]:
    """Names of all checkpoints, newest first."""
    names = [path.name for path in directory.glob("step_*") if re.fullmatch(r"step_[0-9]{8,}", path.name)]
    return sorted(names, key=_step, reverse=True)


def _verified(path: Path) -> Checked:
    """Manifest and what is wrong with a checkpoint, the same in all processes, which share the reading of its files."""
    manifest, problem = by_first_process(lambda: checked_manifest(path))
    if not problem and manifest["step"] != _step(path.name):
        problem = f"its manifest is of step {manifest['step']}"
    if not problem:
        names = sorted(manifest["files"])[rank() :: world()]
        problem = _listed(merged_dicts(lambda: damages(path, manifest, names)))
    return manifest, problem


def _listed(problems: dict[str, str]) -> str:
    return "; ".join(f"{name} {what}" for name, what in sorted(problems.items()))


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
