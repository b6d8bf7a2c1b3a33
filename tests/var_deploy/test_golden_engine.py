"""Both engines against the golden vectors of the published code; the ONNX Runtime engine with both kinds of graphs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import var_deploy
from golden import GOLDEN_NAMES, Golden
from var_deploy.engines import Graphs

#: What runs a bundle, all in float32: as arguments of `load`.
ENGINES = {
    **{f"onnx-{graphs}": {"engine": "onnx", "graphs": graphs} for graphs in Graphs},
    "torch": {"engine": "torch", "precision": "fp32"},
}

# float32 on a CPU; the vectors come from another build of the same operations.
ATOL = 1e-4

Case = tuple[Golden, var_deploy.Pipeline]


@pytest.fixture(scope="module", params=list(itertools.product(GOLDEN_NAMES, ENGINES)), ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    name, engine = request.param
    golden: Golden = request.getfixturevalue(f"{name}_pair")[0]
    bundle: Path = request.getfixturevalue(f"{name}_bundle")
    return golden, var_deploy.load(bundle, device="cpu", **ENGINES[engine])


def test_logits_of_every_scale_given_the_golden_tokens(case: Case):
    golden, pipe = case
    config, engine = pipe.bundle.manifest.var, pipe.engine
    labels = golden.config["labels"]
    codebook_VC = pipe.bundle.weight("quantize.embedding.weight")
    state, codes_RnC = engine.begin(np.array(labels + [config.null_class] * len(labels))), None
    for k in range(config.num_scales):
        logits_RnV = engine.step(state, k, codes_RnC)
        np.testing.assert_allclose(logits_RnV, golden[f"logits.{k}"], atol=ATOL, rtol=0, err_msg=f"scale {k}")
        codes_RnC = np.tile(codebook_VC[golden[f"tokens.{k}"]], (2, 1, 1))
    pixels = engine.decode(engine.finish(state, codes_RnC[: len(labels)]))
    np.testing.assert_allclose(pixels, golden["image"], atol=ATOL, rtol=0)


def test_greedy_generation(case: Case):
    golden, pipe = case
    out = pipe.generate(golden.config["labels"], guidance=golden.config["cfg"], top_k=1, top_p=0)
    for k, tokens_Bn in enumerate(out.tokens):
        assert tokens_Bn.dtype == np.int64
        np.testing.assert_array_equal(tokens_Bn, golden[f"tokens.{k}"], err_msg=f"scale {k}")
    assert out.pixels.dtype == np.float32
    np.testing.assert_allclose(out.pixels, golden["image"], atol=ATOL, rtol=0)


def test_greedy_generation_does_not_depend_on_the_seed(case: Case):
    golden, pipe = case
    out = pipe.generate(golden.config["labels"], seeds=2**40, guidance=golden.config["cfg"], top_k=1, top_p=0)
    np.testing.assert_array_equal(np.concatenate(out.tokens, 1), _golden_tokens(golden))


def test_decoding_the_golden_tokens(case: Case):
    golden, pipe = case
    tokens = [golden[f"tokens.{k}"] for k in range(pipe.bundle.manifest.var.num_scales)]
    np.testing.assert_allclose(pipe.decode(tokens), golden["image"], atol=ATOL, rtol=0)


def test_encoding_and_reconstruction(case: Case):
    golden, pipe = case
    unit_B3RR = (golden.test_image() + 1) / 2
    tokens = pipe.encode(unit_B3RR)
    np.testing.assert_array_equal(np.concatenate(tokens, axis=1), golden["encoded_tokens"])
    # The vectors are in [−1, 1], twice as wide as pixels.
    reconstruction = 2 * pipe.reconstruct(unit_B3RR) - 1
    np.testing.assert_allclose(reconstruction, golden["reconstruction"], atol=ATOL, rtol=0)


def _golden_tokens(golden: Golden) -> np.ndarray:
    return np.concatenate([golden[f"tokens.{k}"] for k in range(len(golden.config["patch_nums"]))], axis=1)
