"""The memory plan against hand computation, and the promise that weights are in memory once, measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import var_deploy
from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.memory import memory_plan
from var_export.bundle import write_bundle
from var_train import VAR, VQVAE
from var_train.checkpoint import CheckpointPair
from var_train.presets import preset_configs, randomise


def test_exact_parts_of_the_plan_of_d16():
    plan = memory_plan(*preset_configs("d16"), weights=1_676_000_000, batch=3)
    assert plan.rows == 6
    assert plan.weights == 1_676_000_000
    # keys and values × 16 blocks × 6 rows × 16 heads × 680 tokens × 64 × 4 bytes
    assert plan.caches == 2 * 16 * 6 * 16 * 680 * 64 * 4 == 534_773_760
    # 6 rows × 256 tokens of the last scale × 4096 codes × 4 bytes
    assert plan.logits == 6 * 256 * 4096 * 4 == 25_165_824
    assert plan.request == plan.caches + plan.logits + plan.activations
    assert plan.total == plan.weights + plan.request + plan.process


def test_without_guidance_there_are_half_the_rows():
    configs = preset_configs("d36-s")
    guided, plain = (memory_plan(*configs, weights=7, batch=5, guided=guided) for guided in (True, False))
    assert (guided.rows, plain.rows) == (10, 5)
    assert (guided.caches, guided.logits) == (2 * plain.caches, 2 * plain.logits)
    assert guided.weights == plain.weights
    assert plain.activations < guided.activations


def test_activations_grow_with_the_batch_but_not_below_one_decoded_image():
    var, vqvae = preset_configs("d16")
    plans = [memory_plan(var, vqvae, weights=0, batch=batch) for batch in (1, 2, 64)]
    assert plans[0].activations <= plans[1].activations < plans[2].activations
    assert plans[0].activations >= 4 * 160 * 256 * 256 * 4  # four maps of 160 channels at 256 × 256


@pytest.mark.parametrize("batch", [1, 3])
def test_the_plan_states_the_buffers_that_the_engine_allocates(tiny_bundle, batch):
    pipe = var_deploy.load(tiny_bundle)
    manifest = pipe.bundle.manifest
    plan = memory_plan(manifest.var, manifest.vqvae, weights=0, batch=batch)
    state = pipe.engine.begin(np.zeros(plan.rows, dtype=np.int64))
    assert sum(cache.nbytes for cache in state.caches.values()) == plan.caches
    codes_RnC = np.zeros((plan.rows, 9, 32), np.float32)
    assert pipe.engine.step(state, 3, codes_RnC).nbytes == plan.logits


#: In a process of its own: shared pages of a test process count less when others map the same libraries.
ALLOCATE = """
import mmap
from var_deploy.memory import peak_resident_size, proportional_set_size
before = proportional_set_size()
block = mmap.mmap(-1, 40_000_000)
block.write(b"x" * len(block))
print([proportional_set_size() - before, peak_resident_size()])
"""


def test_process_sizes_follow_an_allocation():
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True)
    growth, peak = json.loads(done.stdout)
    assert 39e6 < growth < 60e6  # the block, and what else happened meanwhile
    assert peak >= 40_000_000


# ---- weights once ----------------------------------------------------------------------------------------------------

#: Loads a bundle, generates one guided image, prints how much the process has grown. "default" is the control: one
#: session per scale with ONNX Runtime's default settings.
MEASURE = """
import sys
import numpy, onnxruntime, var_deploy
from var_deploy.engines.onnx import OnnxEngine
from var_deploy.memory import proportional_set_size
path, graphs = sys.argv[1:]
if graphs == "default":
    graphs, session = "static", OnnxEngine._session
    OnnxEngine._session = lambda self, name, *, prepack=True: session(self, name)
before = proportional_set_size()
pipe = var_deploy.load(path, graphs=graphs)
pipe.generate([1], guidance=1.5)
print(proportional_set_size() - before)
"""

#: Arena, activations, decoder and seven graphs of a model this small.
CONSTANT = 40e6


@pytest.fixture(scope="module")
def heavy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven scales, 111 MB of weights, nearly all of them in the blocks; quick to run."""
    patch_nums = (1, 2, 3, 4, 5, 6, 7)
    var_config = VARConfig(
        patch_nums=patch_nums,
        vocab_size=64,
        num_classes=3,
        depth=8,
        embed_dim=512,
        ffn_dim=2048,
        shared_aln=True,
    )
    vqvae_config = VQVAEConfig(patch_nums=patch_nums, vocab_size=64, ch=32, ch_mult=(1, 1))
    var, vqvae = VAR(var_config), VQVAE(vqvae_config)
    randomise(var)
    randomise(vqvae)
    pair = CheckpointPair(var_config, vqvae_config, var.state_dict(), vqvae.state_dict())
    return write_bundle(pair, tmp_path_factory.mktemp("heavy") / "bundle")


def _growth(bundle: Path, graphs: str) -> int:
    command = [sys.executable, "-c", MEASURE, str(bundle), graphs]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("graphs", ["symbolic", "static"])
def test_weights_are_in_memory_once(heavy_bundle, graphs):
    weights = (heavy_bundle / "weights.safetensors").stat().st_size
    assert weights > 100e6
    assert _growth(heavy_bundle, graphs) < 1.6 * weights + CONSTANT


def test_default_sessions_would_hold_the_weights_many_times_over(heavy_bundle):
    # The control: were the engine's settings lost, the test above would see it.
    weights = (heavy_bundle / "weights.safetensors").stat().st_size
    assert _growth(heavy_bundle, "default") > 4 * weights
