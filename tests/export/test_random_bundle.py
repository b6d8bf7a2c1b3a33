"""Random weights in memory: names and shapes as exported, magnitudes as in random checkpoints, images that differ."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.engines import EngineOptions, engine_for
from var_deploy.errors import EngineError, RequestError
from var_deploy.pipeline import Pipeline
from var_deploy.precision import Precision
from var_export import random_bundle
from var_export.deploy_view import deploy_weights
from var_export.random_bundle import POOL_SIZE, RandomBundle, random_pipeline, random_weight
from var_train import VAR, VQVAE
from var_train.checkpoint import CheckpointPair
from var_train.presets import PRESETS, randomise

BOTH = {"patch_nums": (1, 2, 3), "vocab_size": 61}
VARIANTS = {
    "own": {},
    "shared": {"shared_aln": True},
    "plain": {"attn_l2_norm": False},
}


def configs(**options) -> tuple[VARConfig, VQVAEConfig]:
    var = VARConfig(**BOTH, num_classes=5, depth=2, embed_dim=128, ffn_dim=512, **options)
    return var, VQVAEConfig(**BOTH, ch=32, ch_mult=(1, 2))


@pytest.fixture
def small(monkeypatch) -> str:
    """A preset that fits a test."""
    monkeypatch.setitem(PRESETS, "small", (2, BOTH["patch_nums"], False))
    monkeypatch.setattr(random_bundle, "preset_configs", lambda name: configs())
    return "small"


def exported(var: VARConfig, vqvae: VQVAEConfig) -> dict[str, np.ndarray]:
    """What an export of a random checkpoint would hold."""
    models = VAR(var), VQVAE(vqvae)
    for model in models:
        randomise(model)
    pair = CheckpointPair(var, vqvae, *(model.state_dict() for model in models))
    return {name: weight.numpy() for name, weight in deploy_weights(pair).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_those_of_an_export_in_name_shape_and_size(variant):
    var, vqvae = configs(**VARIANTS[variant])
    bundle, expected = RandomBundle.of(var, vqvae), exported(var, vqvae)
    assert list(bundle.weight_sizes()) == list(expected)
    for name, weight in expected.items():
        ours = bundle.weight(name)
        assert (ours.shape, ours.dtype) == (weight.shape, np.float32), name
        assert bundle.weight_sizes()[name] == weight.size
        if weight.size >= 500:  # of fewer numbers the sample itself varies
            assert 0.5 < ours.std() / weight.std() < 2, name
            assert abs(ours.mean() - weight.mean()) < 0.25 * weight.std() + 0.05, name


def test_what_the_deploy_view_folds_in_is_there():
    var, vqvae = configs()
    bundle, expected, D = RandomBundle.of(var, vqvae), exported(var, vqvae), 128
    for name, parts, width in (("blocks.1.ada_lin.bias", 6, D), ("head_nm.ada_lin.bias", 2, D)):
        means = [bundle.weight(name).reshape(parts, width).mean(axis=1), expected[name].reshape(parts, -1).mean(axis=1)]
        np.testing.assert_array_equal(np.round(means[0]), np.round(means[1]))
    q, k, v = bundle.weight("blocks.0.attn.qkv.bias").reshape(3, D)
    assert not k.any()
    assert q.all()
    assert v.all()
    assert 3 < bundle.weight("blocks.0.attn.q_scale").mean() < 5  # e^(ln 4)
    phi = bundle.weight("quantize.phi.weight").reshape(4, 32, 32, 3, 3)
    assert np.allclose(np.einsum("pcchw->phw", phi)[:, 1, 1] / 32, 0.5, atol=0.05)


def test_a_weight_is_the_same_every_time_and_unlike_its_neighbour():
    first, again = (random_weight("blocks.0.ffn.fc1.weight", (64, 96)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first.ravel(), random_weight("blocks.1.ffn.fc1.weight", (64, 96)).ravel())[0, 1]) < 0.1


def test_a_weight_larger_than_the_pool_goes_round_it(monkeypatch):
    pool = np.arange(7, dtype=np.float32)
    monkeypatch.setattr(random_bundle, "_pool", lambda: pool)
    monkeypatch.setattr(random_bundle, "POOL_SIZE", 7)
    begin = zlib.crc32(b"head.weight") % 7
    expected = (np.arange(20) + begin) % 7 / np.sqrt(4)
    np.testing.assert_allclose(random_weight("head.weight", (4, 5)), expected.reshape(4, 5), rtol=1e-6)


def test_the_pool_is_odd_so_that_rows_do_not_repeat():
    assert POOL_SIZE % 2 == 1


@pytest.mark.parametrize("preset", ["d16", "d30", "d36-s"])
def test_published_sizes_take_no_memory_until_a_weight_is_read(preset):
    bundle = RandomBundle.of_preset(preset)
    depth = bundle.manifest.var.depth
    assert bundle.shapes[f"blocks.{depth - 1}.ffn.fc1.weight"] == (64 * depth, 256 * depth)
    assert str(bundle.path) == f"random {preset}"
    assert sum(bundle.weight_sizes().values()) > 4e8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_activations_stay_finite_and_keep_their_size(variant, precision):
    var, vqvae = configs(**VARIANTS[variant])
    bundle = RandomBundle.of(var, vqvae)
    engine = engine_for(bundle, "torch", "cpu", EngineOptions(precision=precision))
    logits = engine.step(engine.begin(np.array([0, 1, 2])), 0, None)
    assert 0.1 < logits.std() < 10
    pipe = Pipeline(bundle, engine)
    pixels = pipe.generate([0, 1], seeds=3).pixels
    assert np.isfinite(pixels).all()
    assert 0.02 < pixels.std() < 0.45
    assert not np.array_equal(*pixels)


def test_a_pipeline_of_a_preset_runs_on_the_torch_engine(small):
    pipe = random_pipeline(small, device="cpu")
    assert (pipe.engine.name, pipe.engine.precision) == ("torch", "fp32")
    done = pipe.generate([4], top_k=1)
    assert [tokens.shape for tokens in done.tokens] == [(1, 1), (1, 4), (1, 9)]
    assert done.images[0].size == (6, 6)


def test_what_random_weights_cannot_do_is_said_on_one_line(small):
    with pytest.raises(RequestError, match=r"^unknown preset 'd99'; known: d12, d16, d20, d24, d30, d36-s, small$"):
        random_pipeline("d99")
    with pytest.raises(EngineError, match=r"^engine 'onnx' runs graphs from files, random weights have none; use"):
        random_pipeline(small, engine="onnx")
    with pytest.raises(EngineError, match=r"^random small: has no decoder.onnx, its weights are made in memory"):
        RandomBundle.of_preset(small).file("decoder.onnx")
