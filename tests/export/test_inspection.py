"""`inspect` of a checkpoint file: kind, configuration, parameters and types, or why it is no checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

from var_deploy.errors import CheckpointError
from var_export.inspection import inspect_checkpoint
from var_train import VAR, VQVAE
from var_train.presets import PRESETS, preset_configs


def test_var_file(tiny_pair, tiny_checkpoints):
    path = tiny_pair[1]
    data = json.loads(json.dumps(inspect_checkpoint(path)))
    model, _ = tiny_checkpoints.models()
    assert data["kind"] == "checkpoint"
    assert data["size"] == path.stat().st_size
    assert "vqvae" not in data
    assert data["var"]["patch_nums"] == [1, 2, 3, 4]
    assert data["var"]["depth"] == 2
    assert data["var"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert data["var"]["dtypes"] == ["float32", "int64"]


def test_vqvae_file_does_not_claim_scales_it_does_not_say(tiny_pair, tiny_checkpoints):
    data = inspect_checkpoint(tiny_pair[2])
    _, model = tiny_checkpoints.models()
    assert "var" not in data
    assert data["vqvae"]["patch_nums"] is None
    assert data["vqvae"]["ch_mult"] == [1, 1, 2, 2, 4]
    assert data["vqvae"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_training_checkpoint_shows_both_with_the_scales_of_its_var(tiny_checkpoints, write_pth):
    trainer = {"var_wo_ddp": tiny_checkpoints.var_state, "vae_local": tiny_checkpoints.vqvae_state}
    data = inspect_checkpoint(write_pth({"epoch": 1, "trainer": trainer}))
    assert data["var"]["patch_nums"] == data["vqvae"]["patch_nums"] == [1, 2, 3, 4]


def test_half_precision_is_shown(tiny_checkpoints, write_pth):
    state = {k: v.half() if v.is_floating_point() else v for k, v in tiny_checkpoints.var_state.items()}
    assert inspect_checkpoint(write_pth(state))["var"]["dtypes"] == ["float16", "int64"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "d12"])  # the paper's table has no d12
def test_published_parameter_counts(name):
    """The counts of the paper's table, and the 108.9 M of its VQVAE, from shapes alone."""
    with torch.device("meta"):
        var, vqvae = (model(config) for model, config in zip((VAR, VQVAE), preset_configs(name), strict=True))
    millions = {"d16": 310.28, "d20": 600, "d24": 1000, "d30": 2000, "d36-s": 2300}[name]
    # The paper rounds all but the first to two digits.
    assert sum(p.numel() for p in var.parameters()) / 1e6 == pytest.approx(
        millions, rel=1e-4 if name == "d16" else 0.05
    )
    assert sum(p.numel() for p in vqvae.parameters()) / 1e6 == pytest.approx(108.9, abs=0.1)
    assert sum(p.numel() for p in vqvae.decoder.parameters()) / 1e6 == pytest.approx(64.65, abs=0.05)


def test_state_dict_of_something_else_is_refused(write_pth):
    with pytest.raises(
        CheckpointError, match="neither a VAR nor a VQVAE state dict, nor a training checkpoint of them"
    ):
        inspect_checkpoint(write_pth({"conv.weight": torch.zeros(3)}))


def test_training_checkpoint_of_something_else_is_refused(write_pth):
    with pytest.raises(CheckpointError, match="neither a VAR nor a VQVAE"):
        inspect_checkpoint(write_pth({"trainer": {"model": {}}}))


def test_bad_weights_are_refused_here_too(tiny_checkpoints, write_pth):
    state = {**tiny_checkpoints.var_state, "head.bias": torch.full((256,), torch.nan)}
    with pytest.raises(CheckpointError, match=r"head\.bias holds NaN"):
        inspect_checkpoint(write_pth(state))
