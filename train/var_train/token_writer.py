"""Images → their token pyramids on the disk, several crops of each, by a frozen VQVAE; `token_files` reads them.

All is written to a hidden folder beside the final one, which gets its name when all is there. A shard is put in place
whole and says by which plan it was made, so a run that was killed goes on with the shards that it lacks.
Axes: n images of a shard, L tokens of an image, B images of a batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from var_deploy.config import require
from var_deploy.errors import DataError

from .checkpoint_files import sync_directory
from .image_data import Crop, ImageBatch, evaluation_batches
from .image_files import ImageFiles
from .pictures import normalised
from .processes import by_first_process, merged_dicts, rank, world
from .token_files import mapped_shard, read_header, seal_of
from .token_manifest import LABEL_TYPE, MALFORMED, MANIFEST, Seal, TokenManifest, TokenPlan, shard_name
from .vqvae import VQVAE

log = logging.getLogger("var_train")

_PARTIAL = ".partial-"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSummary:
    """What was stored."""

    images: int
    passes: int
    shards: int
    bytes: int  #: of all shards
    corrupt: tuple[str, ...]  #: names of images that could not be decoded; the next one that can stands for them


@dataclass(frozen=True, slots=True)
class _Shard:
    """One that is whole on the disk."""

    seal: Seal
    corrupt: tuple[str, ...]


def store_tokens(
    images: ImageFiles,
    vqvae: VQVAE,
    out: Path,
    *,
    crop: Crop,
    passes: int,
    batch: int,
    workers: int,
    seed: int,
    vqvae_sha256: str,
    device: torch.device,
    on_progress: Callable[[int], None] | None = None,
    shard_images: int = 8192,
) -> TokenSummary:
    """Encodes every image `passes` times; pass p has the crops that training with `seed` takes in epoch p.

    Every process of a run calls this, and gets the summary. The VQVAE is moved to `device` and left in evaluation mode.
    `on_progress` hears how many images more this process has done, first those of shards that are there already.
    Raises DataError, ConfigError.
    """
    plan = TokenPlan(
        config=vqvae.config,
        vqvae_sha256=vqvae_sha256,
        class_names=images.class_names,
        images=len(images),
        passes=passes,
        seed=seed,
        crop=crop,
        shard_images=shard_images,
    )
    require(type(batch) is int and batch > 0, "batch", batch, "a positive integer")
    store = _Store(plan, out, by_first_process(lambda: _origin(images)))
    by_first_process(store.begin)
    done = merged_dicts(lambda: store.whole_shards(range(rank(), plan.shards, world())))
    by_first_process(lambda: store.make_room(done))

    encoder = vqvae.to(device=device, dtype=torch.float32).eval()
    progress = on_progress or (lambda _: None)
    for number in range(rank(), plan.shards, world()):
        if shard_name(number) in done:
            _, begin, end = plan.span(number)
            progress(end - begin)

    def encoded(number: int) -> dict[str, _Shard]:
        if number >= plan.shards or shard_name(number) in done:
            return {}
        epoch, begin, end = plan.span(number)
        stream = evaluation_batches(images, crop, batch, workers=workers, seed=seed, epoch=epoch, span=(begin, end))
        content = _encoded(stream, encoder, device, plan.token_type, progress)
        return {shard_name(number): store.write_shard(number, *content)}

    # All wait for one another after each shard: longer, and the process group would give up waiting.
    for first in range(0, plan.shards, world()):
        if any(shard_name(n) not in done for n in range(first, min(first + world(), plan.shards))):
            done |= merged_dicts(partial(encoded, first + rank()))
    return by_first_process(lambda: store.finish(done))


@torch.no_grad()
def _encoded(
    stream: Iterator[ImageBatch],
    encoder: VQVAE,
    device: torch.device,
    token_type: np.dtype,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Tokens [n, L] and labels [n] of all images of a stream, and the names of the corrupt ones."""
    tokens, labels = [], []
    corrupt: list[str] = []
    for images in stream:
        with torch.autocast(device.type, enabled=False):
            tokens_BL = torch.cat(encoder.tokens(normalised(images.images_BCRR, device)), dim=1)
        tokens.append(tokens_BL.cpu().numpy().astype(token_type))
        labels.append(images.labels_B.numpy().astype(LABEL_TYPE))
        corrupt += images.corrupt
        progress(len(images.labels_B))
    return np.concatenate(tokens), np.concatenate(labels), tuple(dict.fromkeys(corrupt))


