"""Device memory as an array of the DLPack protocol (version 0.8), by which libraries share it without copying."""

from __future__ import annotations

import ctypes
from typing import Any

from .device import Tensor

_DEVICES = {"cpu": 1, "cuda": 2}  # kDLCPU, kDLCUDA
#: Code (0 integer, 2 float, 4 bfloat) and bits.
_TYPES = {"int8": (0, 8), "int64": (0, 64), "float16": (2, 16), "float32": (2, 32), "bfloat16": (4, 16)}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class SharedTensor:
    """A tensor for other libraries to take: its memory has to live as long as what they make of it."""

    def __init__(self, tensor: Tensor, dtype: str, device_type: str, device_id: int) -> None:
        """dtype: its own, which for bfloat16 NumPy does not know. device_type: "cpu" or "cuda"."""
        self._tensor, self._dtype, self._place = tensor, dtype, (_DEVICES[device_type], device_id)

    def __dlpack__(self, **_: Any) -> Any:
        """A capsule for one taker, which frees the description by itself.

        By Python's plain allocator: a deleter in Python could be called when Python has ended, and without its lock.
        """
        python, shape = ctypes.pythonapi, self._tensor.shape
        allocate, new = python.PyMem_RawMalloc, python.PyCapsule_New
        allocate.restype, allocate.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        size = ctypes.sizeof(_DLManagedTensor)
        address = allocate(size + 8 * len(shape))
        if not address:
            raise MemoryError
        sides = (ctypes.c_int64 * len(shape)).from_address(address + size)
        sides[:] = list(shape)
        managed = _DLManagedTensor.from_address(address)
        code, bits = _TYPES[self._dtype]
        managed.tensor = _DLTensor(self._tensor.address, *self._place, len(shape), code, bits, 1, sides, None, 0)
        managed.context, managed.deleter = None, ctypes.cast(python.PyMem_RawFree, ctypes.c_void_p)
        return new(address, b"dltensor", None)
