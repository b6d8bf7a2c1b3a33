"""A run's configuration: defaults as published, every mistake one line that names its place."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pydantic")

from var_deploy.config import ConfigError, VQVAEConfig
from var_train.configuration import Run, VARRun, VQVAERun, read_run
from var_train.presets import PRESETS
from var_train.recipe import RECIPES, Progressive

VAR_FILE = """
seed = 3
[data]
path = "images"
batch = 512
resolution = 256
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
    assert run.data.resolution == 256
    assert run.iterations(images=1300) == 5  # two and a half epochs of two whole batches
    schedule = run.schedule(1300)
    assert (schedule.learning_rate, schedule.weight_decay, schedule.final_weight_decay) == (2e-4, 0.05, 0.05)
    assert (schedule.iterations, schedule.warmup, schedule.final) == (5, 0.02, 0.1)
    assert run.evaluate_every(1300) == 2  # once per epoch
    assert run.progressive is not None
    assert run.progressive.schedule() == Progressive(first=4, until=0.5, ramp=0.0)


PUBLISHED = {  # images of a batch, epochs, learning rate, its end, weight decay's end, initial gammas
    "d12": (768, 200, 3e-4, 0.1, 0.05, 1e-3),
    "d16": (768, 200, 3e-4, 0.1, 0.05, 1e-3),
    "d20": (768, 250, 3e-4, 0.1, 0.05, 1e-3),
    "d24": (768, 350, 2.4e-4, 0.01, 0.05, 1e-4),
    "d30": (1024, 350, 3.2e-4, 0.01, 0.08, 1e-5),
    "d36-s": (768, 350, 2.4e-4, 0.01, 0.08, 5e-6),
}


def bare_run(preset: str, **sections: dict[str, object]) -> VARRun:
    """A run that says nothing but its preset, and these."""
    data = {"path": "images"} | sections.pop("data", {})
    model = {"preset": preset, "vqvae": "x"} | sections.pop("model", {})
    return VARRun.model_validate({"data": data, "model": model, **sections})


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_brings_its_published_recipe(preset):
    run = bare_run(preset)
    batch, epochs, rate, final, decay, gamma = PUBLISHED[preset]
    schedule = run.schedule(1_281_167)
    assert (run.data.batch, run.optimiser.epochs, schedule.final) == (batch, epochs, final)
    assert (schedule.weight_decay, schedule.final_weight_decay, run.model.gamma_scale) == (0.05, decay, gamma)
    assert schedule.learning_rate == pytest.approx(rate)
    assert schedule.iterations == epochs * (1_281_167 // batch)


def test_every_preset_has_a_recipe():
    assert list(RECIPES) == list(PRESETS) == list(PUBLISHED)


def test_what_is_said_wins_over_the_recipe():
    run = bare_run("d30", data={"batch": 16}, optimiser={"iterations": 7, "final": 0.5}, model={"gamma_scale": 0.1})
    assert (run.data.batch, run.iterations(10**6), run.optimiser.epochs) == (16, 7, None)
    assert (run.optimiser.final, run.model.gamma_scale) == (0.5, 0.1)
    assert run.optimiser.final_weight_decay == 0.08  # not said
    assert run.schedule(100).learning_rate == pytest.approx(8e-5 * 16 / 256)
    assert bare_run("d30", optimiser={"learning_rate": 1e-3}).schedule(5000).learning_rate == 1e-3


def test_a_model_of_its_own_sizes_has_no_recipe(var_file):
    options = ["model.depth=3", "model.heads=2", "data.batch=8"]
    text = var_file.read_text().replace('preset = "d16"', "")
    var_file.write_text(text)
    run = read_run(VARRun, var_file, options)
    config = run.model.config(TOKENS, num_classes=2)
    assert (config.depth, config.embed_dim, config.num_heads, run.model.preset_scales) == (3, 128, 2, None)
    assert run.optimiser.final_weight_decay is None
    var_file.write_text(text.replace("batch = 512\n", ""))
    with pytest.raises(ConfigError, match=r"data\.batch: Field required"):
        read_run(VARRun, var_file, options[:2])


@pytest.mark.parametrize(
    ("epochs", "images", "expected"), [(0.01, 1300, 1), (1.0, 511, 1), (3.0, 1024, 6), (1.25, 2048, 5)]
)
def test_epochs_are_of_whole_batches_and_a_run_has_an_iteration_at_least(var_file, epochs, images, expected):
    assert read_run(VARRun, var_file, [f"optimiser.epochs={epochs}"]).iterations(images) == expected


def test_defaults_of_what_is_written_and_how_it_is_run(vqvae_file):
    run = read_run(VQVAERun, vqvae_file)
    keeping, execution = run.keeping, run.execution
    assert (keeping.checkpoint_every, keeping.checkpoints, keeping.log_every, keeping.pictures) == (1000, 2, 10, 16)
    assert (keeping.evaluate_every, keeping.finished) == (None, "fp32")
    assert (execution.parallel, execution.attention) == ("ddp", "auto")
    assert (execution.compile, execution.checkpoint_blocks) == (False, False)
    assert run.evaluate_every(images=81) == 10
    assert read_run(VQVAERun, vqvae_file, ["keeping.evaluate_every=3"]).evaluate_every(81) == 3
    assert run.evaluate_every(images=7) == 1


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
    kinds: tuple[tuple[type[Run], Path], ...] = (VARRun, var_file), (VQVAERun, vqvae_file)
    for kind, path in kinds:
        run = read_run(kind, path, ["data.batch=17"])
        assert kind.model_validate(json.loads(run.model_dump_json()), strict=False) == run  # JSON has no tuples


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.batch=0", "data.batch: got 0, Input should be greater than or equal to 1"),
        ("data.batch=eight", "data.batch: got 'eight', Input should be a valid integer"),
        ("data.batch=8.5", "data.batch: got 8.5, Input should be a valid integer"),
        ("data.batch=true", "data.batch: got True, Input should be a valid integer"),
        ("data.workers=-1", "data.workers: got -1, Input should be greater than or equal to 0"),
        ("data.enlarge=0.9", "data.enlarge: got 0.9, Input should be greater than or equal to 1"),
        (
            "data.size=8",
            "data.size: got 8, unknown key; known: path, validation, batch, workers, resolution, enlarge, flip",
        ),
        (
            "optimizer.clip=1",
            "optimizer: got {'clip': 1}, unknown key; known: seed, data, optimiser, keeping, execution, model, loss",
        ),
        (
            "execution.paralel=ddp",
            "execution.paralel: got 'ddp', unknown key; known: parallel, attention, compile, checkpoint_blocks",
        ),
        ("execution.parallel=tp", "execution.parallel: got 'tp', Input should be 'ddp' or 'fsdp'"),
        ("execution.parallel=fsdp", "the file as a whole: execution.parallel: got 'fsdp', expected 'ddp': the weight"),
        ("execution.attention=sparse", "execution.attention: got 'sparse', Input should be 'auto', 'flex' or 'dense'"),
        ("keeping.checkpoints=0", "keeping.checkpoints: got 0, Input should be greater than or equal to 1"),
        ("keeping.finished=int8", "keeping.finished: got 'int8', Input should be 'fp32', 'bf16' or 'fp16'"),
        ("loss.discriminator_width=20", "loss.discriminator_width: got 20, Input should be a multiple of 8"),
        ("model.start=x", "model.start: got 'x', unknown key; known: patch_nums, vocab_size, z_channels, ch, ch_mult"),
        ("optimiser.epochs=3", "optimiser: got both, expected either iterations or epochs"),
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
        ("model.preset=d17", "unknown preset 'd17'; known: d12, d16, d20, d24, d30, d36-s; mend the file"),
        ("model.depth=3", "model: expected either preset or depth"),
        ("model.heads=3", "model: expected no heads with a preset, which has as many as blocks"),
        ("model.patch_nums=1", "model.patch_nums: got 1, Input should be a valid tuple"),
        ("optimiser.iterations=5", "optimiser: got both, expected either iterations or epochs"),
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


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.batch", "option 'data.batch': expected NAME=VALUE, like optimiser.epochs=10; write it so"),
        ("=3", "option '=3': expected NAME=VALUE, like optimiser.epochs=10; write it so"),
        ("", "option '': expected NAME=VALUE, like optimiser.epochs=10; write it so"),
        ("data.batch.x=1", "option 'data.batch.x=1': 'batch' is not a section; see the file's sections"),
    ],
)
def test_an_option_that_is_none_is_refused(vqvae_file, option, message):
    with pytest.raises(ConfigError) as refusal:
        read_run(VQVAERun, vqvae_file, [option])
    assert str(refusal.value) == message


