"""Counts of hits, usage and perplexity by hand; unused entries revived alike in any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from var_deploy.config import VQVAEConfig, config_to_dict
from var_train import VQVAE
from var_train.codebook import perplexity, record_usage, residual_vectors, revive_unused, usage

CONFIG = VQVAEConfig(patch_nums=(1, 2, 3), vocab_size=24, z_channels=8, ch=32, ch_mult=(1, 1), num_res_blocks=1)
ROOT = Path(__file__).parents[2]


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
    assert revive_unused(ours, f_BChh, seed=1, first_row=0, rows=4) == 3
    after_VC = ours.embedding.weight.detach()
    assert torch.equal(after_VC[3:], before_VC[3:])
    assert (after_VC[:3, None] == vectors_NC).all(dim=-1).any(dim=1).all()
    ours.ema_vocab_hit_SV[0, :3] = 1.0
    assert revive_unused(ours, f_BChh, seed=1, first_row=0, rows=4) == 0


def test_the_vectors_quantised_are_those_of_the_residual_loop():
    ours = quantizer()
    f_BChh = torch.randn(2, 8, 3, 3)
    vectors_BNC, tokens = residual_vectors(ours, f_BChh), ours.tokens_from_features(f_BChh)
    distance_BNV = torch.cdist(vectors_BNC, ours.embedding.weight[None])
    assert torch.equal(distance_BNV.argmin(-1), torch.cat(tokens, dim=1))


_SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from var_deploy.config import VQVAEConfig, config_from_dict
from var_train import VQVAE
from var_train.codebook import record_usage, revive_unused

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
quantizer = VQVAE(config_from_dict(VQVAEConfig, json.loads(sys.argv[1]))).quantize
f_BChh = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(7))
step = 6 // world
mine = f_BChh[rank * step : (rank + 1) * step]
hits_SV = record_usage(quantizer, quantizer.tokens_from_features(mine))
count = revive_unused(quantizer, mine, seed=5, first_row=rank * step, rows=6)
result = {"hits": hits_SV.tolist(), "count": count, "codes": quantizer.embedding.weight.tolist()}
with open(sys.argv[2] + f"/{world}_{rank}.json", "w") as file:
    json.dump(result, file)
dist.destroy_process_group()
"""


def test_any_number_of_processes_gives_the_same_codebook(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("", "train"))}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(script), json.dumps(config_to_dict(CONFIG)), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    assert first == second
    assert one["count"] == first["count"] > 0
    assert one["hits"] == first["hits"]
    torch.testing.assert_close(torch.tensor(first["codes"]), torch.tensor(one["codes"]), rtol=0, atol=1e-6)
