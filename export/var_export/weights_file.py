"""weights.safetensors, written as a stream: one tensor in memory at a time, every offset known beforehand.

The safetensors library wants all tensors in memory at once, twice over; a d30 would need 24 GB. Its format is a
length, a JSON header and the bytes, which is all there is here. The header is padded so that the data begins on a page
and, with the tensors whose size is a multiple of 64 bytes first, every large tensor is aligned for memory-mapped use;
the others follow from wide elements to narrow ones, each aligned to its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from var_deploy.bundle import WEIGHTS
from var_deploy.errors import BundleError

from .deploy_view import LazyWeight

PAGE = 4096
ALIGNMENT = 64

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Where a tensor lies in the file: byte offset from the file's start, length in bytes."""

    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    file: str = WEIGHTS


@dataclass(frozen=True, slots=True)
class WeightsLayout:
    """Header bytes and slots, in file order."""

    header: bytes
    slots: dict[str, WeightSlot]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(slot.length for slot in self.slots.values())


def weights_layout(weights: dict[str, LazyWeight]) -> WeightsLayout:
    """Places every tensor; the same weights always get the same layout."""
    names = sorted(weights, key=lambda name: (weights[name].nbytes % ALIGNMENT != 0, -weights[name].itemsize))  # stable
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name in names:
        begin, end = end, end + weights[name].nbytes
        dtype = _DTYPES[weights[name].dtype]
        entries[name] = {"dtype": dtype, "shape": list(weights[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    header = len(text).to_bytes(8, "little") + text
    slots = {}
    for name in names:
        begin, end = entries[name]["data_offsets"]
        slots[name] = WeightSlot(len(header) + begin, end - begin, weights[name].shape, weights[name].dtype)
    return WeightsLayout(header, slots)


def read_layout(path: Path) -> WeightsLayout:
    """The layout of a file as `write_weights` wrote it. Raises BundleError."""
    known = {name: dtype for dtype, name in _DTYPES.items()}
    try:
        with path.open("rb") as file:
            length = file.read(8)
            header = length + file.read(min(int.from_bytes(length, "little"), path.stat().st_size))
        if len(header) != 8 + int.from_bytes(length, "little"):
            raise ValueError("it is longer than the file")
        slots = {}
        for name, entry in json.loads(header[8:]).items():
            begin, end = entry["data_offsets"]
            slots[name] = WeightSlot(len(header) + begin, end - begin, tuple(entry["shape"]), known[entry["dtype"]])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{path}: its header cannot be read ({error!r}); export the bundle again") from error
    return WeightsLayout(header, slots)


def write_weights(
    path: Path,
    weights: dict[str, LazyWeight],
    layout: WeightsLayout,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> str:
    """Writes the file and returns its sha256; `on_bytes` hears of every chunk written."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        file.write(layout.header)
        digest.update(layout.header)
        for name in layout.slots:
            data = weights[name].numpy().reshape(-1).view(np.uint8).data
            file.write(data)
            digest.update(data)
            on_bytes(len(data))
    return digest.hexdigest()
