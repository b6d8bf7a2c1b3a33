"""Stored token pyramids as training data: tokens and labels of any images, without decoding or encoding one.

A folder holds `tokens.json` and `shard_00000.safetensors` …, each with `tokens` [n, L] (uint16, or int32 for more than
65,536 codes) and `labels` [n] (int32) of images that follow one another in one pass. Shards are mapped, so a data set
may be larger than memory. Axes: N images of the data set, B of a batch, n of a shard, L tokens of an image.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_deploy.errors import DataError

from .image_data import GlobalBatches
from .token_manifest import (
    AGAIN,
    LABEL_TYPE,
    MALFORMED,
    MANIFEST,
    Seal,
    TokenManifest,
    TokenPlan,
    read_manifest,
    shard_name,
)

log = logging.getLogger("var_train")

#: Shards of up to this size together are read whole at opening, against their sha256. One pass over ImageNet in 680
#: tokens is 1.6 GiB, which took 2.1 s on two busy cores with the files in memory. Of more, sizes and headers are
#: checked, and the range of whatever is read.
VERIFIED_BYTES = 2**31

#: Shards that are mapped at a time; each holds a file open, of which a process may commonly have 1024.
MAPPED = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardHeader:
    """The JSON at the beginning of a shard, and the span of the data behind it in the file."""

    tensors: dict[str, Any]
    metadata: dict[str, Any]
    begin: int
    end: int


def read_header(file: Path) -> ShardHeader:
    """What it says is not checked. Raises DataError."""
    try:
        with file.open("rb") as stream:
            end = os.fstat(stream.fileno()).st_size
            begin = 8 + int.from_bytes(stream.read(8), "little")
            tensors = json.loads(stream.read(begin - 8) if begin <= end else b"")
        metadata = dict(tensors.pop("__metadata__", {}))
        return ShardHeader(tensors=tensors, metadata=metadata, begin=begin, end=end)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {AGAIN}") from error
    except MALFORMED as error:
        raise DataError(f"{file}: no safetensors header; {AGAIN}") from error


def mapped_shard(file: Path, plan: TokenPlan, number: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [n, L] and labels [n] of a shard that is as planned; the numbers are read when used. Raises DataError."""
    header, expected = read_header(file), plan.tensors(number)
    if header.tensors != expected:
        raise DataError(f"{file}: got {_in_short(header.tensors)}, expected {_in_short(expected)}; {AGAIN}")
    size = header.begin + plan.data_bytes(number)
    if header.end != size:
        raise DataError(f"{file}: got {header.end} bytes, expected {size}; {AGAIN}")
    try:
        content = np.memmap(file, np.uint8, mode="r")
        tokens_nL, labels_n = (
            np.ndarray(form["shape"], dtype, content, header.begin + form["data_offsets"][0])
            for form, dtype in ((expected["tokens"], plan.token_type), (expected["labels"], LABEL_TYPE))
        )
    except (OSError, ValueError, TypeError) as error:  # too many files, or it has changed since
        raise DataError(f"{file}: cannot be mapped ({error}); {AGAIN}") from error
    return tokens_nL, labels_n


def seal_of(file: Path) -> Seal:
    """Raises DataError."""
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return Seal(size=os.fstat(stream.fileno()).st_size, sha256=digest)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {AGAIN}") from error


