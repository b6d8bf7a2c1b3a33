"""A run's configuration: defaults as published, every mistake one line that names its place."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from var_deploy.config import ConfigError, VQVAEConfig
from var_train.configuration import VARRun, VQVAERun, read_run
from var_train.recipe import Progressive

VAR_FILE = """
seed = 3
[data]
path = "images"
batch = 512
[optimiser]
epochs = 2.5
[model]
preset = "d16"
vqvae = "vae.safetensors"
[progressive]
first = 4
until = 0.5
"""
VQVAE_FILE = """
[data]
path = "images"
batch = 8
[optimiser]
iterations = 100
[model]
patch_nums = [1, 2, 4]
ch = 64
ch_mult = [1, 2]
"""
TOKENS = VQVAEConfig(patch_nums=(1, 2, 4), vocab_size=61)


@pytest.fixture
def var_file(tmp_path) -> Path:
    path = tmp_path / "var.toml"
    path.write_text(VAR_FILE)
    return path


@pytest.fixture
def vqvae_file(tmp_path) -> Path:
    path = tmp_path / "vqvae.toml"
    path.write_text(VQVAE_FILE)
    return path


def test_a_var_run_with_published_defaults(var_file):
    run = read_run(VARRun, var_file)
    assert (run.seed, run.data.batch, run.data.enlarge, run.data.flip) == (3, 512, 1.125, False)
    assert (run.optimiser.betas, run.optimiser.clip, run.optimiser.precision) == ((0.9, 0.95), 2.0, "bf16")
    assert run.iterations(images=1300) == 5  # two and a half epochs of two whole batches
    schedule = run.schedule(1300, depth=16)
    assert (schedule.learning_rate, schedule.weight_decay, schedule.final_weight_decay) == (2e-4, 0.05, 0.05)
    assert run.schedule(1300, depth=24).learning_rate == pytest.approx(1.6e-4)
    assert run.progressive is not None
    assert run.progressive.schedule() == Progressive(first=4, until=0.5, ramp=0.0)


def test_the_model_takes_scales_and_codes_from_the_vqvae(var_file):
    config = read_run(VARRun, var_file).model.config(TOKENS, num_classes=7)
    assert (config.patch_nums, config.vocab_size, config.num_classes) == ((1, 2, 4), 61, 7)
    assert (config.depth, config.embed_dim, config.ffn_dim, config.shared_aln) == (16, 1024, 4096, False)
    shared = read_run(VARRun, var_file, ["model.preset=d36-s"]).model.config(TOKENS, num_classes=7)
    assert (shared.depth, shared.shared_aln) == (36, True)


def test_a_vqvae_run(vqvae_file):
    run = read_run(VQVAERun, vqvae_file)
    assert run.model.config() == VQVAEConfig(patch_nums=(1, 2, 4), vocab_size=4096, ch=64, ch_mult=(1, 2))
    assert run.iterations(images=10**6) == 100
    assert run.loss.perceptual_weights is None


def test_options_win_over_the_file(vqvae_file):
    options = ["data.batch=16", "optimiser.learning_rate=1e-3", "model.ch_mult=[1, 1]", "data.path=other/place"]
    run = read_run(VQVAERun, vqvae_file, [*options, "data.flip=true", "seed=9", "loss.l1=0"])
    assert (run.data.batch, run.data.path, run.data.flip, run.seed) == (16, "other/place", True, 9)
    assert (run.optimiser.learning_rate, run.model.ch_mult, run.loss.l1) == (1e-3, (1, 1), 0.0)


def test_what_was_read_can_be_stored_and_read_again(var_file, vqvae_file):
    for kind, path in ((VARRun, var_file), (VQVAERun, vqvae_file)):
        run = read_run(kind, path)
        assert kind.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.batch=0", "data.batch: got 0, Input should be greater than or equal to 1"),
        ("data.batch=eight", "data.batch: got 'eight', Input should be a valid integer"),
        ("data.batch=8.5", "data.batch: got 8.5, Input should be a valid integer"),
        ("data.size=8", "data.size: got 8, unknown key; known: path, validation, batch, workers, enlarge, flip"),
        (
            "optimizer.clip=1",
            "optimizer: got {'clip': 1}, unknown key; known: seed, data, optimiser, keeping, model, loss",
        ),
        ("optimiser.epochs=3", "optimiser: expected either iterations or epochs"),
        ("optimiser.betas=[0.9, 1.0]", "optimiser: expected betas from 0 to 1, without 1"),
        ("optimiser.clip=nan", "optimiser.clip: got nan, Input should be"),
        ("optimiser.precision=fp12", "optimiser.precision: got 'fp12', Input should be 'fp32', 'bf16' or 'fp16'"),
        ("model.patch_nums=[4, 2]", "model.patch_nums: got (4, 2), expected strictly growing sides"),
        ("model.ch=33", "model.ch: got 33, expected"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(vqvae_file, option, message):
    with pytest.raises(ConfigError) as refusal:
        read_run(VQVAERun, vqvae_file, [option])
    assert str(refusal.value).startswith(f"{vqvae_file}: {message}")
    assert str(refusal.value).endswith("; mend the file or the option")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.preset=d17", "unknown preset 'd17'; known: d16"),
        ("model.depth=3", "model: expected either preset or depth"),
        ("model.drop_path=1.0", "model.drop_path: got 1.0, Input should be less than 1"),
        ("progressive.first=0", "progressive.first: got 0, Input should be greater than or equal to 1"),
        ("progressive.last=0", "progressive.last: got 0, unknown key"),
    ],
)
def test_a_mistake_in_a_var_run_is_one_line(var_file, option, message):
    with pytest.raises(ConfigError) as refusal:
        read_run(VARRun, var_file, [option])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("option", ["data.batch", "=3", "seed.x=1"])
def test_an_option_that_is_none_is_refused(vqvae_file, option):
    with pytest.raises(ConfigError, match=r"option|seed"):
        read_run(VQVAERun, vqvae_file, [option])


@pytest.mark.parametrize("content", [b"[data", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_one_line(tmp_path, content):
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_run(VARRun, path)
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_run(VARRun, tmp_path / "none.toml")


def test_a_missing_section_is_named(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("seed = 1\n")
    with pytest.raises(ConfigError, match=r"x\.toml: data: Field required \(and 2 more\)"):
        read_run(VQVAERun, path)


@given(text=st.text(max_size=40))
def test_any_option_is_taken_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(VQVAE_FILE)
    with suppress(ConfigError):
        assert read_run(VQVAERun, path, [text]).data.batch >= 1
