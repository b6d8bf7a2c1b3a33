"""What NVML (package nvidia-ml-py) tells of a GPU: nothing here raises, and what cannot be read is None.

A GPU is found by its UUID: NVML counts GPUs that CUDA does not see, and CUDA's default order is not that of the bus.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch


class Nvml:
    """The library, and one GPU of it."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    @property
    def found(self) -> bool:
        """Whether the library is there and knows the GPU."""
        return self._handle is not None

    def system(self, function: str) -> Any:
        """What the library says of the machine."""
        return self._ask(function)

    def device(self, function: str, *constants: str) -> Any:
        """What the library says of the GPU; `constants` by their names."""
        return self._ask(function, self._handle, *(getattr(self._library, name, None) for name in constants))

    def thousandth(self, function: str) -> float | None:
        """The same of what is counted in milliwatts or millijoules."""
        value = self.device(function)
        return None if value is None else value / 1000

    def limits(self) -> dict[str, Any]:
        """Driver, and what the GPU may clock and take at most."""
        return {
            "driver": self.system("nvmlSystemGetDriverVersion"),
            "sm_clock_limit_mhz": self.device("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
            "memory_clock_limit_mhz": self.device("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_MEM"),
            "power_limit_watts": self.thousandth("nvmlDeviceGetEnforcedPowerLimit"),
        }

    def clocks(self) -> dict[str, int | None]:
        """Clocks at this moment."""
        return {
            "sm_clock_mhz": self.device("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            "memory_clock_mhz": self.device("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
        }

    def _ask(self, function: str, *arguments: Any) -> Any:
        if None in arguments:
            return None
        try:
            answer = getattr(self._library, function)(*arguments)
        except Exception:  # this GPU, driver or container does not tell, or the binding is too old
            return None
        return answer.decode() if isinstance(answer, bytes) else answer  # older bindings answer in bytes


@contextmanager
def opened(device: torch.device | int) -> Iterator[Nvml]:
    """NVML and a GPU as CUDA counts them, until the block ends."""
    try:
        library = import_module("pynvml")
        library.nvmlInit()
    except Exception:  # not installed, no driver, no permission
        yield Nvml(None, None)
        return
    try:
        handle = None
        with suppress(Exception):  # not a GPU, or a part of one that NVML knows by another name
            uuid = torch.cuda.get_device_properties(device).uuid
            handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        yield Nvml(library, handle)
    finally:
        with suppress(Exception):
            library.nvmlShutdown()
