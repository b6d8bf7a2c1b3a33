"""weights.safetensors as arrays over the mapped file: nothing is read before it is used, and processes share the pages.

The safetensors library copies. The format is a length of 8 bytes, a JSON header and the bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from .errors import BundleError

_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "I64": "int64"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I64": 8}


def mapped_weights(path: Path) -> dict[str, np.ndarray]:
    """Read-only arrays by name; tensors of types that NumPy does not have are left out. Raises BundleError."""
    return {
        name: values.view(dtype).reshape(shape).view(np.ndarray)
        for name, (dtype, shape, values) in weight_bytes(path).items()
        if dtype != "bfloat16"
    }


def weight_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], np.ndarray]]:
    """Type, shape and read-only bytes (uint8) of every tensor by name. Raises BundleError."""
    try:
        data = np.memmap(path, mode="r")
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        entries = json.loads(data[8:begin].tobytes())
        found = {}
        for name, entry in entries.items():
            if name != "__metadata__" and entry["dtype"] in _NAMES:
                first, last = entry["data_offsets"]
                shape = tuple(int(side) for side in entry["shape"])
                found[name] = _NAMES[entry["dtype"]], shape, data[begin + first : begin + last]
                if (size := math.prod(shape) * _BYTES[entry["dtype"]]) != last - first:
                    raise ValueError(f"{name} has {last - first} bytes, expected {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: not a readable weights file ({error}); copy or export the bundle again") from error
    return found
