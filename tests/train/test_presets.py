"""Published sizes and random checkpoints of them: complete, repeatable, and of sound magnitude."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from var_deploy.config import VARConfig, VQVAEConfig
from var_train import VAR, VQVAE, generate, presets
from var_train.presets import PRESETS, preset_configs, randomise, write_random_checkpoints


@pytest.fixture
def small(monkeypatch) -> tuple[VARConfig, VQVAEConfig]:
    """A preset named `small`, so that nothing large is written."""
    both = {"patch_nums": (1, 2, 3), "vocab_size": 31}
    var = VARConfig(**both, num_classes=3, depth=2, embed_dim=64, ffn_dim=256)
    configs = var, VQVAEConfig(**both, ch=32, ch_mult=(1, 2))
    monkeypatch.setitem(PRESETS, "small", (2, (1, 2, 3), False))
    monkeypatch.setattr(presets, "preset_configs", lambda name: configs if name == "small" else preset_configs(name))
    return configs


@pytest.mark.parametrize(
    ("name", "depth", "width", "tokens", "image", "shared"),
    [
        ("d12", 12, 768, 680, 256, False),
        ("d16", 16, 1024, 680, 256, False),
        ("d20", 20, 1280, 680, 256, False),
        ("d24", 24, 1536, 680, 256, False),
        ("d30", 30, 1920, 680, 256, False),
        ("d36-s", 36, 2304, 2240, 512, True),
    ],
)
def test_published_sizes(name, depth, width, tokens, image, shared):
    var, vqvae = preset_configs(name)
    assert (var.depth, var.embed_dim, var.num_tokens, var.shared_aln) == (depth, width, tokens, shared)
    assert (var.num_heads, var.ffn_dim, var.vocab_size, var.num_classes) == (depth, 4 * width, 4096, 1000)
    assert (vqvae.image_size, vqvae.patch_nums, vqvae.vocab_size) == (image, var.patch_nums, var.vocab_size)


def test_every_preset_is_covered_above():
    assert list(PRESETS) == ["d12", "d16", "d20", "d24", "d30", "d36-s"]


def test_files_load_strictly_and_are_the_same_every_time(small, tmp_path):
    paths = [write_random_checkpoints("small", tmp_path / name) for name in ("a", "b")]
    assert [path.name for path in paths[0]] == ["var_small.pth", "vae_small.pth"]
    for config, model, first, second in zip(small, (VAR, VQVAE), *paths, strict=True):
        state, again = (torch.load(path, weights_only=True) for path in (first, second))
        model(config).load_state_dict(state, strict=True)
        assert all(torch.equal(state[key], again[key]) for key in state)


def test_random_model_keeps_its_activations_in_size(small):
    var, vqvae = VAR(small[0]), VQVAE(small[1])
    randomise(var)
    randomise(vqvae)
    out = generate(var.eval(), vqvae.eval(), torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0))
    assert 0.1 < torch.cat(out.logits, dim=1).std() < 10
    assert 0.02 < out.image_B3RR.std() < 0.45
    assert not torch.equal(out.image_B3RR[0], out.image_B3RR[1])


def test_randomising_leaves_computed_buffers_alone(small):
    var, fresh = VAR(small[0]), VAR(small[0])
    randomise(var)
    for key in ("lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias"):
        assert torch.equal(var.state_dict()[key], fresh.state_dict()[key])
    changed = [key for key, tensor in var.state_dict().items() if not torch.equal(tensor, fresh.state_dict()[key])]
    assert len(changed) == len(list(var.parameters()))


def command_line():
    import typer

    app = typer.Typer()
    app.command()(presets.main)
    return app


def test_command_writes_the_pair_and_names_it(small, tmp_path):
    done = CliRunner().invoke(command_line(), ["small", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    expected = [tmp_path / "out" / name for name in ("var_small.pth", "vae_small.pth")]
    assert done.output.split() == [str(path) for path in expected]
    assert set((tmp_path / "out").iterdir()) == set(expected)


def test_unknown_preset_is_refused_with_the_known_ones(tmp_path):
    done = CliRunner().invoke(command_line(), ["d99", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "d99" in done.output
    assert "d16" in done.output
    assert not (tmp_path / "out").exists()
