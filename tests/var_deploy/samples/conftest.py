"""Fixtures of the sampler's tests: one plan of a tiny bundle, and its samples as an undisturbed run writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from var_deploy.bundle import Bundle
from var_deploy.samples.plan import SamplePlan
from var_deploy.samples.run import Sampled, sample

COUNT = 31  # prime, so that neither batches nor shards come out even
LOAD = {"engine": "onnx", "device": "cpu", "cache": False}


@pytest.fixture(scope="session")
def tiny(tiny_bundle: Path) -> Bundle:
    """The tiny bundle, opened; it has 10 classes."""
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="session")
def plan(tiny: Bundle) -> SamplePlan:
    """Of 31 images."""
    return SamplePlan.of(tiny, count=COUNT, seed=7)


@pytest.fixture(scope="session")
def run_sample(tiny: Bundle, plan: SamplePlan) -> Callable[..., Sampled]:
    """`run_sample(out, plan=…, **options)` samples in this process."""

    def run(out: Path, plan: SamplePlan = plan, **options: Any) -> Sampled:
        return sample(tiny, out, plan, **({"load": LOAD} | options))

    return run


@pytest.fixture(scope="session")
def undisturbed(run_sample: Callable[..., Sampled], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `plan`, with its .npz, from one run; read only."""
    out = tmp_path_factory.mktemp("samples") / "undisturbed"
    run_sample(out, npz=True)
    return out


@pytest.fixture(scope="session")
def assert_same_samples(undisturbed: Path) -> Callable[[Path], None]:
    """`assert_same_samples(out)`: byte for byte those of the undisturbed run, and nothing half-written beside them."""

    def check(out: Path) -> None:
        expected = {path.name: path.read_bytes() for path in undisturbed.glob("*.png")}
        assert len(expected) == COUNT
        found = {path.name: path.read_bytes() for path in out.glob("*.png")}
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        assert [path.name for path in out.iterdir() if "partial" in path.name] == []

    return check
