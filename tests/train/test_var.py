"""The transformer's own rules: who attends to whom, what differs while training, how it starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from var_deploy.config import VARConfig
from var_train import VAR
from var_train.presets import randomise
from var_train.var import DropPath, scale_index_and_mask

VARIANTS = {
    "own": {},
    "shared": {"shared_aln": True},
    "plain": {"attn_l2_norm": False},
    "shared_plain": {"shared_aln": True, "attn_l2_norm": False},
}


def config(**changes: Any) -> VARConfig:
    fields = {
        "patch_nums": (2, 3, 5),
        "vocab_size": 37,
        "z_channels": 6,
        "num_classes": 4,
        "depth": 3,
        "embed_dim": 128,
        "ffn_dim": 200,
    }
    return VARConfig(**{**fields, **changes})


def model(**changes: Any) -> VAR:
    var = VAR(config(**changes))
    randomise(var)
    return var.eval().requires_grad_(False)


def inputs(var: VAR, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [B] and features [B, L − n_0, C]."""
    random, c = torch.Generator().manual_seed(3), var.config
    later = c.num_tokens - c.tokens_per_scale[0]
    return torch.arange(rows) % c.num_classes, torch.randn(rows, later, c.z_channels, generator=random)


# Attention ------------------------------------------------------------------------------------------------------------


def test_mask_is_block_causal():
    """Written out by hand for sides 1 and 2: the first token sees itself, the four others see all five."""
    lvl, bias = scale_index_and_mask(config(patch_nums=(1, 2)))
    assert lvl.tolist() == [[0, 1, 1, 1, 1]]
    inf = math.inf
    assert bias.tolist() == [[[[0, -inf, -inf, -inf, -inf], *[[0, 0, 0, 0, 0]] * 4]]]


def test_mask_and_scale_index_are_state_with_the_published_types():
    state = model().state_dict()
    assert state["lvl_1L"].dtype == torch.int64
    assert state["lvl_1L"].shape == (1, 38)
    assert state["attn_bias_for_masking"].shape == (1, 1, 38, 38)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_depends_on_a_finer_scale(variant):
    """Changing scale 2's input moves scale 2's logits, all of them, and no other's."""
    var = model(**VARIANTS[variant])
    labels, features = inputs(var)
    changed = features.clone()
    changed[:, -1] += 1  # the last token of the last scale
    before, after = var(labels, features), var(labels, changed)
    moved = (before != after).any(dim=-1)
    begin, end = var.config.span(2)
    assert not moved[:, :begin].any()
    assert moved[:, begin:end].all()  # inside a scale every token sees every other


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_scale_forward_with_a_cache_equals_the_full_forward(variant):
    var = model(**VARIANTS[variant])
    labels, features = inputs(var, rows=3)
    expected, cond, cache = var(labels, features), var.condition(labels), []
    n_0 = var.config.tokens_per_scale[0]
    for k in range(var.config.num_scales):
        begin, end = var.config.span(k)
        x = var.embed_start(cond) if k == 0 else var.embed_scale(k, features[:, begin - n_0 : end - n_0])
        given = [tensor.clone() for pair in cache for tensor in pair]
        logits, grown = var.forward_scale(x, cond, cache)
        assert all(torch.equal(a, b) for a, b in zip(given, [t for pair in cache for t in pair], strict=True))
        assert all(k.shape == v.shape == (3, 2, end, 64) for k, v in grown)
        # float32; the two sum attention over different lengths.
        torch.testing.assert_close(logits, expected[:, begin:end], atol=1e-5, rtol=1e-5)
        cache = grown


