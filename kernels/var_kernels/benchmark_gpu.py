"""What NVML (package nvidia-ml-py) tells of a GPU beside what PyTorch does: driver, limits, clocks.

Nothing here raises and nothing needs a GPU: what cannot be read is None.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch


def limits(device: torch.device) -> dict[str, Any]:
    """Driver, and what the GPU may clock and take at most."""
    with _opened(device) as (library, handle):
        milliwatts = _ask(library, "nvmlDeviceGetEnforcedPowerLimit", handle)
        return {
            "driver": _ask(library, "nvmlSystemGetDriverVersion"),
            "sm_clock_limit_mhz": _ask(library, "nvmlDeviceGetMaxClockInfo", handle, "NVML_CLOCK_SM"),
            "memory_clock_limit_mhz": _ask(library, "nvmlDeviceGetMaxClockInfo", handle, "NVML_CLOCK_MEM"),
            "power_limit_watts": None if milliwatts is None else milliwatts / 1000,
        }


def clocks(device: torch.device) -> dict[str, int | None]:
    """Clocks at this moment."""
    with _opened(device) as (library, handle):
        return {
            "sm_clock_mhz": _ask(library, "nvmlDeviceGetClockInfo", handle, "NVML_CLOCK_SM"),
            "memory_clock_mhz": _ask(library, "nvmlDeviceGetClockInfo", handle, "NVML_CLOCK_MEM"),
        }


@contextmanager
def _opened(device: torch.device) -> Iterator[tuple[Any, Any]]:
    """The library and its handle of the device: by the identity, because NVML counts GPUs that CUDA does not see."""
    try:
        library = import_module("pynvml")
        library.nvmlInit()
    except Exception:  # not installed, no driver, no permission
        yield None, None
        return
    try:
        handle = None
        with suppress(Exception):  # not a GPU, or a part of one that NVML knows by another name
            uuid = torch.cuda.get_device_properties(device).uuid
            handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        yield library, handle
    finally:
        _ask(library, "nvmlShutdown")


def _ask(library: Any, function: str, *arguments: Any) -> Any:
    """What the library answers; strings are names of its constants."""
    if None in arguments:
        return None
    try:
        values = (getattr(library, value) if isinstance(value, str) else value for value in arguments)
        answer = getattr(library, function)(*values)
    except Exception:  # this GPU, driver or container does not tell, or the binding is too old
        return None
    return answer.decode() if isinstance(answer, bytes) else answer  # older bindings answer in bytes
