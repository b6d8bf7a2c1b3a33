"""What is read of a GPU: nothing without one, all of a fake one, and what a fake one refuses.

Which GPU that is, `tests/kernels/test_nvml.py` tests.
"""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch

from var_deploy.bench import gpu
from var_deploy.bench.gpu import EnergyMeter, GpuReading, GpuRecord, gpu_reading, gpu_record


class FakeNvml(ModuleType):
    """Two GPUs behind the names of NVML's Python binding."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.refused: set[str] = set()
        self.opened = 0
        self.millijoules = [1_000_000, 2_000_000]
        answers = {
            "nvmlSystemGetDriverVersion": lambda: b"570.86.10",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
            "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-a": 0, "GPU-b": 1}[uuid],
            "nvmlDeviceGetName": lambda handle: f"Fake {handle}",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80 * 2**30, free=1, used=2),
            "nvmlDeviceGetMaxClockInfo": lambda handle, clock: {1: 1980}[clock],
            "nvmlDeviceGetClockInfo": lambda handle, clock: {1: 1755, 2: 2619}[clock],
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlDeviceGetPowerUsage": lambda handle: 123_456,
            "nvmlDeviceGetTemperature": lambda handle, sensor: {0: 41}[sensor],
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: self.millijoules[handle],
        }
        for name, answer in answers.items():
            setattr(self, name, self._guarded(name, answer))

    def nvmlInit(self):
        if "nvmlInit" in self.refused:
            raise self.NVMLError("driver not loaded")
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def _guarded(self, name, answer):
        def call(*arguments):
            assert self.opened, f"{name} before nvmlInit"
            if name in self.refused:
                raise self.NVMLError("not supported")
            return answer(*arguments)

        return call


@pytest.fixture
def nvml(monkeypatch):
    """A fake binding in place of the real one, and CUDA's two GPUs."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab"[index]))
    yield fake
    assert fake.opened == 0, "NVML was left open"


def nothing_is_known() -> bool:
    with EnergyMeter() as meter:
        pass
    return gpu_record() is None and gpu_reading() is None and meter.joules is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_known():
    assert nothing_is_known()


def test_without_the_binding_nothing_is_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    assert nothing_is_known()


def test_without_a_driver_nothing_is_known(nvml):
    nvml.refused.add("nvmlInit")
    assert nothing_is_known()


def test_the_record_names_gpu_and_software(nvml, monkeypatch):
    monkeypatch.setattr(gpu, "_version", {"torch": "2.11.0", "triton": "3.6.0"}.get)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert gpu_record() == GpuRecord(
        name="Fake 0",
        driver="570.86.10",
        cuda_driver="12.8",
        cuda_runtime="12.8",
        memory_bytes=80 * 2**30,
        sm_clock_limit_mhz=1980,
        power_limit_watts=700.0,
        torch="2.11.0",
        triton="3.6.0",
    )


def test_versions_are_those_installed_and_none_of_what_is_not():
    assert gpu._version("torch") == metadata.version("torch")
    assert gpu._version("no-such-package") is None


def test_a_reading_is_the_gpu_now(nvml):
    assert gpu_reading() == GpuReading(
        sm_clock_mhz=1755,
        memory_clock_mhz=2619,
        power_watts=123.456,
        temperature_celsius=41,
        energy_joules=1000.0,
    )


def test_a_gpu_that_refuses_every_call_gives_empty_fields(nvml, monkeypatch):
    monkeypatch.setattr(gpu, "_version", lambda package: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    nvml.refused.update(name for name in vars(nvml) if name.startswith("nvml") and "Handle" not in name)
    for found in (gpu_record(), gpu_reading()):
        assert found is not None
        assert all(getattr(found, field) is None for field in found.__slots__)
    with EnergyMeter() as meter:
        pass
    assert meter.joules is None


def test_a_binding_without_a_function_gives_an_empty_field(nvml):
    del nvml.nvmlDeviceGetTotalEnergyConsumption
    reading = gpu_reading()
    assert reading is not None
    assert (reading.energy_joules, reading.temperature_celsius) == (None, 41)


def test_the_meter_takes_the_difference(nvml):
    with EnergyMeter() as meter:
        assert meter.joules is None
        nvml.millijoules[0] += 2500
    assert meter.joules == 2.5
    meter.start()
    assert meter.joules is None
    meter.start()
    nvml.millijoules[0] += 500
    assert meter.stop() == meter.joules == 0.5
    assert meter.stop() is None


def test_the_meter_stops_when_the_work_fails(nvml):
    meter = EnergyMeter()

    def work():
        with meter:
            nvml.millijoules[0] += 1000
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert meter.joules == 1.0


def test_a_counter_that_fails_half_way_gives_none(nvml):
    with EnergyMeter() as meter:
        nvml.refused.add("nvmlDeviceGetTotalEnergyConsumption")
    assert meter.joules is None


@pytest.mark.parametrize(("index", "name"), [(0, "Fake 0"), (1, "Fake 1"), (2, None)])
def test_the_gpu_is_the_one_that_was_asked_for(nvml, index, name):
    record = gpu_record(index)
    assert (record.name if record else None) == name
    assert (gpu_reading(index) is None) == (name is None)
    with EnergyMeter(index) as meter:
        nvml.millijoules[1] += 3000
    assert meter.joules == {0: 0.0, 1: 3.0, 2: None}[index]


@pytest.mark.gpu
def test_a_real_gpu_is_named():
    record = gpu_record()
    if record is None:
        pytest.skip("NVML or its binding is not there")
    assert record.name == torch.cuda.get_device_name(0)
    assert record.memory_bytes is not None
    assert record.memory_bytes >= torch.cuda.get_device_properties(0).total_memory
