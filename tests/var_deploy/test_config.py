"""Configurations: derived values, the choice of φ, error texts, and the way to JSON and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from var_deploy.config import ConfigError, VARConfig, VQVAEConfig, config_from_dict, config_to_dict
from var_deploy.errors import VarDeployError

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

VAR = {
    "patch_nums": (1, 2, 5),
    "vocab_size": 37,
    "num_classes": 7,
    "depth": 3,
    "embed_dim": 192,
    "ffn_dim": 500,
}
VQVAE = {"patch_nums": (1, 2, 5), "vocab_size": 37}


def test_token_counts_of_the_published_scale_lists():
    assert VQVAEConfig(patch_nums=SCALES_256, vocab_size=4096).num_tokens == 680
    assert VQVAEConfig(patch_nums=SCALES_512, vocab_size=4096).num_tokens == 2240


def test_derived_values():
    var, vqvae = VARConfig(**VAR), VQVAEConfig(**VQVAE, ch_mult=(1, 2, 4))
    assert (var.num_scales, var.tokens_per_scale, var.num_tokens, var.latent_size) == (3, (1, 4, 25), 30, 5)
    assert [var.span(k) for k in range(3)] == [(0, 1), (1, 5), (5, 30)]
    assert [var.ratio(k) for k in range(3)] == [0.0, 0.5, 1.0]
    assert (var.num_heads, var.null_class) == (3, 7)
    assert (vqvae.downsampling, vqvae.image_size) == (4, 20)


@pytest.mark.parametrize(
    ("patch_nums", "num_phi", "layout", "expected"),
    [
        (SCALES_256, 4, "partial", [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),  # scales 2 and 7 lie half-way: rounding decides
        (SCALES_256, 1, "single", [0] * 10),
        (SCALES_256, 10, "per_scale", list(range(10))),
        ((1, 2, 3, 4), 4, "partial", [0, 1, 2, 3]),
        ((1, 2, 3, 4), 4, "per_scale", [0, 1, 2, 3]),
        ((1, 2, 3, 5, 8), 2, "partial", [0, 0, 0, 1, 1]),  # ¼ and ¾: the middle is equally near, the first wins
        ((2, 3), 3, "partial", [0, 2]),
    ],
)
def test_phi_of_every_scale(patch_nums, num_phi, layout, expected):
    config = VQVAEConfig(patch_nums=patch_nums, vocab_size=9, num_phi=num_phi, phi_layout=layout)
    assert [config.phi_index(k) for k in range(len(patch_nums))] == expected


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (VARConfig, {"patch_nums": (3,)}, "patch_nums: got (3,), expected a tuple of at least two positive integers"),
        (VARConfig, {"patch_nums": (1, 0)}, "patch_nums: got (1, 0), expected a tuple of at least two positive"),
        (VARConfig, {"patch_nums": (1, 2.0)}, "patch_nums: got (1, 2.0), expected a tuple of at least two positive"),
        (VARConfig, {"patch_nums": (1, 3, 3)}, "patch_nums: got (1, 3, 3), expected strictly growing sides"),
        (VARConfig, {"depth": 0}, "depth: got 0, expected a positive integer"),
        (VARConfig, {"depth": True}, "depth: got True, expected a positive integer"),
        (VARConfig, {"num_classes": "10"}, "num_classes: got '10', expected a positive integer"),
        (VARConfig, {"embed_dim": 100}, "embed_dim: got 100, expected a multiple of the head width 64"),
        (VARConfig, {"shared_aln": 1}, "shared_aln: got 1, expected true or false"),
        (VQVAEConfig, {"ch": 40}, "ch: got 40, expected a multiple of 32, the GroupNorm groups"),
        (VQVAEConfig, {"ch_mult": ()}, "ch_mult: got (), expected a tuple of positive integers"),
        (VQVAEConfig, {"phi_layout": "each"}, "phi_layout: got 'each', expected 'partial', 'single' or 'per_scale'"),
        (VQVAEConfig, {"phi_layout": "single"}, "num_phi: got 4, expected 1 with phi_layout 'single'"),
        (VQVAEConfig, {"using_znorm": "no"}, "using_znorm: got 'no', expected true or false"),
    ],
)
def test_an_impossible_value_is_named(cls, change, message):
    with pytest.raises(ConfigError) as caught:
        cls(**{**(VAR if cls is VARConfig else VQVAE), **change})
    assert message in str(caught.value)
    assert isinstance(caught.value, VarDeployError)


@given(
    sides=st.sets(st.integers(1, 70), min_size=2, max_size=14),
    phi=st.integers(1, 14),
    znorm=st.booleans(),
    mult=st.lists(st.integers(1, 8), min_size=1, max_size=6),
)
def test_round_trip_through_json(sides, phi, znorm, mult):
    config = VQVAEConfig(
        patch_nums=tuple(sorted(sides)), vocab_size=11, num_phi=phi, using_znorm=znorm, ch_mult=tuple(mult)
    )
    data = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(VQVAEConfig, data) == config
    assert all(0 <= config.phi_index(k) < phi for k in range(config.num_scales))


def test_unknown_and_missing_keys_are_errors():
    data = config_to_dict(VARConfig(**VAR))
    with pytest.raises(ConfigError, match=r"VARConfig: unknown keys \['heads'\], known are \['attn_l2_norm', "):
        config_from_dict(VARConfig, {**data, "heads": 3})
    del data["depth"], data["ffn_dim"]
    with pytest.raises(ConfigError, match=r"VARConfig: missing keys \['depth', 'ffn_dim'\]"):
        config_from_dict(VARConfig, data)
