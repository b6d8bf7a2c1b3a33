"""Compiled kernels that turn logits into codes: written as files where Triton is, loaded and launched without it.

A directory holds `kernels.json`, which says what each kernel takes, and machine code for one compute capability.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import weakref
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...bundle import Manifest
from ...errors import EngineError
from .device import Device

KERNELS = "kernels.json"

_CTYPES = {"pointer": ctypes.c_void_p, "i32": ctypes.c_int32, "fp32": ctypes.c_float}

#: Shared memory of a block, in bytes, beyond which a kernel has to be told.
_PLAIN_SHARED = 48 * 1024


def write_draw_kernels(directory: Path, manifest: Manifest, capability: tuple[int, int]) -> None:
    """Compiles the kernels for a bundle's sizes into an existing, empty directory; needs torch and Triton, no GPU.

    Raises EngineError where they are missing or Triton is told to interpret.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise EngineError("TRITON_INTERPRET is set, so no kernel can be compiled; unset it")
    try:
        import triton

        from var_kernels.ahead_of_time import SPARE_POINTERS, draw_kernels
    except ImportError as error:
        raise EngineError(f"kernels of the draw need triton ({error}): pip install 'var-deploy[gpu]'") from error
    sizes = _sizes(manifest)
    entries = {}
    for name, kernel in draw_kernels(**sizes, capability=10 * capability[0] + capability[1]).items():
        (directory / f"{name}.cubin").write_bytes(kernel.cubin)
        entries[name] = {
            "sha256": hashlib.sha256(kernel.cubin).hexdigest(),
            "entry": kernel.entry,
            "arguments": kernel.arguments,
            "spare_pointers": SPARE_POINTERS,
            "threads": kernel.threads,
            "shared_bytes": kernel.shared_bytes,
        }
    record = {
        "capability": list(capability),
        **sizes,
        "triton": triton.__version__,
        "source": kernel_source(),
        "kernels": entries,
    }
    (directory / KERNELS).write_text(json.dumps(record, indent=1))


def _sizes(manifest: Manifest) -> dict[str, int]:
    """What the kernels are compiled for, as `draw_kernels` calls it."""
    var = manifest.var
    return {"vocab_size": var.vocab_size, "code_width": var.z_channels, "num_tokens": var.num_tokens}


@dataclass(frozen=True, slots=True, eq=False)
class _Kernel:
    function: Any
    types: dict[str, str]  # of the arguments, in order
    spare_pointers: int
    threads: int
    shared_bytes: int


def _known(kind: str) -> str:
    """The type of an argument. Raises ValueError: one left out would move all that follow."""
    if kind not in _CTYPES:
        raise ValueError(f"an argument is a {kind}, known: {', '.join(_CTYPES)}")
    return kind


def kernels_are_whole(directory: Path) -> bool:
    """Whether kernels are there as they were compiled, and of the source that is installed."""
    try:
        record = json.loads((directory / KERNELS).read_text())
        entries = record["kernels"].items()
        return record["source"] == kernel_source() and all(
            hashlib.sha256((directory / f"{name}.cubin").read_bytes()).hexdigest() == entry["sha256"]
            for name, entry in entries
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def kernel_source() -> str:
    """Digest of the files that kernels are compiled from, found without loading them."""
    spec = find_spec("var_kernels")
    digest = hashlib.sha256()
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for path in sorted(Path(folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Kernels:
    """The kernels of a directory on a device."""

    def __init__(self, device: Device, directory: Path, manifest: Manifest, remedy: str) -> None:
        """remedy: what to do about those that are damaged, or of other sizes or another GPU. Raises EngineError."""
        from cuda.bindings import driver

        self._driver, self._stream, self._remedy = driver, driver.CUstream(device.stream), remedy
        self._kernels: dict[str, _Kernel] = {}
        path = directory / KERNELS
        expected = {"capability": list(device.gpu.capability), **_sizes(manifest)}
        try:
            record = json.loads(path.read_text())
            found = {key: record.get(key) for key in expected}
            if found != expected:
                raise EngineError(f"{path}: for {found}, expected {expected}; {remedy}")
            for name, entry in record["kernels"].items():
                cubin = (directory / f"{name}.cubin").read_bytes()
                if hashlib.sha256(cubin).hexdigest() != entry["sha256"]:
                    raise EngineError(f"{directory / name}.cubin: has changed; {remedy}")
                self._kernels[name] = _Kernel(
                    self._loaded(cubin, entry["entry"], entry["shared_bytes"]),
                    {argument: _known(kind) for argument, kind in entry["arguments"]},
                    int(entry["spare_pointers"]),
                    int(entry["threads"]),
                    int(entry["shared_bytes"]),
                )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EngineError(f"{path}: cannot be used ({error}); {remedy}") from error

    def launch(self, name: str, grid: tuple[int, ...], **arguments: int | float) -> None:
        """In stream order; pointers are addresses on the device. Arguments that the kernel does not have are left out.

        Raises EngineError for a kernel that lacks one.
        """
        kernel = self._kernels.get(name)
        if kernel is None or (missing := kernel.types.keys() - arguments.keys()):
            lacks = "is missing" if kernel is None else f"takes {', '.join(sorted(missing))} too"
            raise EngineError(f"kernel {name} {lacks}; {self._remedy}")
        values = [arguments[argument] for argument in kernel.types] + [0] * kernel.spare_pointers
        types = [_CTYPES[kind] for kind in kernel.types.values()] + [ctypes.c_void_p] * kernel.spare_pointers
        x, y, z = (*grid, 1, 1)[:3]
        self._check(
            self._driver.cuLaunchKernel(
                kernel.function,
                x,
                y,
                z,
                kernel.threads,
                1,
                1,
                kernel.shared_bytes,
                self._stream,
                (tuple(values), tuple(types)),
                0,
            ),
            f"kernel {name}",
        )

    def _loaded(self, cubin: bytes, entry: str, shared_bytes: int) -> Any:
        module = self._check(self._driver.cuModuleLoadData(cubin), f"kernel {entry}")
        weakref.finalize(self, self._driver.cuModuleUnload, module).atexit = False
        function = self._check(self._driver.cuModuleGetFunction(module, entry.encode()), f"kernel {entry}")
        if shared_bytes > _PLAIN_SHARED:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(self._driver.cuFuncSetAttribute(function, attribute, shared_bytes), f"kernel {entry}")
        return function

    def _check(self, result: tuple[Any, ...], what: str) -> Any:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"{what}: CUDA says {error.name}; {self._remedy}")
        return values[0] if values else None
