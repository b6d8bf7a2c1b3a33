"""weights.safetensors as arrays over the mapped file: nothing is read before it is used, and processes share the pages.

The safetensors library copies. The format is a length of 8 bytes, a JSON header and the bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .errors import BundleError

_DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8}


def mapped_weights(path: Path) -> dict[str, np.ndarray]:
    """Read-only arrays by name; tensors of types that NumPy does not have are left out. Raises BundleError."""
    try:
        data = np.memmap(path, mode="r")
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        entries = json.loads(data[8:begin].tobytes())
        found = {}
        for name, entry in entries.items():
            if name != "__metadata__" and entry["dtype"] in _DTYPES:
                first, last = entry["data_offsets"]
                values = data[begin + first : begin + last].view(_DTYPES[entry["dtype"]])
                found[name] = values.reshape(entry["shape"]).view(np.ndarray)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: not a readable weights file ({error}); copy or export the bundle again") from error
    return found
