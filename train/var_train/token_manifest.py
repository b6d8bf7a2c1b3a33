"""What a folder of stored tokens holds, as data: the plan by which it was made, and `tokens.json`, which seals it.

Tokens are stored in passes: a pass has one crop of every image. A pass is divided into shards, and shards are numbered
through all passes. Axes: n images of a shard, L tokens of an image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from var_deploy.config import ConfigError, VQVAEConfig, config_from_dict, config_to_dict, require
from var_deploy.errors import DataError

from .image_data import Crop

MANIFEST = "tokens.json"
FORMAT = 1

AGAIN = "fetch or store the tokens again"

#: What a parser meets in JSON of any other shape.
MALFORMED = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)

LABEL_TYPE = np.dtype("<i4")

#: How safetensors names the types that tokens and labels have.
_NAMES = {np.dtype("<u2"): "U16", np.dtype("<i4"): "I32"}


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPlan:
    """What is stored, and how it is divided. Pass p has the crops that training with this seed takes in epoch p."""

    config: VQVAEConfig
    vqvae_sha256: str
    class_names: tuple[str, ...]
    images: int
    passes: int
    seed: int
    crop: Crop
    shard_images: int  #: the last shard of a pass may have fewer

    def __post_init__(self) -> None:
        for field in ("images", "passes", "shard_images"):
            value = getattr(self, field)
            require(type(value) is int and value > 0, field, value, "a positive integer")
        require(_is_digest(self.vqvae_sha256), "vqvae_sha256", self.vqvae_sha256, "64 hexadecimal digits")
        require(bool(self.class_names), "class_names", self.class_names, "at least one")
        _require_texts(self.class_names, "class_names")
        ok = type(self.seed) is int and 0 <= self.seed < 2**64
        require(ok, "seed", self.seed, "an integer from 0 to 2^64 - 1")
        crop, side = self.crop, self.config.image_size
        require(type(crop.side) is int and crop.side == side, "crop.side", crop.side, f"{side}, as the VQVAE takes")
        for field in ("random", "flip"):
            value = getattr(crop, field)
            require(isinstance(value, bool), f"crop.{field}", value, "true or false")
        ok = type(crop.enlarge) in (int, float) and math.isfinite(crop.enlarge) and crop.enlarge >= 1
        require(ok, "crop.enlarge", crop.enlarge, "a number of at least 1")

    @property
    def shards_per_pass(self) -> int:
        return -(-self.images // self.shard_images)

    @property
    def shards(self) -> int:
        return self.passes * self.shards_per_pass

    def span(self, number: int) -> tuple[int, int, int]:
        """(pass, first image, one past the last) of a shard."""
        place, position = divmod(number, self.shards_per_pass)
        begin = position * self.shard_images
        return place, begin, min(begin + self.shard_images, self.images)

    @property
    def token_type(self) -> np.dtype:
        return np.dtype("<u2") if self.config.vocab_size <= 2**16 else np.dtype("<i4")

    def tensors(self, number: int) -> dict[str, dict[str, Any]]:
        """A shard's tensors, as the header of its file has to describe them, and in the order of safetensors."""
        _, begin, end = self.span(number)
        count, length = end - begin, self.config.num_tokens
        labels_end = count * LABEL_TYPE.itemsize
        tokens_end = labels_end + count * length * self.token_type.itemsize
        labels = {"dtype": _NAMES[LABEL_TYPE], "shape": [count], "data_offsets": [0, labels_end]}
        tokens = {"dtype": _NAMES[self.token_type], "shape": [count, length], "data_offsets": [labels_end, tokens_end]}
        return {"labels": labels, "tokens": tokens}

    def data_bytes(self, number: int) -> int:
        """Size of a shard's file without its header."""
        return int(self.tensors(number)["tokens"]["data_offsets"][1])

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "config"}
        plain = {"class_names": list(self.class_names), "crop": dataclasses.asdict(self.crop)}
        return {"vqvae": config_to_dict(self.config), **fields, **plain}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TokenPlan:
        """Raises ConfigError, or one of MALFORMED."""
        _require_texts(data["class_names"], "class_names")
        fields = {key: value for key, value in data.items() if key != "vqvae"}
        plain = {"class_names": tuple(data["class_names"]), "crop": Crop(**data["crop"])}
        return cls(config=config_from_dict(VQVAEConfig, data["vqvae"]), **fields | plain)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seal:
    """Size in bytes and sha256 of a file."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        require(type(self.size) is int and self.size >= 0, "size", self.size, "a number of bytes")
        require(_is_digest(self.sha256), "sha256", self.sha256, "64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenManifest:
    """tokens.json as data."""

    plan: TokenPlan
    corrupt: tuple[str, ...]  #: names of images that could not be decoded; the next one that can stands for them
    seals: tuple[Seal, ...]  #: of every shard

    def to_json(self) -> str:
        """Text that ends in the sha256 of what it says."""
        files = {shard_name(number): dataclasses.asdict(seal) for number, seal in enumerate(self.seals)}
        sealed = {"format": FORMAT, **self.plan.to_dict(), "corrupt": list(self.corrupt), "files": files}
        return json.dumps({**sealed, "sha256": _digest_of(sealed)}, indent=1) + "\n"


def read_manifest(folder: Path) -> TokenManifest:
    """tokens.json, all of it checked; the files that it seals are not read. Raises DataError."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
        sealed = {key: value for key, value in data.items() if key != "sha256"}
        if data["sha256"] != _digest_of(sealed):
            raise DataError(f"{path}: altered: its sha256 is not that of its content; {AGAIN}")
        require(type(sealed["format"]) is int and sealed["format"] == FORMAT, "format", sealed["format"], f"{FORMAT}")
        plan = TokenPlan.from_dict({k: v for k, v in sealed.items() if k not in ("format", "corrupt", "files")})
        corrupt, files = sealed["corrupt"], sealed["files"]
        _require_texts(corrupt, "corrupt")
        require(len(files) == plan.shards, "files", len(files), f"{plan.shards}, one for each shard")
        seals = tuple(Seal(**files[shard_name(number)]) for number in range(plan.shards))
        return TokenManifest(plan=plan, corrupt=tuple(corrupt), seals=seals)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a folder of stored tokens") from error
    except ConfigError as error:
        raise DataError(f"{path}: {error}; {AGAIN}") from error
    except MALFORMED as error:
        raise DataError(f"{path}: altered or truncated ({type(error).__name__}); {AGAIN}") from error


def _digest_of(sealed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _require_texts(values: object, field: str) -> None:
    require(isinstance(values, list | tuple), field, type(values).__name__, "a list of texts")
    assert isinstance(values, list | tuple)
    for value in values:
        require(isinstance(value, str), field, value, "texts")
