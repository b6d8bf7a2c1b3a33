"""What a measured result must say about the GPU it was measured on, read through NVML (package nvidia-ml-py).

Nothing here raises and nothing needs a GPU: what cannot be read is None. NVML counts every GPU of the machine;
`index` counts those that CUDA_VISIBLE_DEVICES leaves, as CUDA does, so both mean the same one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
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
    with _opened(index) as nvml:
        if nvml is None:
            return None
        cuda = nvml.system("nvmlSystemGetCudaDriverVersion_v2")
        memory = nvml.device("nvmlDeviceGetMemoryInfo")
        return GpuRecord(
            name=_text(nvml.device("nvmlDeviceGetName")),
            driver=_text(nvml.system("nvmlSystemGetDriverVersion")),
            cuda_driver=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
            cuda_runtime=_cuda_runtime(),
            memory_bytes=getattr(memory, "total", None),
            sm_clock_limit_mhz=nvml.device("nvmlDeviceGetMaxClockInfo", nvml.constant("NVML_CLOCK_SM")),
            power_limit_watts=_thousandth(nvml.device("nvmlDeviceGetEnforcedPowerLimit")),
            torch=_version("torch"),
            triton=_version("triton"),
        )


def gpu_reading(index: int = 0) -> GpuReading | None:
    """Clocks, power, temperature and energy now; None without a GPU or without NVML."""
    with _opened(index) as nvml:
        if nvml is None:
            return None
        return GpuReading(
            sm_clock_mhz=nvml.device("nvmlDeviceGetClockInfo", nvml.constant("NVML_CLOCK_SM")),
            memory_clock_mhz=nvml.device("nvmlDeviceGetClockInfo", nvml.constant("NVML_CLOCK_MEM")),
            power_watts=_thousandth(nvml.device("nvmlDeviceGetPowerUsage")),
            temperature_celsius=nvml.device("nvmlDeviceGetTemperature", nvml.constant("NVML_TEMPERATURE_GPU")),
            energy_joules=_energy(nvml),
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
        self._nvml: _Nvml | None = None
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
        return None if self._nvml is None else _energy(self._nvml)


class _Nvml:
    """The library and one device of it; a call that it lacks or refuses gives None."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    def system(self, function: str) -> Any:
        return _ask(self._library, function)

    def device(self, function: str, *arguments: Any) -> Any:
        return _ask(self._library, function, self._handle, *arguments)

    def constant(self, name: str) -> Any:
        return getattr(self._library, name, None)


@contextmanager
def _opened(index: int) -> Iterator[_Nvml | None]:
    try:
        library = import_module("pynvml")
        library.nvmlInit()
    except Exception:  # not installed, no driver, no permission: no GPU to tell of
        yield None
        return
    try:
        handle = _handle(library, index)
        yield None if handle is None else _Nvml(library, handle)
    finally:
        _ask(library, "nvmlShutdown")


def _handle(library: Any, index: int) -> Any:
    """NVML's handle of the GPU that CUDA numbers `index`, as far as the order of numbers is that of the bus."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index)] if visible is None else [name.strip() for name in visible.split(",")]
    position = 0 if visible is None else index
    if not 0 <= position < len(names) or not names[position]:
        return None
    name = names[position]
    if name.lstrip("-").isdigit():
        return _ask(library, "nvmlDeviceGetHandleByIndex", int(name))
    return _ask(library, "nvmlDeviceGetHandleByUUID", name)


def _ask(library: Any, function: str, *arguments: Any) -> Any:
    try:
        return getattr(library, function)(*arguments)
    except Exception:  # NVMLError: this GPU, driver or container does not tell; AttributeError: too old a binding
        return None


def _energy(nvml: _Nvml) -> float | None:
    return _thousandth(nvml.device("nvmlDeviceGetTotalEnergyConsumption"))


def _text(value: Any) -> str | None:
    """Older bindings answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _thousandth(value: int | None) -> float | None:
    """NVML counts milliwatts and millijoules."""
    return None if value is None else value / 1000


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda_runtime() -> str | None:
    """Of PyTorch where it is loaded, else of NVIDIA's runtime package; asking loads nothing."""
    loaded = getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None)
    return loaded or _version("nvidia-cuda-runtime") or _version("nvidia-cuda-runtime-cu12")