def test_rows_do_not_influence_each_other():
    var = model()
    labels, features = inputs(var, rows=3)
    alone = torch.cat([var(labels[i : i + 1], features[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(var(labels, features), alone, atol=1e-5, rtol=1e-5)  # batched products round differently


def test_l2_attention_ignores_the_length_of_queries_and_caps_its_scale():
    """Queries and keys ten times as long give the same logits; a scale beyond ln 100 counts as ln 100."""
    var, long = model(depth=1), model(depth=1)
    attn = long.blocks[0].attn
    attn.mat_qkv.weight[:256] *= 10
    attn.q_bias *= 10
    labels, features = inputs(var)
    torch.testing.assert_close(var(labels, features), long(labels, features), atol=1e-5, rtol=1e-5)
    var.blocks[0].attn.scale_mul_1H11.fill_(math.log(100))
    long.blocks[0].attn.scale_mul_1H11.fill_(9.0)
    torch.testing.assert_close(var(labels, features), long(labels, features), atol=1e-4, rtol=1e-4)  # sharp softmax


def test_plain_attention_is_a_softmax_at_a_quarter_of_the_usual_scale():
    var = model(depth=1, attn_l2_norm=False, embed_dim=64)
    attn, x = var.blocks[0].attn, torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = (x @ attn.mat_qkv.weight.T + torch.cat([attn.q_bias, torch.zeros(64), attn.v_bias])).chunk(3, dim=-1)
    expected = (q @ k.transpose(1, 2) * 0.25 / 8).softmax(-1) @ v @ attn.proj.weight.T + attn.proj.bias
    torch.testing.assert_close(attn(x, None, None)[0], expected, atol=1e-5, rtol=1e-5)


def test_key_bias_is_stored_but_stays_zero():
    var = VAR(config())
    names = {name for name, _ in var.named_parameters()}
    assert "blocks.0.attn.zero_k_bias" in var.state_dict()
    assert "blocks.0.attn.zero_k_bias" not in names
    assert not var.blocks[0].attn.zero_k_bias.any()


# Modulation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_gammas_switch_a_block_off(variant):
    """With both gammas 0 the blocks pass their input on, so depth makes no difference."""
    var = model(**VARIANTS[variant])
    D = var.config.embed_dim
    if var.config.shared_aln:
        var.shared_ada_lin[1].weight[: 2 * D] = 0
        var.shared_ada_lin[1].bias[: 2 * D] = 0
    for block in var.blocks:
        if var.config.shared_aln:
            block.ada_gss[:, :, :2] = 0
        else:
            block.ada_lin[1].weight[: 2 * D] = 0
            block.ada_lin[1].bias[: 2 * D] = 0
    labels, features = inputs(var)
    got = var(labels, features)
    var.blocks = var.blocks[:1]
    torch.testing.assert_close(got, var(labels, features), atol=0, rtol=0)


def test_logits_are_float32_under_autocast():
    var = model()
    labels, features = inputs(var)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert var(labels, features).dtype == torch.float32


# Training -------------------------------------------------------------------------------------------------------------


def test_drop_path_drops_whole_rows_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.3)
    dropped = drop(torch.ones(4000, 2, 3), torch.rand(4000))
    assert ((dropped == 0) | torch.isclose(dropped, torch.tensor(1 / 0.7))).all()
    assert torch.equal(dropped.amax((1, 2)), dropped.amin((1, 2)))
    share = (dropped[:, 0, 0] == 0).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.03)  # four standard deviations of 4000 draws
    assert torch.equal(drop.eval()(torch.ones(5, 2, 3), torch.zeros(5)), torch.ones(5, 2, 3))


def test_drop_path_grows_linearly_to_a_tenth_of_depth_24():
    rates = [block.drop_path.probability for block in VAR(config(depth=5)).blocks]
    assert rates == pytest.approx([0.1 * 5 / 24 * i / 4 for i in range(5)])
    assert [block.drop_path.probability for block in VAR(config(depth=2), drop_path=0.4).blocks] == [0.0, 0.4]
    assert [block.drop_path.probability for block in VAR(config(depth=1)).blocks] == [0.0]


def test_evaluation_is_deterministic_and_training_is_not():
    var = VAR(config(), drop_path=0.5, label_dropout=0.5)
    randomise(var)
    labels, features = inputs(var, rows=8)
    with torch.no_grad():
        var.eval()
        assert torch.equal(var(labels, features), var(labels, features))
        var.train()
        torch.manual_seed(0)
        assert not torch.equal(var(labels, features), var(labels, features))


def test_label_dropout_replaces_labels_by_the_null_class_at_its_rate(monkeypatch):
    var = VAR(config(depth=1, embed_dim=64), drop_path=0.0, label_dropout=0.1)
    seen: list[torch.Tensor] = []
    original = var.condition
    monkeypatch.setattr(var, "condition", lambda labels: seen.append(labels) or original(labels))
    labels = torch.arange(3000) % 4
    features = torch.zeros(3000, 34, 6)
    torch.manual_seed(1)
    with torch.no_grad():
        var.train()(labels[:, None].squeeze(1), features)
        var.eval()(labels[:5], features[:5])
    null = seen[0] == var.config.null_class
    assert null.float().mean().item() == pytest.approx(0.1, abs=0.022)  # four standard deviations
    assert torch.equal(seen[0][~null], labels[~null])
    assert torch.equal(seen[1], labels[:5])
    assert torch.equal(labels, torch.arange(3000) % 4)  # the caller's tensor is not written to


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_fare_alike_in_whichever_batch_they_are_trained(variant):
    """Label dropout and stochastic depth are decided by numbers of the row's own."""
    var = VAR(config(**VARIANTS[variant]), drop_path=0.6, label_dropout=0.4)
    randomise(var)
    labels, features = inputs(var, rows=6)
    uniforms = torch.rand(var.num_uniforms, 6)
    with torch.no_grad():
        together = var.train()(labels, features, uniforms)
        parts = [var(labels[rows], features[rows], uniforms[:, rows]) for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(var(labels, features, torch.rand(var.num_uniforms, 6)), together, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_scales_alone_are_a_prefix_of_all(variant):
    var = model(**VARIANTS[variant])
    labels, features = inputs(var)
    n_0 = var.config.tokens_per_scale[0]
    with torch.no_grad():
        everything = var(labels, features)
        for scales in range(1, var.config.num_scales):
            end = var.config.span(scales - 1)[1]
            first = var(labels, features[:, : end - n_0])
            torch.testing.assert_close(first, everything[:, :end], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_flex_attention_sees_what_the_mask_lets_through(variant):
    var = model(**VARIANTS[variant])
    labels, features = inputs(var)
    with torch.no_grad():
        expected = var(labels, features)
        var.flex_attention = True
        torch.testing.assert_close(var(labels, features), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_blocks_give_the_same_gradients(variant):
    var = VAR(config(**VARIANTS[variant]), drop_path=0.5)
    randomise(var)
    labels, features = inputs(var)
    uniforms = torch.rand(var.num_uniforms, len(labels))
    gradients = []
    for on in (False, True):
        var.checkpoint_blocks = on
        var.zero_grad()
        var(labels, features, uniforms).square().mean().backward()
        gradients.append([p.grad.clone() for p in var.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    var = VAR(config(**VARIANTS[variant]), label_dropout=0.0)
    randomise(var)
    labels, features = inputs(var)
    var(labels, features).square().mean().backward()
    without = [name for name, p in var.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


# Initialisation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_initialisation_has_the_published_statistics(shared):
    torch.manual_seed(0)
    var = VAR(config(embed_dim=256, ffn_dim=1024, depth=4, vocab_size=500, shared_aln=shared))
    var.init_weights(gamma_scale=1e-4)
    std, D, state = math.sqrt(1 / (3 * 256)), 256, var.state_dict()

    def spread(tensor: torch.Tensor) -> float:
        return tensor.std().item() / std

    # Sampling error of a standard deviation is 1/√(2N): under 2 % for the smallest tensor here.
    for key, factor in {
        "word_embed.weight": 1,
        "class_emb.weight": 1,
        "lvl_embed.weight": 1,
        "pos_start": 1,
        "pos_1LC": 1,
        "blocks.2.attn.mat_qkv.weight": 1,
        "blocks.2.attn.proj.weight": 1 / math.sqrt(8),
        "blocks.2.ffn.fc1.weight": 1,
        "blocks.2.ffn.fc2.weight": 1 / math.sqrt(8),
        "head.weight": 0.02,
        "head_nm.ada_lin.1.weight": 0.5,
    }.items():
        assert spread(state[key]) == pytest.approx(factor, rel=0.06), key
    if shared:
        assert spread(state["shared_ada_lin.1.weight"]) == pytest.approx(1, rel=0.06)
        gss = state["blocks.2.ada_gss"][0, 0]
        assert gss[2:].std().item() == pytest.approx(0.5 / math.sqrt(D), rel=0.1)
        assert gss[:2].std().item() == pytest.approx(1e-4 / math.sqrt(D), rel=0.1)
    else:
        weight = state["blocks.2.ada_lin.1.weight"]
        assert spread(weight[2 * D :]) == pytest.approx(0.5, rel=0.06)
        assert spread(weight[: 2 * D]) == pytest.approx(1e-4, rel=0.06)
    biases = [key for key in state if key.endswith(("bias", "q_bias", "v_bias")) and "zero_k" not in key]
    assert len(biases) > 10
    assert not any(state[key].any() for key in biases)
    assert torch.equal(state["blocks.1.attn.scale_mul_1H11"], torch.full((1, 4, 1, 1), math.log(4.0)))


def test_initialised_model_predicts_almost_uniformly():
    torch.manual_seed(0)
    var = VAR(config()).eval()
    var.init_weights()
    with torch.no_grad():
        logits = var(*inputs(var))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(37, (2 * 38,)))
    assert loss.item() == pytest.approx(math.log(37), abs=0.05)
