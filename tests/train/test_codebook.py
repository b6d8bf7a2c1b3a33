"""Counts of hits, usage and perplexity by hand; unused entries revived alike in any number of processes."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from var_deploy.config import VQVAEConfig
from var_train import VQVAE
from var_train.codebook import perplexity, record_usage, residual_vectors, revive_unused, usage

CONFIG = VQVAEConfig(patch_nums=(1, 2, 3), vocab_size=24, z_channels=8, ch=32, ch_mult=(1, 1), num_res_blocks=1)


def quantizer():
    torch.manual_seed(0)
    return VQVAE(CONFIG).quantize


def test_usage_counts_hits_of_every_scale():
    ours = quantizer()
    tokens = [torch.full((4, n), k) for k, n in enumerate(CONFIG.tokens_per_scale)]
    for _ in range(200):
        hits_SV = record_usage(ours, tokens)
    expected_SV = torch.zeros(3, 24)
    expected_SV[0, 0], expected_SV[1, 1], expected_SV[2, 2] = 4, 16, 36
    torch.testing.assert_close(hits_SV, expected_SV)
    torch.testing.assert_close(ours.ema_vocab_hit_SV, expected_SV)


def test_usage_and_perplexity_by_hand():
    hits_SV = torch.tensor([[5.0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 0, 0]])
    assert usage(hits_SV) == [0.25, 1.0, 0.5, 0.0]
    assert perplexity(hits_SV) == pytest.approx([1, 4, 2, 1])


def test_only_unused_entries_are_revived_with_vectors_of_the_batch():
    ours = quantizer()
    ours.ema_vocab_hit_SV[1, 3:] = 1.0
    before_VC = ours.embedding.weight.detach().clone()
    f_BChh = torch.randn(4, 8, 3, 3)
    vectors_NC = residual_vectors(ours, f_BChh).flatten(0, 1)
    assert vectors_NC.shape == (4 * 14, 8)
    unused_V = revive_unused(ours, f_BChh, seed=1, first_row=0, rows=4)
    assert unused_V.tolist() == [True] * 3 + [False] * 21
    after_VC = ours.embedding.weight.detach().clone()
    assert torch.equal(after_VC[3:], before_VC[3:])
    assert (after_VC[:3, None] == vectors_NC).all(dim=-1).any(dim=1).all()
    ours.ema_vocab_hit_SV[0, :3] = 1.0
    unused_V = revive_unused(ours, f_BChh, seed=1, first_row=0, rows=4)
    assert unused_V.shape == (24,)
    assert not unused_V.any()
    assert torch.equal(ours.embedding.weight, after_VC)


def test_the_vectors_quantised_are_those_of_the_residual_loop():
    ours = quantizer()
    f_BChh = torch.randn(2, 8, 3, 3)
    vectors_BNC, tokens = residual_vectors(ours, f_BChh), ours.tokens_from_features(f_BChh)
    distance_BNV = torch.cdist(vectors_BNC, ours.embedding.weight[None])
    assert torch.equal(distance_BNV.argmin(-1), torch.cat(tokens, dim=1))


def _one_of_several(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    (folder / f"{rank}.json").write_text(json.dumps(_revived(rank, world)))
    dist.destroy_process_group()


def _revived(rank: int, world: int) -> dict[str, Any]:
    """What an iteration leaves of the codebook; every process has an equal part of 6 images."""
    ours = quantizer()
    f_BChh = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(7))
    step = 6 // world
    mine_BChh = f_BChh[rank * step : (rank + 1) * step]
    hits_SV = record_usage(ours, ours.tokens_from_features(mine_BChh))
    unused_V = revive_unused(ours, mine_BChh, seed=5, first_row=rank * step, rows=6)
    return {"hits": hits_SV.tolist(), "unused": unused_V.tolist(), "codes": ours.embedding.weight.tolist()}


def test_any_number_of_processes_gives_the_same_codebook(tmp_path):
    fork = multiprocessing.get_context("fork")  # anew, each would import PyTorch for seconds
    processes = [fork.Process(target=_one_of_several, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    one, first, second = _revived(0, 1), *(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert one["unused"] == first["unused"]
    assert 0 < sum(one["unused"]) < 24
    assert one["hits"] == first["hits"]
    torch.testing.assert_close(torch.tensor(first["codes"]), torch.tensor(one["codes"]), rtol=0, atol=1e-6)