@pytest.mark.parametrize("content", [b"[data", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_one_line(tmp_path, content):
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_run(VARRun, path)
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_run(VARRun, tmp_path / "none.toml")


def test_shards_of_a_gradient_have_no_common_loss_scale(var_file):
    options = ["execution.parallel=fsdp", "optimiser.precision=fp16"]
    with pytest.raises(ConfigError, match=r"execution\.parallel: got 'fsdp' with fp16, expected bf16 or fp32"):
        read_run(VARRun, var_file, options)
    for option in options:
        read_run(VARRun, var_file, [option])


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


def documented() -> dict[str, str]:
    """Key → default, as docs/training.md tells them; a VQVAE's `model` keys have ` of a VQVAE` behind them."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    return dict(
        re.findall(r"^\| `([\w.]+)`(?: of a VQVAE)? \| `?(.*?)`? \|", page.replace("` of a VQVAE", "_vqvae`"), re.M)
    )


@pytest.mark.parametrize("kind", [VARRun, VQVAERun])
def test_every_key_and_default_is_documented(kind):
    rows = documented()
    sections = {"": kind} | {
        name: next((part for part in (*get_args(field.annotation), field.annotation) if isinstance(part, type)), None)
        for name, field in kind.model_fields.items()
    }
    checked = 0
    for name, section in sections.items():
        for key, field in getattr(section, "model_fields", {}).items():
            if key in sections and not name:
                continue
            row = f"{name}.{key}" if name else key
            row += "_vqvae" if kind is VQVAERun and name == "model" else ""
            default = "required" if field.is_required() else field.default
            if default is None or row == "data.workers":
                default = "—"
            elif isinstance(default, tuple):
                default = list(default)
            said = rows[row].replace("1e-4", "0.0001")
            assert said == (str(default).lower() if isinstance(default, bool) else str(default)), row
            checked += 1
    assert checked > 30
