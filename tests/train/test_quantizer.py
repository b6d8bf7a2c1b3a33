"""The multi-scale quantiser by its formulas: nearest code, φ selection, loss, straight-through gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from var_deploy.config import VQVAEConfig
from var_train import MultiScaleQuantizer
from var_train.presets import SCALES_256, randomise
from var_train.quantizer import Phi


def quantizer(**changes: Any) -> MultiScaleQuantizer:
    fields = {"patch_nums": (1, 2, 5), "vocab_size": 19, "z_channels": 6, "ch": 32, "num_phi": 3}
    result = MultiScaleQuantizer(VQVAEConfig(**{**fields, **changes}))
    randomise(result)
    return result


def features(q: MultiScaleQuantizer, rows: int = 2) -> torch.Tensor:
    c = q.config
    random = torch.Generator().manual_seed(4)
    return torch.randn(rows, c.z_channels, c.latent_size, c.latent_size, generator=random)


@torch.no_grad()
def test_nearest_is_the_smallest_distance_in_row_major_order():
    q = quantizer()
    q.embedding.weight.mul_(torch.linspace(1, 6, 19)[:, None])  # of different lengths, so that they count
    z = features(q)
    got = q.nearest(z)
    assert got.shape == (2, 25)
    for b, row, column in itertools.product(range(2), range(5), range(5)):
        distances = [(z[b, :, row, column] - code).square().sum().item() for code in q.embedding.weight]
        assert got[b, row * 5 + column] == distances.index(min(distances))


@torch.no_grad()
def test_znorm_takes_the_largest_cosine():
    q = quantizer(using_znorm=True)
    q.embedding.weight[3] *= 100  # length does not matter
    z = features(q)
    cosine = F.cosine_similarity(z.flatten(2).transpose(1, 2)[:, :, None], q.embedding.weight[None, None], dim=-1)
    assert torch.equal(q.nearest(z), cosine.argmax(-1))
    by_distance = quantizer()
    by_distance.load_state_dict(q.state_dict())
    assert not torch.equal(by_distance.nearest(z), q.nearest(z))


@torch.no_grad()
def test_phi_is_half_identity_half_convolution():
    phi = quantizer().phi(1)
    x = torch.randn(2, 6, 5, 5)
    expected = 0.5 * x + 0.5 * F.conv2d(x, phi.weight, phi.bias, padding=1)
    torch.testing.assert_close(phi(x), expected)


@pytest.mark.parametrize(
    ("scales", "num_phi", "layout", "chosen", "keys"),
    [
        ((1, 2, 5), 1, "single", [0, 0, 0], ["qresi"]),
        ((1, 2, 5), 3, "per_scale", [0, 1, 2], ["0", "1", "2"]),
        # Ticks 1/12, 13/36, 23/36, 11/12 against 0, 1/3, 2/3, 1.
        ((1, 2, 3, 4), 4, "partial", [0, 1, 2, 3], ["qresi_ls.0", "qresi_ls.1", "qresi_ls.2", "qresi_ls.3"]),
        # Ticks 1/4, 3/4: the middle of five scales is equally near to both, and the first wins.
        ((1, 2, 3, 4, 5), 2, "partial", [0, 0, 0, 1, 1], ["qresi_ls.0", "qresi_ls.1"]),
        # The published model: at scales 2 and 7 two ticks are equally near but for the last bit of float64.
        (SCALES_256, 4, "partial", [0, 0, 1, 1, 1, 2, 2, 3, 3, 3], [f"qresi_ls.{i}" for i in range(4)]),
    ],
)
def test_phi_layouts(scales, num_phi, layout, chosen, keys):
    q = quantizer(patch_nums=scales, num_phi=num_phi, phi_layout=layout)
    modules = [m for m in q.quant_resi.modules() if isinstance(m, Phi)]
    indices = [next(i for i, m in enumerate(modules) if m is q.phi(k)) for k in range(len(scales))]
    assert indices == chosen
    stored = {key.removeprefix("quant_resi.").rsplit(".", 1)[0] for key in q.state_dict() if "quant_resi" in key}
    assert stored == set(keys)


@torch.no_grad()
def test_contribution_and_shrinking_by_hand():
    q = quantizer()
    codes = torch.randn(2, 4, 6)
    enlarged = F.interpolate(codes.transpose(1, 2).reshape(2, 6, 2, 2), size=(5, 5), mode="bicubic")
    torch.testing.assert_close(q.contribution(1, codes), q.phi(1)(enlarged))
    f = features(q)
    torch.testing.assert_close(q.next_features(0, f)[:, 0], f.mean((2, 3)))
    # 5 cells to 2: an output cell covers 2.5 cells, and area interpolation takes all 3 it touches.
    torch.testing.assert_close(q.next_features(1, f)[:, 1], f[:, :, 0:3, 2:5].mean((2, 3)))
    torch.testing.assert_close(q.next_features(2, f), f.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_tokens_code_the_residual_scale_by_scale():
    q = quantizer()
    f = features(q)
    tokens = q.tokens_from_features(f)
    assert [t.shape for t in tokens] == [(2, 1), (2, 4), (2, 25)]
    for k in range(3):
        so_far = q.features_from_tokens(tokens[:k]) if k else torch.zeros_like(f)
        assert torch.equal(tokens[k], q.nearest(q.shrink(k, f - so_far)))


@torch.no_grad()
def test_teacher_forcing_input_is_the_shrunk_sum_of_coarser_scales():
    q = quantizer()
    tokens = q.tokens_from_features(features(q))
    got = q.teacher_forcing_input(tokens)
    assert got.shape == (2, 29, 6)
    torch.testing.assert_close(got[:, :4], q.next_features(1, q.features_from_tokens(tokens[:1])))
    torch.testing.assert_close(got[:, 4:], q.next_features(2, q.features_from_tokens(tokens[:2])))


def test_loss_by_hand():
    q = quantizer()
    f = features(q).requires_grad_()
    _, loss, tokens = q(f)
    partial_sums = [q.features_from_tokens(tokens[: k + 1]) for k in range(3)]
    per_scale = [1.25 * (partial - f).square().mean() for partial in partial_sums]
    torch.testing.assert_close(loss, sum(per_scale) / 3)
    # Gradients: a quarter of the weight pulls the encoder, the rest the codebook.
    by_hand = sum(0.25 * 2 * (f - partial).detach() / f.numel() for partial in partial_sums) / 3
    loss.backward()
    torch.testing.assert_close(f.grad, by_hand)
    for parameter in q.parameters():
        assert parameter.grad is not None
    assert q.embedding.weight.grad.any()


def test_straight_through_passes_the_gradient_to_the_encoder_unchanged():
    q = quantizer()
    f = features(q).requires_grad_()
    quantised, _, tokens = q(f)
    torch.testing.assert_close(quantised, q.features_from_tokens(tokens), atol=1e-5, rtol=0)  # f + (f_hat − f)
    given = torch.randn_like(f)
    quantised.backward(given)
    assert torch.equal(f.grad, given)
    assert all(parameter.grad is None for parameter in q.parameters())


def test_usage_statistics_are_state_but_not_trained():
    q = quantizer()
    assert q.state_dict()["ema_vocab_hit_SV"].shape == (3, 19)
    assert "ema_vocab_hit_SV" not in dict(q.named_parameters())
