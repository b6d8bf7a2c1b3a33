"""The floor: counts by hand and by PyTorch's own counter, times of the published sizes, and wrong requests."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from var_deploy.bench.floor import Floor, Work, decoder_flops, floor
from var_deploy.config import ConfigError, VARConfig, VQVAEConfig
from var_deploy.precision import Precision
from var_train import VAR, VQVAE
from var_train.presets import PRESETS, preset_configs

#: Bytes and operations per second of one H200: device-to-device copy, and a large bf16 matrix product.
RATES = (4.3e12, 790e12)

#: Milliseconds of the transformer at batch 1, 8 and 64 under guidance in bf16, rounded as the design states them.
TABLE = {
    "d16": (1.3, 6.2, 48),
    "d20": (2.4, 11.9, 93),
    "d24": (4.2, 20, 158),
    "d30": (8.1, 39, 305),
    "d36-s": (34, 233, 1848),
}

SMALL = VARConfig(patch_nums=(1, 2, 3), vocab_size=40, num_classes=10, depth=3, embed_dim=128, ffn_dim=320)
SMALL_VQVAE = VQVAEConfig(patch_nums=(1, 2, 3), vocab_size=40, z_channels=8, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "d12"])  # the table has no d12
def test_published_sizes_take_what_the_table_says(name):
    var, vqvae = preset_configs(name)
    for batch, milliseconds in zip((1, 8, 64), TABLE[name], strict=True):
        counted = floor(var, vqvae, batch=batch)
        # The table was rounded, and its smaller cells leave out reading the AdaLN weights once.
        assert counted.transformer_seconds(*RATES) * 1e3 == pytest.approx(milliseconds, rel=0.07)


def test_the_published_decoder_takes_half_a_millisecond_at_256_pixels():
    var, vqvae = preset_configs("d16")
    counted = floor(var, vqvae, batch=1)
    assert counted.decoder_flops == pytest.approx(394e9, rel=0.005)
    assert counted.decoder_seconds(RATES[1]) == pytest.approx(0.5e-3, rel=0.01)
    whole = counted.transformer_seconds(*RATES) + counted.decoder_seconds(RATES[1])
    assert counted.seconds(*RATES) == pytest.approx(whole)


@pytest.mark.parametrize(
    "config",
    [
        SMALL_VQVAE,
        dataclasses.replace(SMALL_VQVAE, ch_mult=(2,), num_res_blocks=3),
        dataclasses.replace(SMALL_VQVAE, ch_mult=(1, 1, 3, 2)),
        preset_configs("d16")[1],
        preset_configs("d36-s")[1],
    ],
)
def test_the_decoder_is_counted_as_it_runs(config):
    with torch.device("meta"), torch.no_grad():
        vqvae = VQVAE(config)
        with FlopCounterMode(display=False) as counter:
            vqvae.decode(torch.empty(2, config.z_channels, config.latent_size, config.latent_size))
    assert counter.get_total_flops() == 2 * decoder_flops(config)


@pytest.mark.parametrize("shared_aln", [False, True])
def test_the_transformer_is_counted_as_it_runs(shared_aln):
    """The reference projects the class at every scale; the floor once."""
    config, rows, cache = dataclasses.replace(SMALL, shared_aln=shared_aln), 4, []
    counted = floor(config, None, batch=2)
    # The counter knows the plain attention of a CPU, not its fused one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        var = VAR(config).eval()
        condition_RD = torch.zeros(rows, config.embed_dim)
        for scale, n in zip(counted.scales, config.tokens_per_scale, strict=True):
            with FlopCounterMode(display=False) as counter:
                x_RnD = torch.zeros(rows, n, config.embed_dim)
                logits_RnV, cache = var.forward_scale(x_RnD, condition_RD, cache)
            assert counter.get_total_flops() == scale.work.flops + counted.condition.flops
            assert scale.logit_bytes == 2 * 4 * logits_RnV.numel()
            past_and_new = sum(k_RHld.numel() + v_RHld.numel() for k_RHld, v_RHld in cache)
            assert scale.cache_bytes == 2 * past_and_new
    matrices = sum(p.numel() for key, p in var.named_parameters() if key.endswith("weight") and p.ndim == 2)
    embeddings = sum(p.numel() for key, p in var.named_parameters() if "emb" in key and key.endswith("weight"))
    assert counted.scales[0].weight_bytes + counted.condition.bytes == 2 * (matrices - embeddings)


def test_the_decoder_runs_once_per_image_and_a_floor_can_leave_it_out():
    assert floor(SMALL, SMALL_VQVAE, batch=3).decoder_flops == 3 * decoder_flops(SMALL_VQVAE)
    alone = floor(SMALL, None, batch=3)
    assert alone.decoder_flops == 0
    assert alone.seconds(*RATES) == alone.transformer_seconds(*RATES)


def test_guidance_that_ends_early_computes_fewer_rows():
    guided, unguided = floor(SMALL, None, batch=2), floor(SMALL, None, batch=2, rows=2)
    mixed = floor(SMALL, None, batch=2, rows=[4, 4, 2])
    assert [scale.rows for scale in guided.scales] == [4, 4, 4]
    assert mixed.scales == guided.scales[:2] + unguided.scales[2:]
    assert mixed.condition == guided.condition  # the class is projected for all rows
    assert unguided.flops < mixed.flops < guided.flops


@pytest.mark.parametrize(
    ("precision", "weight", "activation"),
    [
        (Precision.FP32, 4, 4),
        (Precision.FP16, 2, 2),
        (Precision.BF16, 2, 2),
        (Precision.INT8, 1, 2),
        (Precision.FP8, 1, 2),
    ],
)
def test_eight_bits_are_for_the_weights_of_blocks_only(precision, weight, activation):
    bf16, counted = floor(SMALL, None, batch=1), floor(SMALL, None, batch=1, precision=precision)
    D, F, V = SMALL.embed_dim, SMALL.ffn_dim, SMALL.vocab_size
    for a, b in zip(counted.scales, bf16.scales, strict=True):
        assert a.weight_bytes == weight * SMALL.depth * (4 * D * D + 2 * D * F) + activation * D * V
        assert a.cache_bytes == b.cache_bytes * activation // 2
        assert a.logit_bytes == b.logit_bytes
    assert counted.condition.bytes == bf16.condition.bytes * activation // 2
    assert counted.flops == bf16.flops


def test_time_is_the_longer_of_moving_and_computing_part_by_part():
    assert Work(flops=6, bytes=8).seconds(bytes_per_second=2.0, flops_per_second=3.0) == 4.0
    assert Work(flops=15, bytes=8).seconds(bytes_per_second=2.0, flops_per_second=3.0) == 5.0
    scales = floor(SMALL, None, batch=1).scales[:1]
    work = scales[0].work
    counted = Floor(
        batch=1,
        precision=Precision.BF16,
        condition=Work(flops=0, bytes=1000),
        scales=scales,
        decoder_flops=500,
    )
    assert counted.bytes == 1000 + work.bytes
    assert counted.flops == work.flops + 500
    # So slow a memory that every scale waits for it, while the decoder only computes.
    assert counted.seconds(10.0, 1e9) == pytest.approx((1000 + work.bytes) / 10.0 + 500 / 1e9)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"batch": 0}, "batch: got 0, expected at least 1"),
        ({"batch": 1, "rows": 0}, "rows: got 0, expected a positive number, or one for each of 3 scales"),
        ({"batch": 1, "rows": [2, 2]}, r"rows: got \[2, 2\], expected"),
    ],
)
def test_a_wrong_request_is_named(request_, message):
    with pytest.raises(ConfigError, match=message):
        floor(SMALL, None, **request_)
