"""The reference model against the golden vectors of the published code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from golden import GOLDEN_NAMES, Golden, golden_config, rule_state_dicts
from var_train import VAR, VQVAE, generate

# float32 on a CPU; the vectors come from another build of the same operations.
ATOL = 1e-4


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def case(request: pytest.FixtureRequest) -> tuple[Golden, VAR, VQVAE]:
    golden = Golden.load(request.param)
    var_config, vqvae_config = golden_config(golden)
    var_state, vqvae_state = rule_state_dicts(golden)
    var, vqvae = VAR(var_config).eval(), VQVAE(vqvae_config).eval()
    var.load_state_dict({k: torch.from_numpy(v) for k, v in var_state.items()}, strict=True)
    vqvae.load_state_dict({k: torch.from_numpy(v) for k, v in vqvae_state.items()}, strict=True)
    return golden, var, vqvae


def test_state_dict_keys_and_shapes(case):
    golden, var, vqvae = case
    assert {k: list(v.shape) for k, v in var.state_dict().items()} == golden.keys["var"]
    assert {k: list(v.shape) for k, v in vqvae.state_dict().items()} == golden.keys["vae"]


def test_greedy_generation(case):
    golden, var, vqvae = case
    out = generate(var, vqvae, torch.tensor(golden.config["labels"]), guidance=golden.config["cfg"], top_k=1, top_p=0)
    for k in range(len(out.tokens)):
        np.testing.assert_allclose(out.logits[k].numpy(), golden[f"logits.{k}"], atol=ATOL, rtol=0)
        np.testing.assert_array_equal(out.tokens[k].numpy(), golden[f"tokens.{k}"])
    np.testing.assert_allclose(out.image_B3RR.numpy(), golden["image"], atol=ATOL, rtol=0)


@torch.no_grad()
def test_encoder_and_reconstruction(case):
    golden, _, vqvae = case
    image = torch.from_numpy(golden.test_image())
    tokens = torch.cat(vqvae.tokens(image), dim=1)
    np.testing.assert_array_equal(tokens.numpy(), golden["encoded_tokens"])
    np.testing.assert_allclose(vqvae.reconstruct(image).numpy(), golden["reconstruction"], atol=ATOL, rtol=0)


@torch.no_grad()
def test_teacher_forcing(case):
    golden, var, vqvae = case
    tokens = vqvae.tokens(torch.from_numpy(golden.test_image()))
    features = vqvae.quantize.teacher_forcing_input(tokens)
    np.testing.assert_allclose(features.numpy(), golden["teacher_forcing_input"], atol=ATOL, rtol=0)
    logits = var(torch.tensor(golden.config["labels"]), features)
    np.testing.assert_allclose(logits.numpy(), golden["teacher_forcing_logits"], atol=ATOL, rtol=0)


@torch.no_grad()
def test_one_scale_forward_equals_teacher_forcing(case):
    golden, var, vqvae = case
    labels = torch.tensor(golden.config["labels"])
    features = vqvae.quantize.teacher_forcing_input(vqvae.tokens(torch.from_numpy(golden.test_image())))
    expected = var(labels, features)
    cond, cache, n_0 = var.condition(labels), [], var.config.tokens_per_scale[0]
    for k in range(var.config.num_scales):
        begin, end = var.config.span(k)
        x = var.embed_start(cond) if k == 0 else var.embed_scale(k, features[:, begin - n_0 : end - n_0])
        logits, cache = var.forward_scale(x, cond, cache)
        torch.testing.assert_close(logits, expected[:, begin:end], atol=1e-5, rtol=0)


def test_quantizer_training_pass_matches_inference(case):
    golden, _, vqvae = case
    with torch.no_grad():
        features = vqvae.encode(torch.from_numpy(golden.test_image()))
        straight_through, loss, tokens = vqvae.quantize(features)
        assert torch.equal(torch.cat(tokens, 1), torch.cat(vqvae.quantize.tokens_from_features(features), 1))
        torch.testing.assert_close(straight_through, vqvae.quantize.features_from_tokens(tokens), atol=1e-5, rtol=0)
        assert loss > 0
