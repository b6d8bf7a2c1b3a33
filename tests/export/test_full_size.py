"""Published sizes with random weights: export time, memory, disk, parity and a picture. Minutes and gigabytes.

d16 needs 4 GB of disk and 6 GB of memory, d30 needs 18 GB of disk; both are removed afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from var_deploy.bundle import WEIGHTS
from var_deploy.memory import memory_plan
from var_train import VAR, VQVAE
from var_train.presets import preset_configs

pytestmark = pytest.mark.full_size

ROOT = Path(__file__).parents[2]
GB = 1e9


@dataclass(frozen=True)
class Exported:
    """A preset's checkpoints and bundle, and what the export took."""

    name: str
    checkpoints: tuple[Path, Path]
    bundle: Path
    seconds: float
    peak: int  #: highest resident size of the exporting process, in bytes

    @property
    def weights(self) -> int:
        return (self.bundle / WEIGHTS).stat().st_size


def run(*command: object) -> tuple[str, float, int]:
    """Runs Python with arguments; returns its output, seconds and peak resident size in bytes."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "train", ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths}
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{command}: exit status {process.returncode}\n{output}"
    return output, time.perf_counter() - begin, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def export(name: str, directory: Path) -> Exported:
    """Both steps in processes of their own, so that each has its own peak."""
    run("-m", "var_train.presets", name, "--out", directory)
    var, vqvae = directory / f"var_{name}.pth", directory / f"vae_{name}.pth"
    out = directory / "bundle"
    _, seconds, peak = run("-m", "var_deploy.cli", "export", "--var", var, "--vae", vqvae, "--out", out)
    exported = Exported(name, (var, vqvae), out, seconds, peak)
    print(f"{name}: exported in {seconds:.1f} s, peak {peak / GB:.2f} GB, weights {exported.weights / GB:.2f} GB")
    return exported


@pytest.fixture(scope="module")
def d16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    directory = tmp_path_factory.mktemp("d16")
    try:
        yield export("d16", directory)
    finally:
        shutil.rmtree(directory)


def parameter_bytes(name: str) -> int:
    with torch.device("meta"):
        models = [model(config) for model, config in zip((VAR, VQVAE), preset_configs(name), strict=True)]
    return 4 * sum(p.numel() for model in models for p in model.parameters())


def test_d16_exports_in_two_minutes(d16):
    assert d16.seconds < 120


def test_d16_export_peaks_below_three_times_its_weights(d16):
    assert d16.peak < 3 * d16.weights


def test_d16_weights_are_one_copy(d16):
    assert d16.weights == pytest.approx(parameter_bytes("d16"), rel=0.01)
    others = sum(file.stat().st_size for file in d16.bundle.iterdir()) - d16.weights
    assert others < 0.01 * d16.weights  # the graphs hold no weights


def test_d16_agrees_with_the_reference(d16):
    var, vqvae = d16.checkpoints
    output, seconds, _ = run("-m", "var_deploy.cli", "verify", d16.bundle, "--var", var, "--vae", vqvae, "--json")
    parity = json.loads(output)
    worst = max(row["logit_error"] for rows in parity["scales"].values() for row in rows)
    print(f"d16: verified in {seconds:.0f} s, largest logit error {worst:.1e}, pixels {parity['pixel_error']}")
    assert parity["passed"]
    assert parity["tolerance"] <= 1e-3


GENERATE = """
import sys, time, var_deploy
from var_deploy.memory import proportional_set_size
pipe = var_deploy.load(sys.argv[1], graphs=sys.argv[2])
loaded = proportional_set_size()
begin = time.perf_counter()
out = pipe.generate([207], seeds=3)
seconds = time.perf_counter() - begin
used = proportional_set_size()
assert "torch" not in sys.modules and "onnx" not in sys.modules
print(loaded, used, seconds, *out.images[0].size, out.pixels.std())
"""


@pytest.mark.parametrize("graphs", ["symbolic", "static"])
def test_d16_generates_a_256_px_image_with_its_weights_in_memory_once(d16, graphs):
    output, _, _ = run("-c", GENERATE, d16.bundle, graphs)
    loaded, used, seconds, width, height, spread = (float(word) for word in output.split())
    print(f"d16, {graphs}: image in {seconds:.1f} s, {loaded / GB:.2f} GB loaded, {used / GB:.2f} GB after it")
    assert (width, height) == (256, 256)
    assert spread > 0.01
    limit = 1.3 * d16.weights + 400e6
    assert loaded < limit
    plan = memory_plan(*preset_configs("d16"), d16.weights, batch=1)
    assert used < limit + plan.caches + plan.logits + plan.activations


def test_d30_exports_in_24_gigabytes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("d30")
    try:
        d30 = export("d30", directory)
        assert d30.peak < 24 * GB
        assert d30.weights == pytest.approx(parameter_bytes("d30"), rel=0.01)
    finally:
        shutil.rmtree(directory)
