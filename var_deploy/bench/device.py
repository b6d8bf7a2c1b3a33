"""What only a GPU engine can tell a benchmark: time by CUDA events, its stages, energy, peak memory, ceilings."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..config import VARConfig, VQVAEConfig
from ..errors import EngineError
from ..precision import Precision
from ..sampling import Settings
from .floor import Floor, floor
from .gpu import EnergyMeter, GpuReading, gpu_reading

#: Replays in a row: at most so many and about so long, so that the tail of the distribution is seen; where a replay
#: takes long, no more than these few.
MAX_REPLAYS = 200
MIN_REPLAYS = 10
SECONDS = 1.0
#: Replays of the stages, each a graph of its own.
STAGE_REPLAYS = 20


@runtime_checkable
class DeviceClock(Protocol):
    """An engine that times itself on its device, which has an `index`."""

    device: Any

    def device_seconds(
        self,
        labels_B: np.ndarray,
        seeds: list[int],
        settings: Settings,
        *,
        staged: bool = False,
        decode: bool = True,
        head_start: bool = True,
    ) -> dict[str, float]:
        """Seconds by stage, or of the whole as one stage."""
        ...

    def release(self) -> None:
        """Gives back buffers and graphs."""
        ...

    def peak_memory(self, run: Callable[[], object]) -> tuple[int, int]:
        """Most bytes on the device during `run`, in use and reserved; the weights are in both."""
        ...


class Rates(Protocol):
    """Measured ceilings, as `var_kernels.timing.Ceilings`."""

    @property
    def bytes_per_second(self) -> float:
        """Of a copy, bytes read plus bytes written."""
        ...

    @property
    def flops_per_second(self) -> dict[str, float | None]:
        """Of a matrix product, by operand type."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """A request, ready for an engine."""

    labels_B: np.ndarray
    seeds: list[int]
    settings: Settings


def cuda_clock(engine: object) -> DeviceClock | None:
    """The engine, if it runs on CUDA and times itself."""
    on_cuda = isinstance(engine, DeviceClock) and str(engine.device).startswith("cuda")
    return engine if on_cuda and isinstance(engine, DeviceClock) else None


def whole_seconds(
    clock: DeviceClock, request: BenchRequest, *, repeats: int, decode: bool = True, limit_seconds: float = SECONDS
) -> list[float]:
    """Seconds of whole generations on the device, `repeats` or more, as time allows; with or without the decoder."""
    found: list[float] = []

    def once() -> None:
        stages = clock.device_seconds(request.labels_B, request.seeds, request.settings, decode=decode)
        found.append(sum(stages.values()))

    once()  # captures
    found.clear()
    begin = time.perf_counter()
    least = min(repeats, MIN_REPLAYS)
    while len(found) < least or (len(found) < MAX_REPLAYS and time.perf_counter() - begin < limit_seconds):
        once()
    return found


def stage_seconds(clock: DeviceClock, request: BenchRequest, *, limit_seconds: float = SECONDS) -> dict[str, float]:
    """Median seconds of every stage, each replayed as a graph of its own."""
    found: list[dict[str, float]] = []

    def once() -> None:
        found.append(clock.device_seconds(request.labels_B, request.seeds, request.settings, staged=True))

    once()
    found.clear()
    begin = time.perf_counter()
    while not found or (len(found) < STAGE_REPLAYS and time.perf_counter() - begin < limit_seconds):
        once()
    return {name: float(np.median([stages[name] for stages in found])) for name in found[0]}


def joules_per_image(
    clock: DeviceClock, request: BenchRequest, *, limit_seconds: float = SECONDS
) -> tuple[float | None, GpuReading | None]:
    """Energy of the whole GPU over back-to-back generations, and its clocks and power right after them."""
    index, images = clock.device.index or 0, 0
    begin = time.perf_counter()
    with EnergyMeter(index) as meter:
        while not images or time.perf_counter() - begin < limit_seconds:
            # Without a head start: a device that waits takes power too.
            clock.device_seconds(request.labels_B, request.seeds, request.settings, head_start=False)
            images += len(request.labels_B)
    reading = gpu_reading(index)
    return (None if meter.joules is None else meter.joules / images), reading


def peak_memory(clock: DeviceClock, run: Callable[[], object]) -> tuple[int, int]:
    """See `DeviceClock.peak_memory`, without the buffers of other batch sizes."""
    clock.release()
    return clock.peak_memory(run)


def free(engine: object) -> None:
    """Gives a GPU's memory back, as far as only this engine and what ran beside it held it; drop the engine then."""
    gc.collect()  # models refer to themselves in circles
    if (clock := cuda_clock(engine)) is not None:
        clock.release()


def measured_ceilings(device: str) -> Rates:
    """Copy and matrix product on the device, now. Raises EngineError."""
    try:
        import torch

        from var_kernels.timing import ceilings
    except ImportError as error:
        raise EngineError(f"the floor needs {error.name}; pip install 'var-deploy[gpu]'") from error
    found = ceilings(device)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # some gigabytes, which would count as peak memory
    return found


def counted_floor(var: VARConfig, vqvae: VQVAEConfig, batch: int, settings: Settings, precision: Precision) -> Floor:
    """The floor of a request: null-class rows run at the guided scales only."""
    rows = [2 * batch if k < settings.guided_scales else batch for k in range(var.num_scales)]
    return floor(var, vqvae, batch=batch, rows=rows, precision=precision)


def product_rate(rates: Rates, precision: Precision) -> float | None:
    """Operations per second that a precision's matrix products can reach, None where that was not measured.

    8-bit integer weights multiply in bf16.
    """
    names = {
        Precision.FP32: "float32",
        Precision.FP16: "float16",
        Precision.BF16: "bfloat16",
        Precision.INT8: "bfloat16",
        Precision.FP8: "float8_e4m3fn",
    }
    return rates.flops_per_second.get(names[precision])
