"""The deploy view says what it will make, makes exactly that, and rewrites the published weights without loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from var_export.deploy_view import LazyWeight, deploy_weights
from var_train.checkpoint import CheckpointPair


def values(pair: CheckpointPair) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(weight.numpy().copy()) for name, weight in deploy_weights(pair).items()}


def test_every_declared_shape_is_what_is_made(odd):
    for name, weight in deploy_weights(odd.pair).items():
        array = weight.numpy()
        assert array.shape == weight.shape, name
        assert array.dtype == np.float32, name
        assert array.nbytes == weight.nbytes, name
        assert array.flags.c_contiguous, name


def test_a_weight_that_is_not_what_it_declares_is_a_bug_that_shows():
    with pytest.raises(AssertionError, match=r"made float32 \(2, 3\), declared float32 \(3, 2\)"):
        LazyWeight((3, 2), lambda: torch.zeros(2, 3)).numpy()
    with pytest.raises(AssertionError, match="made float64"):
        LazyWeight((2,), lambda: torch.zeros(2, dtype=torch.float64)).numpy()


def test_nothing_is_computed_before_a_weight_is_written(odd_states):
    var, vqvae, var_state, vqvae_state = odd_states("shared_aln")
    weights = deploy_weights(CheckpointPair(var, vqvae, var_state, vqvae_state))
    changed = var_state["head.weight"].add_(1.0)
    np.testing.assert_array_equal(weights["head.weight"].numpy(), changed.numpy().T)


def test_matrices_are_transposed_and_nothing_is_lost(odd):
    got, state = values(odd.pair), odd.pair.var_state
    renamed = {"attn.mat_qkv": "attn.qkv", "ada_lin.1": "ada_lin"}
    matrices = 0
    for key, tensor in state.items():
        if tensor.dim() == 2 and key.endswith("weight") and "emb." not in key and "lvl_embed" not in key:
            for theirs, ours in renamed.items():
                key = key.replace(theirs, ours)
            assert torch.equal(got[key], tensor.T), key
            matrices += 1
    assert matrices == odd.var.config.depth * (4 if odd.var.config.shared_aln else 5) + 3 + odd.var.config.shared_aln


def test_one_is_folded_into_the_scales_and_nothing_else(odd):
    got, state, D = values(odd.pair), odd.pair.var_state, odd.var.config.embed_dim
    keys = (
        ["shared_ada_lin"] if odd.var.config.shared_aln else [f"blocks.{i}.ada_lin" for i in range(len(odd.var.blocks))]
    )
    for key in keys:
        added = got[f"{key}.bias"].view(6, D) - state[f"{key}.1.bias"].view(6, D)
        expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0])[:, None].expand(6, D)
        torch.testing.assert_close(added, expected, atol=1e-6, rtol=0)  # one rounding of 1 + bias
    added = got["head_nm.ada_lin.bias"].view(2, D) - state["head_nm.ada_lin.1.bias"].view(2, D)
    torch.testing.assert_close(added, torch.tensor([[1.0], [0.0]]).expand(2, D), atol=1e-6, rtol=0)


def test_attention_biases_are_merged_and_scales_exponentiated(odd):
    got, state, config = values(odd.pair), odd.pair.var_state, odd.var.config
    for i in range(config.depth):
        q, k, v = got[f"blocks.{i}.attn.qkv.bias"].chunk(3)
        assert torch.equal(q, state[f"blocks.{i}.attn.q_bias"])
        assert torch.equal(v, state[f"blocks.{i}.attn.v_bias"])
        assert not k.any()
        name = f"blocks.{i}.attn.q_scale"
        assert (name in got) == config.attn_l2_norm
        if config.attn_l2_norm:
            expected = state[f"blocks.{i}.attn.scale_mul_1H11"].view(-1, 1, 1).exp()
            torch.testing.assert_close(got[name], expected, atol=0, rtol=1e-6)  # exp of two libraries


def test_scale_beyond_its_cap_is_capped_at_100(odd_states):
    var, vqvae, var_state, vqvae_state = odd_states("three_heads")
    var_state["blocks.1.attn.scale_mul_1H11"] = torch.tensor([0.0, math.log(99.0), 7.5]).view(1, 3, 1, 1)
    got = values(CheckpointPair(var, vqvae, var_state, vqvae_state))["blocks.1.attn.q_scale"]
    torch.testing.assert_close(got.flatten(), torch.tensor([1.0, 99.0, 100.0]), atol=0, rtol=1e-6)


def test_position_table_holds_level_position_and_word_bias(odd):
    got, state, n_0 = values(odd.pair), odd.pair.var_state, odd.var.config.tokens_per_scale[0]
    level_LD = state["lvl_embed.weight"][state["lvl_1L"][0]]
    expected_LD = level_LD + state["pos_1LC"][0]
    torch.testing.assert_close(got["position"], (expected_LD + state["word_embed.bias"])[n_0:], atol=1e-6, rtol=0)
    torch.testing.assert_close(got["start_position"], expected_LD[:n_0] + state["pos_start"][0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_phi_becomes_one_convolution_per_phi(odd):
    got, C = values(odd.pair), odd.vqvae.config.z_channels
    x_BChw = torch.randn(2, C, 5, 7, generator=torch.Generator().manual_seed(0))
    used = {odd.vqvae.config.phi_index(k): odd.vqvae.quantize.phi(k) for k in range(odd.vqvae.config.num_scales)}
    assert got["quantize.phi.weight"].shape[0] == odd.vqvae.config.num_phi * C
    for index, phi in used.items():
        weight, bias = (got[f"quantize.phi.{leaf}"][index * C : (index + 1) * C] for leaf in ("weight", "bias"))
        folded = torch.nn.functional.conv2d(x_BChw, weight, bias, padding=1)
        torch.testing.assert_close(folded, phi(x_BChw), atol=1e-5, rtol=0)  # sums of 9·C products in another order


def test_convolutions_and_codebook_are_taken_as_they_are(odd):
    got, state = values(odd.pair), odd.pair.vqvae_state
    kept = [key for key in state if not key.startswith("quantize.")] + ["quantize.embedding.weight"]
    assert kept
    assert all(torch.equal(got[key], state[key]) for key in kept)
    assert not any("ema_vocab" in name for name in got)


def test_half_precision_state_gives_the_same_view_as_its_float32_copy(odd_states):
    var, vqvae, *states = odd_states("shared_aln")
    half = [{k: v.half() if v.is_floating_point() else v for k, v in state.items()} for state in states]
    full = [{k: v.float() if v.is_floating_point() else v for k, v in state.items()} for state in half]
    got, expected = values(CheckpointPair(var, vqvae, *half)), values(CheckpointPair(var, vqvae, *full))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_state_of_trainable_parameters_is_read_like_any_other(odd_states):
    """A checkpoint may hold Parameters instead of plain tensors."""
    var, vqvae, *states = odd_states("plain_attention")
    trainable = [
        {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()} for state in states
    ]
    got, expected = values(CheckpointPair(var, vqvae, *trainable)), values(CheckpointPair(var, vqvae, *states))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
