"""What NVML tells: of the GPU that CUDA means, whatever NVML's own order; without one nothing, and no error."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from var_kernels.nvml import opened


class FakeNvml(ModuleType):
    """Two GPUs, in another order than CUDA's; of the memory clock nothing can be read."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self):
        super().__init__("pynvml")
        self.open = 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-12ab": 1, "GPU-34cd": 0}[uuid]

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return [400_000, 700_000][handle]

    def nvmlDeviceGetMaxClockInfo(self, handle, clock):
        return {1: 1980, 2: 3201}[clock]

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return {1: [1200, 1755][handle]}[clock]


@pytest.fixture
def library(monkeypatch):
    """A fake binding, and two GPUs of CUDA by their UUIDs."""
    fake, uuids = FakeNvml(), {0: "12ab", 1: "34cd", 2: "of a slice that NVML names otherwise"}
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=uuids[getattr(d, "index", d)])
    )
    yield fake
    assert fake.open == 0, "NVML was left open"


@pytest.mark.parametrize("device", [0, torch.device("cuda", 0), 1])
def test_a_gpu_is_found_by_its_identity(library, device):
    with opened(device) as nvml:
        assert nvml.found
        assert nvml.limits() == {
            "driver": "580.1",
            "sm_clock_limit_mhz": 1980,
            "memory_clock_limit_mhz": 3201,
            "power_limit_watts": 400.0 if device == 1 else 700.0,
        }
        assert nvml.clocks() == {"sm_clock_mhz": 1200 if device == 1 else 1755, "memory_clock_mhz": None}
        assert nvml.device("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_OF_LATER_BINDINGS") is None
        assert nvml.device("nvmlDeviceGetPowerUsage") is None


@pytest.mark.parametrize("device", [2, torch.device("cuda", 3)])
def test_a_gpu_that_nvml_does_not_know_leaves_the_driver(library, device):
    with opened(device) as nvml:
        assert not nvml.found
        limits = nvml.limits()
        assert limits.pop("driver") == "580.1"
        assert set(limits.values()) | set(nvml.clocks().values()) == {None}


def test_without_the_binding_or_its_driver_nothing_is_known(library, monkeypatch):
    def refuses():
        raise RuntimeError("driver not loaded")

    monkeypatch.setattr(library, "nvmlInit", refuses)
    for binding in (library, None):  # importing None raises ImportError
        monkeypatch.setitem(sys.modules, "pynvml", binding)
        with opened(0) as nvml:
            assert not nvml.found
            assert set(nvml.limits().values()) == {None}


def test_a_block_that_fails_closes_the_library(library):
    with pytest.raises(ZeroDivisionError), opened(0):
        _ = library.open / 0