class _Store:
    """The folder in the making."""

    def __init__(self, plan: TokenPlan, out: Path, origin: str) -> None:
        self._plan, self._out = plan, out
        self._folder = out.parent / (_PARTIAL + out.name)
        #: Stands in every shard; what another plan has made is not taken.
        self._record = json.dumps({**plan.to_dict(), "data": origin}, sort_keys=True)

    def begin(self) -> None:
        """Refuses a place that is taken, and removes what cannot be gone on with."""
        if os.path.lexists(self._out):
            raise DataError(f"{self._out}: exists, expected a new name; choose another, or remove it")
        with self._writing():
            differing = self._differing()
            if differing:
                log.warning(
                    "%s: what an earlier run left has another plan (%s); starting over",
                    self._folder,
                    ", ".join(differing),
                )
                shutil.rmtree(self._folder)
            for leftover in self._folder.glob(f"{_PARTIAL}*"):
                leftover.unlink()

    def whole_shards(self, numbers: Iterable[int]) -> dict[str, _Shard]:
        """Those of the numbers that an earlier run has put in place, read whole and compared with their digests."""
        found = {}
        for number in numbers:
            file = self._folder / shard_name(number)
            if file.exists():
                try:
                    found[file.name] = self._checked(file, number)
                except (DataError, *MALFORMED) as error:
                    log.warning("%s is damaged, its images are encoded again (%s)", file, error)
        return found

    def make_room(self, done: dict[str, _Shard]) -> None:
        """Refuses a disk that cannot hold what is still to be written."""
        if done:
            log.info("%s: going on after an earlier run; %d of %d shards", self._folder, len(done), self._plan.shards)
        to_do = (number for number in range(self._plan.shards) if shard_name(number) not in done)
        needed = sum(self._plan.data_bytes(number) for number in to_do)
        nearest = next(path for path in (self._folder, *self._folder.absolute().parents) if os.path.lexists(path))
        with self._writing():
            with tempfile.TemporaryFile(dir=nearest) as probe:  # permissions say nothing to root
                probe.write(b"\0")
            free = shutil.disk_usage(nearest).free
            if needed > free:
                raise DataError(
                    f"{self._out}: too little disk: got {free / 2**20:.2f} MiB free, expected "
                    f"{needed / 2**20:.2f} MiB; make room or choose another place"
                )
            self._folder.mkdir(parents=True, exist_ok=True)

    def write_shard(self, number: int, tokens_nL: np.ndarray, labels_n: np.ndarray, corrupt: tuple[str, ...]) -> _Shard:
        named = json.dumps(corrupt)
        metadata = {"plan": self._record, "corrupt": named, "sha256": _digest(tokens_nL, labels_n, named)}
        # By hand, as safetensors' own writer gives metadata in another order each time.
        header = json.dumps({"__metadata__": metadata, **self._plan.tensors(number)}).encode()
        header += b" " * (-len(header) % 8)
        content = b"".join((len(header).to_bytes(8, "little"), header, labels_n.tobytes(), tokens_nL.tobytes()))
        self._put_in_place(shard_name(number), content)
        return _Shard(Seal(size=len(content), sha256=hashlib.sha256(content).hexdigest()), corrupt)

    def finish(self, done: dict[str, _Shard]) -> TokenSummary:
        """Seals all shards, and gives the folder its name."""
        shards = [done[shard_name(number)] for number in range(self._plan.shards)]
        missing = [name for name in sorted(done) if not (self._folder / name).is_file()]
        if missing:
            raise DataError(
                f"{self._folder}: {missing[0]} of another process is not there; give a folder that all machines share"
            )
        corrupt = tuple(dict.fromkeys(name for shard in shards for name in shard.corrupt))
        seals = tuple(shard.seal for shard in shards)
        manifest = TokenManifest(plan=self._plan, corrupt=corrupt, seals=seals)
        self._put_in_place(MANIFEST, manifest.to_json().encode())
        with self._writing():
            self._folder.rename(self._out)
            sync_directory(self._out.parent)
        return TokenSummary(
            images=self._plan.images,
            passes=self._plan.passes,
            shards=len(shards),
            bytes=sum(seal.size for seal in seals),
            corrupt=corrupt,
        )

    def _differing(self) -> list[str]:
        """What the plan of a shard that is there says otherwise than ours."""
        ours = json.loads(self._record)
        for file in sorted(self._folder.glob(shard_name(0).replace("00000", "*"))):
            try:
                theirs: dict[str, Any] = json.loads(read_header(file).metadata["plan"])
                differing = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
            except (DataError, *MALFORMED):
                continue  # damaged, which is seen to later
            if differing:
                return differing
        return []

    def _checked(self, file: Path, number: int) -> _Shard:
        """Raises DataError or one of MALFORMED."""
        metadata = read_header(file).metadata
        tokens_nL, labels_n = mapped_shard(file, self._plan, number)
        if metadata["plan"] != self._record or metadata["sha256"] != _digest(tokens_nL, labels_n, metadata["corrupt"]):
            raise DataError("its sha256 is not that of its content")
        return _Shard(seal_of(file), tuple(json.loads(metadata["corrupt"])))

    def _put_in_place(self, name: str, content: bytes) -> None:
        """A file of the folder, whole and on the disk after this, or not there."""
        path = self._folder / name
        unfinished = path.with_name(_PARTIAL + name)
        with self._writing():
            try:
                with unfinished.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                unfinished.replace(path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise
            sync_directory(self._folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._out}: cannot write ({error.strerror or error}); make room or choose another place, then start "
                "again, which goes on from the shards that are whole"
            ) from error


def _origin(images: ImageFiles) -> str:
    """Digest that tells data sets apart: all labels, and where the first and the last image come from."""
    ends = [os.path.abspath(images.name(index)) for index in (0, len(images) - 1)]
    return hashlib.sha256(images.labels_N.astype("<i8").tobytes() + json.dumps(ends).encode()).hexdigest()


def _digest(tokens_nL: np.ndarray, labels_n: np.ndarray, corrupt: str) -> str:
    """Of what a shard holds, whatever its header looks like."""
    digest = hashlib.sha256(json.dumps([tokens_nL.dtype.str, tokens_nL.shape, corrupt]).encode())
    for values in (tokens_nL, labels_n):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