class TokenFiles:
    """Tokens and labels of a data set's images; `open_tokens` makes it, of files that it has checked."""

    def __init__(self, path: Path, manifest: TokenManifest) -> None:
        self._path, self._plan = path, manifest.plan
        self.config, self.class_names = self._plan.config, self._plan.class_names
        self.passes, self.seed, self.crop = self._plan.passes, self._plan.seed, self._plan.crop
        self.vqvae_sha256, self.corrupt = self._plan.vqvae_sha256, manifest.corrupt
        self._mapped = lru_cache(maxsize=MAPPED)(self._map)
        labels_N = np.concatenate([self._map(number)[1] for number in range(self._plan.shards_per_pass)])
        #: int64, of the first pass; others differ only where an image could be read in one and not in another.
        self.labels_N = labels_N.astype(np.int64)
        self._refuse(self.labels_N, len(self.class_names), "label", np.arange(len(self)), 0)

    def __len__(self) -> int:
        return self._plan.images

    def name(self, index: int) -> str:
        """Where the tokens come from, for people."""
        return f"tokens {self._path}: image {index}"

    def read(self, epoch: int, indices_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens and labels of images in pass epoch mod passes: int64 [B, L], int64 [B]. Raises DataError."""
        if indices_B.size and not 0 <= indices_B.min() <= indices_B.max() < len(self):
            raise IndexError(f"got images {indices_B.min()} to {indices_B.max()}, expected 0 to {len(self) - 1}")
        tokens_BL = np.empty((len(indices_B), self.config.num_tokens), np.int64)
        labels_B = np.empty(len(indices_B), np.int64)
        first_shard = epoch % self.passes * self._plan.shards_per_pass
        shards_B, rows_B = np.divmod(indices_B, self._plan.shard_images)
        for shard in np.unique(shards_B).tolist():
            tokens_nL, labels_n = self._mapped(first_shard + shard)
            of_it_B = shards_B == shard
            tokens_BL[of_it_B], labels_B[of_it_B] = tokens_nL[rows_B[of_it_B]], labels_n[rows_B[of_it_B]]
        self._refuse(tokens_BL, self.config.vocab_size, "token", indices_B, first_shard)
        self._refuse(labels_B, len(self.class_names), "label", indices_B, first_shard)
        return torch.from_numpy(tokens_BL), torch.from_numpy(labels_B)

    def _map(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return mapped_shard(self._path / shard_name(number), self._plan, number)

    def _refuse(self, values: np.ndarray, count: int, kind: str, indices_B: np.ndarray, first_shard: int) -> None:
        """DataError for the first value outside 0 … count − 1; the first axis is images."""
        wrong = np.argwhere((values < 0) | (values >= count))
        if len(wrong):
            index = int(indices_B[wrong[0, 0]])
            raise DataError(
                f"{self.name(index)}: got {kind} {values[tuple(wrong[0])]}, expected 0 to {count - 1}: "
                f"{shard_name(first_shard + index // self._plan.shard_images)} is damaged; {AGAIN}"
            )


def is_token_folder(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def open_tokens(path: Path) -> TokenFiles:
    """Checks tokens.json, size and header of every shard and, up to VERIFIED_BYTES, its sha256. Raises DataError."""
    manifest = read_manifest(path)
    total = sum(seal.size for seal in manifest.seals)
    if total > VERIFIED_BYTES:
        log.info("%s: %.1f GiB of tokens; not read now to compare with their sha256", path, total / 2**30)
    for number, seal in enumerate(manifest.seals):
        file = path / shard_name(number)
        mapped_shard(file, manifest.plan, number)
        found = seal_of(file) if total <= VERIFIED_BYTES else Seal(size=read_header(file).end, sha256=seal.sha256)
        if found.size != seal.size:
            raise DataError(f"{file}: got {found.size} bytes, expected {seal.size}; {AGAIN}")
        if found != seal:
            raise DataError(f"{file}: altered: its sha256 is not the sealed one; {AGAIN}")
    return TokenFiles(path, manifest)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """What one process takes of an iteration."""

    tokens_BL: Tensor  #: int64
    labels_B: Tensor  #: int64
    iteration: int
    epoch: int


def token_batches(tokens: TokenFiles, batches: GlobalBatches, *, rows: slice, start: int) -> Iterator[TokenBatch]:
    """Endless, from iteration `start` on: the images that `training_batches` takes with the same arguments.

    In the first `passes` epochs they are the crops too that it takes with the seed of the tokens. Raises DataError.
    """
    if batches.count != len(tokens):
        raise ValueError(f"batches: got {batches.count} images, expected {len(tokens)}")

    def batch(iteration: int) -> TokenBatch:
        epoch, indices_B = batches.indices(iteration)
        tokens_BL, labels_B = tokens.read(epoch, indices_B[rows])
        return TokenBatch(tokens_BL=tokens_BL, labels_B=labels_B, iteration=iteration, epoch=epoch)

    return map(batch, itertools.count(start))


def _in_short(tensors: dict[str, Any]) -> str:
    """On one line, whatever a header said."""
    text = json.dumps(tensors).replace('"', "")
    return text if len(text) <= 200 else text[:197] + "..."
