"""Rates, decay, groups and progressive scales against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from var_deploy.config import VARConfig
from var_train import VAR
from var_train.recipe import Progressive, Schedule, parameter_groups, token_loss

SCHEDULE = Schedule(iterations=1001, learning_rate=2e-4, warmup=0.1, final=0.1, weight_decay=0.05)
CONFIG = VARConfig(
    patch_nums=(1, 2, 3), vocab_size=17, num_classes=4, depth=2, embed_dim=64, ffn_dim=128, shared_aln=True
)


@pytest.mark.parametrize(
    ("iteration", "part"),
    [
        (0, 0.005),
        (50, 0.005 + 0.995 / 2),  # half of 100 warm-up iterations
        (100, 1.0),
        (144, 1.0),  # flat for a twentieth of the 900 that follow
        (145, 1.0),
        (1000, 0.1),
        (550, 0.1 + 0.9 * 0.5 / 0.95),  # half of the way
    ],
)
def test_the_rate_at_points_worked_out_by_hand(iteration, part):
    assert SCHEDULE.rate_at(iteration) == pytest.approx(2e-4 * part)


@given(
    iterations=st.integers(1, 5000),
    warmup=st.floats(0, 0.9),
    final=st.floats(0.001, 1),
    at=st.floats(0, 1),
)
def test_the_rate_rises_stays_and_falls(iterations, warmup, final, at):
    schedule = Schedule(iterations=iterations, learning_rate=1.0, warmup=warmup, final=final)
    iteration = round(at * (iterations - 1))
    rate, after = schedule.rate_at(iteration), schedule.rate_at(iteration + 1)
    assert 0 < rate <= 1.0 + 1e-9
    if iteration + 1 < schedule.warmup_iterations:
        assert after > rate
    elif iteration >= schedule.warmup_iterations and iteration + 1 < iterations:
        assert after <= rate + 1e-12
        assert after >= final - 1e-9


def test_weight_decay_follows_a_cosine_from_one_value_to_the_other():
    schedule = Schedule(iterations=101, learning_rate=1.0, weight_decay=0.05, final_weight_decay=0.01)
    assert schedule.weight_decay_at(0) == pytest.approx(0.05)
    assert schedule.weight_decay_at(50) == pytest.approx(0.03)
    assert schedule.weight_decay_at(100) == pytest.approx(0.01)
    assert schedule.weight_decay_at(25) == pytest.approx(0.01 + 0.04 * (0.5 + 0.5 * math.cos(math.pi / 4)))


def test_decay_is_for_matrices_alone():
    model = VAR(CONFIG)
    decayed, plain = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with_decay, without = ({names[id(p)] for p in group["params"]} for group in (decayed, plain))
    assert with_decay | without == set(names.values())
    assert not with_decay & without
    assert {"head.weight", "word_embed.weight", "class_emb.weight", "blocks.0.attn.mat_qkv.weight"} <= with_decay
    assert {"pos_start", "pos_1LC", "lvl_embed.weight", "blocks.0.ada_gss", "blocks.1.attn.scale_mul_1H11"} <= without
    assert {name for name in names.values() if name.endswith("bias")} <= without
    optimizer = torch.optim.AdamW([decayed, plain], lr=1.0, betas=(0.9, 0.95))
    SCHEDULE.apply(optimizer, 50)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(0.05), 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {SCHEDULE.rate_at(50)}


def test_frozen_parameters_are_left_out():
    model = VAR(CONFIG)
    model.head.requires_grad_(False)
    grouped = {id(p) for group in parameter_groups(model) for p in group["params"]}
    assert id(model.head.weight) not in grouped
    assert id(model.word_embed.weight) in grouped


def test_scales_are_added_at_even_distances_and_ramped_in():
    schedule = Schedule(iterations=1000, learning_rate=1.0, warmup=0.1)
    progressive = Progressive(first=2, until=0.5, ramp=0.01)

    def at(iteration: int) -> tuple[int, float]:
        return progressive.at(iteration, scales=6, schedule=schedule)

    # 400 iterations after the warm-up for 4 scales: added at 50, 150, 250 and 350 of them.
    assert [at(i) for i in (0, 100, 149)] == [(2, 1.0)] * 3
    assert [at(i)[0] for i in (150, 249, 250, 349, 350, 449, 450, 999)] == [3, 3, 4, 4, 5, 5, 6, 6]
    assert at(150) == (3, 0.01)
    assert at(155) == (3, 0.5)
    assert at(160) == (3, 1.0)
    assert at(455) == (6, 0.5)
    assert at(999) == (6, 1.0)


@pytest.mark.parametrize("first", [3, 7])
def test_all_scales_from_the_start_are_never_ramped(first):
    progressive = Progressive(first=first, until=0.5, ramp=0.5)
    assert {progressive.at(i, scales=3, schedule=SCHEDULE) for i in (0, 500, 1000)} == {(3, 1.0)}


def test_the_loss_of_all_tokens_is_their_mean():
    logits_BLV, tokens_BL = torch.randn(3, 14, 17), torch.randint(17, (3, 14))
    expected = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
    torch.testing.assert_close(token_loss(logits_BLV, tokens_BL, CONFIG), expected)


def test_the_newest_scale_weighs_less_and_missing_ones_nothing():
    logits_BlV, tokens_Bl = torch.randn(2, 5, 17), torch.randint(17, (2, 5))  # scales of 1 and 4 tokens
    nats_Bl = -logits_BlV.log_softmax(-1).gather(2, tokens_Bl[..., None])[..., 0]
    by_hand = (nats_Bl[:, :1].sum() + 0.25 * nats_Bl[:, 1:].sum()) / 14 / 2
    torch.testing.assert_close(token_loss(logits_BlV, tokens_Bl, CONFIG, newest=0.25), by_hand)
