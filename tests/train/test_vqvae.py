"""The convolutional VQVAE: levels and sizes, published padding, gradients, usage statistics of other scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from var_deploy.config import VQVAEConfig
from var_train import VQVAE
from var_train.presets import randomise
from var_train.vqvae import AttnBlock, Downsample, Upsample

LEVELS = [(1,), (1, 2), (2, 1, 2), (1, 1, 2, 2)]


def model(**changes: Any) -> VQVAE:
    fields = {"patch_nums": (1, 2, 3), "vocab_size": 23, "z_channels": 5, "ch": 32, "ch_mult": (1, 2), "num_phi": 2}
    vqvae = VQVAE(VQVAEConfig(**{**fields, **changes}))
    randomise(vqvae)
    return vqvae.eval()


def images(vqvae: VQVAE, rows: int = 2) -> torch.Tensor:
    size = vqvae.config.image_size
    return 2 * torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(6)) - 1


@torch.no_grad()
@pytest.mark.parametrize("ch_mult", LEVELS, ids=str)
def test_each_level_halves_the_image(ch_mult):
    vqvae = model(ch_mult=ch_mult)
    assert vqvae.config.image_size == 3 * 2 ** (len(ch_mult) - 1)
    assert vqvae.encode(images(vqvae)).shape == (2, 5, 3, 3)
    tokens = vqvae.tokens(images(vqvae))
    assert [t.shape for t in tokens] == [(2, 1), (2, 4), (2, 9)]
    assert vqvae.reconstruct(images(vqvae)).shape == images(vqvae).shape


@torch.no_grad()
def test_attention_sits_at_the_deepest_level_and_in_the_middle_only():
    names = [name for name, module in model(ch_mult=(1, 1, 2)).named_modules() if isinstance(module, AttnBlock)]
    assert names == [
        *(f"encoder.down.2.attn.{j}" for j in range(2)),
        "encoder.mid.attn_1",
        "decoder.mid.attn_1",
        *(f"decoder.up.2.attn.{j}" for j in range(3)),
    ]


@torch.no_grad()
def test_down_sampling_pads_right_and_below():
    down = Downsample(1)
    down.conv.weight.fill_(1.0)
    down.conv.bias.zero_()
    # 3×3 sums of a 4×4 map of ones at stride 2: the last row and column meet one line of zeros.
    assert down(torch.ones(1, 1, 4, 4)).tolist() == [[[[9, 6], [6, 4]]]]


@torch.no_grad()
def test_up_sampling_repeats_pixels():
    up = Upsample(1)
    up.conv.weight.zero_()
    up.conv.weight[0, 0, 1, 1] = 1.0
    up.conv.bias.zero_()
    assert up(torch.tensor([[[[1.0, 2.0]]]])).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


@torch.no_grad()
def test_attention_block_by_hand():
    block = AttnBlock(32)
    randomise(block)
    x = torch.randn(1, 32, 2, 3)
    q, k, v = block.qkv(block.norm(x)).reshape(3, 32, 6)
    expected = torch.empty(32, 6)
    for i in range(6):
        weights = torch.stack([q[:, i] @ k[:, j] / 32**0.5 for j in range(6)]).softmax(0)
        expected[:, i] = v @ weights
    torch.testing.assert_close(block(x), x + block.proj_out(expected.view(1, 32, 2, 3)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoded_images_are_clamped_and_training_ones_are_not():
    vqvae = model()
    f_hat = 50 * torch.randn(1, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    decoded = vqvae.decode(f_hat)
    assert decoded.min() == -1
    assert decoded.max() == 1
    vqvae.decoder.conv_out.weight.mul_(50)
    reconstruction, _, _ = vqvae(images(vqvae))
    assert reconstruction.abs().max() > 1


def test_training_pass_gives_every_part_a_gradient():
    vqvae = model().train()
    reconstruction, loss, _ = vqvae(images(vqvae))
    (torch.nn.functional.mse_loss(reconstruction, images(vqvae)) + loss).backward()
    used = {f"quantize.quant_resi.qresi_ls.{vqvae.config.phi_index(k)}" for k in range(3)}
    for name, parameter in vqvae.named_parameters():
        if "qresi_ls" in name and name.rsplit(".", 1)[0] not in used:
            continue
        assert parameter.grad is not None, name
        # A constant added to all keys leaves a softmax as it is, and a convolution's bias vanishes in a GroupNorm
        # of one channel a group, so some biases have no gradient to speak of.
        assert parameter.grad.any() or name.endswith("bias"), name


@torch.no_grad()
def test_rows_do_not_influence_each_other():
    vqvae = model(ch_mult=(1, 1, 2))
    together = vqvae.encode(images(vqvae, 3))
    alone = torch.cat([vqvae.encode(images(vqvae, 3)[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)  # batched convolutions may round differently


@pytest.mark.parametrize("scales", [1, 10])
def test_usage_statistics_of_other_scales_load_as_zeros(scales):
    vqvae = model()
    key = "quantize.ema_vocab_hit_SV"
    state = {**vqvae.state_dict(), key: torch.rand(scales, 23)}
    given = state[key].clone()
    vqvae.load_state_dict(state, strict=True)
    assert torch.equal(vqvae.quantize.ema_vocab_hit_SV, torch.zeros(3, 23))
    assert torch.equal(state[key], given)  # the caller's dictionary is left as it was


def test_usage_statistics_of_the_same_scales_are_kept():
    vqvae = model()
    usage = torch.rand(3, 23)
    vqvae.load_state_dict({**vqvae.state_dict(), "quantize.ema_vocab_hit_SV": usage})
    assert torch.equal(vqvae.quantize.ema_vocab_hit_SV, usage)


def test_other_keys_stay_strict():
    vqvae = model()
    state = vqvae.state_dict()
    del state["quant_conv.bias"]
    with pytest.raises(RuntimeError, match=r"quant_conv\.bias"):
        vqvae.load_state_dict(state)
