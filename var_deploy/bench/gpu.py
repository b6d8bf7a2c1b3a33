"""What a measured result must say about the GPU it was measured on, read through `var_kernels.nvml`.

Nothing here needs a GPU: what cannot be read is None. `index` counts GPUs as CUDA does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuRecord:
    """A GPU and the software on it; a field is None where it cannot be read."""

    name: str | None
    driver: str | None
    cuda_driver: str | None  #: newest CUDA version that the driver runs
    cuda_runtime: str | None  #: CUDA version that this process computes with
    memory_bytes: int | None
    sm_clock_limit_mhz: int | None
    power_limit_watts: float | None
    torch: str | None
    triton: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """A GPU at one moment; a field is None where it cannot be read."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_watts: float | None
    temperature_celsius: int | None
    energy_joules: float | None  #: since the driver was loaded


def gpu_record(index: int = 0) -> GpuRecord | None:
    """The GPU and its software; None without a GPU or without NVML."""
    import torch

    with _opened(index) as nvml:
        if not nvml.found:
            return None
        cuda = nvml.system("nvmlSystemGetCudaDriverVersion_v2")
        limits = nvml.limits()
        return GpuRecord(
            name=nvml.device("nvmlDeviceGetName"),
            driver=limits["driver"],
            cuda_driver=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
            cuda_runtime=torch.version.cuda,
            memory_bytes=getattr(nvml.device("nvmlDeviceGetMemoryInfo"), "total", None),
            sm_clock_limit_mhz=limits["sm_clock_limit_mhz"],
            power_limit_watts=limits["power_limit_watts"],
            torch=_version("torch"),
            triton=_version("triton"),
        )


def gpu_reading(index: int = 0) -> GpuReading | None:
    """Clocks, power, temperature and energy now; None without a GPU or without NVML."""
    with _opened(index) as nvml:
        if not nvml.found:
            return None
        return GpuReading(
            **nvml.clocks(),
            power_watts=nvml.thousandth("nvmlDeviceGetPowerUsage"),
            temperature_celsius=nvml.device("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
            energy_joules=nvml.thousandth(_ENERGY),
        )


class EnergyMeter:
    """Joules of the whole GPU between `start` and `stop`, also as a context manager.

        with EnergyMeter() as meter:
            work(); torch.cuda.synchronize()
        meter.joules  # None where NVML does not count energy

    The counter moves in steps some tens of milliseconds apart, so measure seconds of work; and it counts whatever runs
    on the GPU, so wait for the work to end before `stop`.
    """

    def __init__(self, index: int = 0) -> None:
        self.joules: float | None = None
        self._index = index
        self._nvml: Any = None
        self._begin: float | None = None
        self._open = ExitStack()

    def start(self) -> None:
        """Begins anew."""
        self._open.close()
        self.joules = None
        self._nvml = self._open.enter_context(_opened(self._index))  # stays open: opening takes time, so energy
        self._begin = self._read()

    def stop(self) -> float | None:
        """Sets and returns `joules`; None without a `start`."""
        begin, end = self._begin, self._read()
        self._nvml, self._begin = None, None
        self._open.close()
        self.joules = None if begin is None or end is None else end - begin
        return self.joules

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _read(self) -> float | None:
        return None if self._nvml is None else self._nvml.thousandth(_ENERGY)


_ENERGY = "nvmlDeviceGetTotalEnergyConsumption"


def _opened(index: int) -> AbstractContextManager[Any]:
    from var_kernels.nvml import opened  # imports PyTorch, which whoever has a GPU to ask about has loaded

    return opened(index)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
