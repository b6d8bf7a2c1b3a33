"""Whole runs in this process: what is wrong is one line before anything is written; what is right trains as it says."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pydantic")
pytest.importorskip("tensorboard")

from safetensors.torch import load_file

from var_deploy.config import ConfigError
from var_deploy.errors import CheckpointError, DataError, VarDeployError
from var_train import image_files, parallel, processes, setup
from var_train.checkpoint import class_names_of, load_pair, patch_nums_of
from var_train.configuration import VARRun, VQVAERun, read_run
from var_train.presets import PRESETS
from var_train.run_folder import write_finished
from var_train.run_loop import Evaluation
from var_train.setup import digest_of, frozen_vqvae, train_var, train_vqvae
from var_train.token_files import open_tokens
from var_train.token_writer import store_tokens
from var_train.train_var import VARTraining
from var_train.train_vqvae import VQVAETraining
from var_train.watch import read_metrics

CPU = torch.device("cpu")
CLASSES = ("across", "down", "slanting")

#: Nothing but the end is measured and kept.
QUIET = {"keeping.evaluate_every": 1000, "keeping.checkpoint_every": 1000, "keeping.pictures": 1}

#: `run(folder, *options, **changes)` trains to the end.
Run = Callable[..., Path]


@pytest.fixture
def run_var(var_toml: Any) -> Run:
    def run(out: Path, *options: str, **changes: Any) -> Path:
        toml = var_toml(out.parent, **changes)
        return train_var(read_run(VARRun, toml, options), out, CPU)

    return run


@pytest.fixture
def run_vqvae(vqvae_toml: Any) -> Run:
    def run(out: Path, *options: str, **changes: Any) -> Path:
        toml = vqvae_toml(out.parent, **changes)
        return train_vqvae(read_run(VQVAERun, toml, options), out, CPU)

    return run


@pytest.fixture
def images(small_images: Path, tmp_path: Path) -> Path:
    """A copy that a test may alter."""
    return Path(shutil.copytree(small_images, tmp_path / "images"))


@pytest.fixture(scope="session")
def stored_tokens(small_images: Path, small_vqvae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes over the training images, with the crops that seed 3 takes, mirrored and enlarged by 1.5."""
    out = tmp_path_factory.mktemp("stored") / "tokens"
    vqvae = frozen_vqvae(small_vqvae, None, CPU)
    crop = setup.Crop(side=8, random=True, flip=True, enlarge=1.5)
    options = {"passes": 2, "batch": 9, "workers": 0, "seed": 3, "vqvae_sha256": digest_of(vqvae)}
    store_tokens(image_files.open_images(small_images), vqvae, out, crop=crop, device=CPU, **options)
    return out


@pytest.fixture(scope="session")
def short_var(var_toml: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a VAR run of two iterations; read only."""
    out = tmp_path_factory.mktemp("short_var") / "run"
    toml = var_toml(out.parent, **QUIET | {"optimiser.iterations": 2})
    train_var(read_run(VARRun, toml), out, CPU)
    return out


@pytest.fixture(scope="session")
def short_vqvae(vqvae_toml: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a VQVAE run of two iterations; read only."""
    out = tmp_path_factory.mktemp("short_vqvae") / "run"
    toml = vqvae_toml(out.parent, **QUIET | {"optimiser.iterations": 2})
    train_vqvae(read_run(VQVAERun, toml), out, CPU)
    return out


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


# ---- what is wrong -------------------------------------------------------------------------------------------------


def assert_refused(run: Run, out: Path, kind: type[VarDeployError], message: str, *options: str, **changes: Any) -> str:
    """One line that ends in what to do; nothing is left of a run."""
    with pytest.raises(VarDeployError) as refusal:
        run(out, *options, **changes)
    assert type(refusal.value) is kind, refusal.value
    said = str(refusal.value)
    assert re.search(message, said), said
    assert "\n" not in said
    assert not out.exists()
    return said


def empty_class(images: Path) -> None:
    (images / "train" / "empty").mkdir()


def no_images(images: Path) -> None:
    shutil.rmtree(images)
    images.mkdir()


def other_classes_in_val(images: Path) -> None:
    shutil.rmtree(images / "val" / "down")


def two_splits_in_one(images: Path) -> None:
    (images / "val" / "down").rename(images / "val" / "up")


def unreadable(images: Path) -> None:
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")


@pytest.mark.parametrize("kind", ["var", "vqvae"])
@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (empty_class, r"train/empty: got no images \(\.jpg .*\), expected some; fill or remove the folder$"),
        (no_images, r"images: got no sub-folders, expected one per class with its images; sort them so$"),
        (
            shutil.rmtree,
            r"images: no such folder; give one with a sub-folder of images per class, or with",
        ),
        (
            other_classes_in_val,
            r"val: got 1 classes that only it or only train has, the first is 'down', .*; add",
        ),
        (two_splits_in_one, r"val: got 2 classes that only it or only train has, the first is 'down', .*; add"),
    ],
)
def test_images_that_are_not_there_are_one_line(run_var, run_vqvae, images, tmp_path, kind, alter, message):
    alter(images)
    run = run_var if kind == "var" else run_vqvae
    assert_refused(run, tmp_path / "run", DataError, message, **{"data.path": str(images)})


@pytest.mark.parametrize("kind", ["var", "vqvae"])
def test_validation_images_of_other_classes_are_one_line(run_var, run_vqvae, images, tmp_path, kind):
    shutil.rmtree(images / "train" / "slanting")
    shutil.rmtree(images / "val")
    message = (
        r"^data\.validation: got 2 classes, expected the 3 of .*small_images\d+ \(first difference: slanting\); give "
        r"images of the same classes$"
    )
    run = run_var if kind == "var" else run_vqvae
    assert_refused(run, tmp_path / "run", ConfigError, message, **{"data.validation": str(images)})


def test_a_data_set_of_which_nothing_can_be_read_ends_the_run(run_vqvae, images, tmp_path):
    unreadable(images)
    message = r"\.png: cannot be read \(no known image format\), and this is the first of 72 in a row; check"
    with pytest.raises(DataError, match=message):
        run_vqvae(tmp_path / "run", **QUIET, **{"data.path": str(images)})


@pytest.mark.parametrize("kind", ["var", "vqvae"])
def test_an_image_that_cannot_be_read_is_named_and_no_hindrance(run_var, run_vqvae, images, tmp_path, caplog, kind):
    damaged = images / "train" / "slanting" / "11.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    run = run_var if kind == "var" else run_vqvae
    epoch = QUIET | {"optimiser.iterations": 9, "execution.attention": "dense"}
    assert run(tmp_path / "run", **epoch, **{"data.path": str(images)}).exists()
    assert warnings_of(caplog) == [f"{damaged}: cannot be decoded; the next image stands for it"]
    assert len(losses(tmp_path / "run")) == 9


@pytest.mark.parametrize("kind", ["var", "vqvae"])
@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        (
            "data.resolution=9",
            ConfigError,
            r"^data\.resolution: got 9, expected a multiple of 2, by which the VQVAE reduces images; change",
        ),
        (
            "data.resolution=16",
            ConfigError,
            r"^data\.resolution: got 16, expected 8: the last scale's side 4 times 2; change the scales or",
        ),
        (
            "data.batch=73",
            DataError,
            r"^got 72 images, expected at least the 73 of a global batch; add images or make the batch smaller$",
        ),
        (
            "optimiser.accumulate=3",
            ConfigError,
            r"^data\.batch: got 8 images for 1 process\(es\) and optimiser\.accumulate 3, expected a multiple of 3",
        ),
    ],
)
def test_numbers_that_do_not_fit_together_are_one_line(run_var, run_vqvae, tmp_path, kind, option, error, message):
    assert_refused(run_var if kind == "var" else run_vqvae, tmp_path / "run", error, message, option)


@pytest.mark.parametrize("kind", ["var", "vqvae"])
@pytest.mark.parametrize(
    ("world", "options", "multiple"), [(16, [], 16), (3, [], 3), (4, ["optimiser.accumulate=4"], 16)]
)
def test_a_batch_that_the_processes_cannot_share_is_one_line(
    run_var, run_vqvae, tmp_path, monkeypatch, kind, world, options, multiple
):
    for module in (processes, parallel):
        monkeypatch.setattr(module, "world", lambda: world)
    message = rf"^data\.batch: got 8 images for {world} process\(es\) and .*, expected a multiple of {multiple};"
    assert_refused(run_var if kind == "var" else run_vqvae, tmp_path / "run", ConfigError, message, *options)


def test_vqvaes_that_cannot_be_used_are_one_line(run_var, small_vqvae, short_var, tmp_path):
    assert_refused(
        run_var, tmp_path / "run", CheckpointError, r"^none\.pth: no such file; check the path$", "model.vqvae=none.pth"
    )
    silent = tmp_path / "silent.safetensors"
    write_finished(silent, load_file(small_vqvae), {})
    assert_refused(
        run_var,
        tmp_path / "run",
        ConfigError,
        r"silent\.safetensors: does not say its scales; give them as patch_nums, or a preset that has them$",
        f"model.vqvae={silent}",
    )
    swapped = f"model.vqvae={short_var / 'var.safetensors'}"
    message = r"var\.safetensors: this is a VAR checkpoint, expected a VQVAE; are the two files swapped\?$"
    assert_refused(run_var, tmp_path / "run", CheckpointError, message, swapped, "model.patch_nums=[1, 2, 4]")
    folder = f"model.vqvae={short_var}"
    message = r"run: the directory of a training run, expected a checkpoint; give .*run/var\.safetensors$"
    assert_refused(run_var, tmp_path / "run", CheckpointError, message, folder)
    growing = r"vqvae\.safetensors: patch_nums: got \(4, 2\), expected strictly growing sides"
    assert_refused(run_var, tmp_path / "run", CheckpointError, growing, "model.patch_nums=[4, 2]")


def test_scales_are_those_that_are_said_else_the_files_else_the_presets(small_vqvae, tmp_path, monkeypatch, var_toml):
    monkeypatch.setitem(PRESETS, "small", (1, (1, 3), False))
    silent = tmp_path / "silent.safetensors"
    write_finished(silent, load_file(small_vqvae), {})
    monkeypatch.setattr(setup, "_run", lambda training, *_: training.config.patch_nums)

    def chosen(*options: str, **changes: Any) -> object:
        return train_var(read_run(VARRun, var_toml(tmp_path, **changes), options), tmp_path / "run", CPU)

    preset = {"model.preset": "small", "model.depth": None, "model.heads": None}
    assert chosen() == chosen(**preset) == (1, 2, 4)
    assert chosen(f"model.vqvae={silent}", **preset) == (1, 3)
    for file in (small_vqvae, silent):
        assert chosen(f"model.vqvae={file}", "model.patch_nums=[2, 5]", **preset) == (2, 5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "data.flip=false",
            r"^data\.flip: got False, but the tokens in .*tokens were stored with True; leave it out, or",
        ),
        (
            "data.enlarge=1.125",
            r"^data\.enlarge: got 1\.125, but the tokens in .*tokens were stored with 1\.5; leave it out, or",
        ),
        (
            "data.batch=100",
            r"^got 72 images, expected at least the 100 of a global batch; add images or make the batch smaller$",
        ),
    ],
)
def test_stored_tokens_that_were_made_otherwise_are_one_line(run_var, stored_tokens, tmp_path, option, message):
    error = DataError if "batch" in option else ConfigError
    assert_refused(run_var, tmp_path / "run", error, message, option, **{"data.path": str(stored_tokens)})


def test_tokens_of_another_vqvae_are_one_line(run_var, stored_tokens, small_vqvae, tmp_path):
    state = load_file(small_vqvae)
    other, decoded_otherwise = tmp_path / "other.safetensors", tmp_path / "decoder.safetensors"
    notes = {"class_names": list(CLASSES), "patch_nums": [1, 2, 4]}
    write_finished(other, {**state, "quantize.embedding.weight": state["quantize.embedding.weight"] * 1.001}, notes)
    write_finished(decoded_otherwise, {**state, "decoder.conv_out.bias": state["decoder.conv_out.bias"] + 1}, notes)
    message = r"tokens: these tokens are of another VQVAE than .*other\.safetensors; give that one, or store them anew$"
    data = {"data.path": str(stored_tokens)}
    assert_refused(run_var, tmp_path / "run", ConfigError, message, f"model.vqvae={other}", **data)
    other_scales = r"tokens: these tokens are of another VQVAE than .*vqvae\.safetensors; give that one, or store"
    assert_refused(run_var, tmp_path / "run", ConfigError, other_scales, "model.patch_nums=[1, 4]", **data)
    run_var(  # what is encoded is the same
        tmp_path / "run", f"model.vqvae={decoded_otherwise}", **data, **QUIET | {"optimiser.iterations": 1}
    )


def test_validation_tokens_are_held_to_the_same(run_var, stored_tokens, small_images, images, tmp_path):
    data = {"data.path": str(stored_tokens), **QUIET, "optimiser.iterations": 1}
    shutil.rmtree(images / "val" / "down")
    shutil.rmtree(images / "train" / "down")
    message = r"^data\.validation: got 2 classes, expected the 3 of .*tokens \(first difference: down\); give images of"
    assert_refused(run_var, tmp_path / "run", ConfigError, message, **data, **{"data.validation": str(images)})
    for validation in (small_images, stored_tokens):
        out = tmp_path / validation.name
        run_var(out, **data, **{"data.validation": str(validation)})
        assert read_metrics(out)[-1]["validation_loss"] > 0
    run_var(tmp_path / "alone", **data)
    assert "validation_loss" not in read_metrics(tmp_path / "alone")[-1]


@pytest.mark.parametrize(("width", "layers"), [(8, 2), (8, 4), (64, 2), (64, 9)])
def test_a_discriminator_too_deep_for_the_images_is_one_line(run_vqvae, tmp_path, width, layers):
    message = (
        rf"^loss\.discriminator_layers: got {layers}, for which images of 8 pixels are too small; lower it, or set "
        r"loss\.adversarial to 0$"
    )
    options = f"loss.discriminator_width={width}", f"loss.discriminator_layers={layers}"
    assert_refused(run_vqvae, tmp_path / "run", ConfigError, message, *options)


def test_perceptual_weights_that_are_none_are_one_line(run_vqvae, small_vqvae, tmp_path):
    given = "loss.perceptual=1.0", f"loss.perceptual_weights={small_vqvae}"
    message = (
        r"vqvae\.safetensors: features\.0\.weight: got nothing, expected \(64, 3, 3, 3\); give a file with VGG-16's "
        r"convolutions under torchvision's names$"
    )
    assert_refused(run_vqvae, tmp_path / "run", CheckpointError, message, *given)
    missing = "loss.perceptual=1.0", "loss.perceptual_weights=none.pth"
    message = r"^none\.pth: cannot be read \(.*\); give a file with VGG-16's convolutions under torchvision's names$"
    assert_refused(run_vqvae, tmp_path / "run", CheckpointError, message, *missing)


def test_starts_of_another_size_are_one_line(run_var, run_vqvae, short_var, small_vqvae, tmp_path):
    given = f"model.start_from={short_var / 'var.safetensors'}"
    message = (
        r"var\.safetensors: does not fit this model: depth 2 there, 3 here; give this model the checkpoint's sizes, or "
        r"start from another checkpoint$"
    )
    assert_refused(run_var, tmp_path / "run", CheckpointError, message, given, "model.depth=3")
    given = f"model.start_from={small_vqvae}"
    message = (
        r"vqvae\.safetensors: got a VQVAE with VQVAEConfig\(.*vocab_size=61, .*\), expected VQVAEConfig\(.*=62, .*; g"
    )
    assert_refused(run_vqvae, tmp_path / "run", CheckpointError, message, given, "model.vocab_size=62")
    for run in (run_var, run_vqvae):
        message = r"^none\.safetensors: no such file; check the path$"
        assert_refused(run, tmp_path / "run", CheckpointError, message, "model.start_from=none.safetensors")


def test_flex_attention_without_gradients_is_refused(run_var, tmp_path):
    message = r"^execution\.attention: got 'flex', but it trains on CUDA only, this is cpu; give 'dense' or 'auto'$"
    assert_refused(run_var, tmp_path / "run", ConfigError, message, "execution.attention=flex")


def test_a_run_goes_on_with_the_classes_that_it_began_with(run_var, images, tmp_path):
    out, options = tmp_path / "run", {**QUIET, "data.path": str(images), "optimiser.iterations": 1}
    run_var(out, **options)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for split in ("train", "val"):
        shutil.copytree(images / split / "down", images / split / "up")
    with pytest.raises(ConfigError) as refusal:
        run_var(out, **options)
    assert str(refusal.value) == (
        f"{out}: classes: got ['across', 'down', 'slanting', 'up'], this run was started with ['across', 'down', "
        "'slanting'] (and 2 more); go on with that, or choose another --out"
    )
    other = Path(shutil.copytree(images, tmp_path / "other"))
    message = r"run: data\.path: got '.*/other', this run was started with '.*/images' \(and 3 more\); go on"
    with pytest.raises(ConfigError, match=message):
        run_var(out, **options | {"data.path": str(other)})
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


# ---- what is said ---------------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_that_the_perceptual_term_is_off_is_said_once(run_vqvae, tmp_path, caplog):
    few = {**QUIET, "optimiser.iterations": 2}
    run_vqvae(tmp_path / "asked", "loss.perceptual=0.5", **few)
    assert warnings_of(caplog) == ["loss.perceptual_weights is not given, so the perceptual term is off"]
    assert all("perceptual" not in line for line in read_metrics(tmp_path / "asked"))
    caplog.clear()
    run_vqvae(tmp_path / "not_asked", **few)
    assert warnings_of(caplog) == []


def test_other_processes_say_nothing(run_vqvae, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(setup, "rank", lambda: 1)
    run_vqvae(tmp_path / "run", "loss.perceptual=0.5", **QUIET | {"optimiser.iterations": 1})
    assert warnings_of(caplog) == []


def test_what_is_new_in_fine_tuning_is_said(run_var, short_var, images, tmp_path, caplog):
    for split in ("train", "val"):
        (images / split / "down").rename(images / split / "up")
    start = short_var / "var.safetensors"
    with caplog.at_level(logging.WARNING, "var_train"):
        file = run_var(
            tmp_path / "run",
            f"model.start_from={start}",
            "optimiser.learning_rate=1e-12",
            "optimiser.ema=0",
            **{**QUIET, "data.path": str(images), "optimiser.iterations": 1, "model.patch_nums": [1, 3, 4]},
        )
    said = [line for line in warnings_of(caplog) if str(start) in line]
    assert said == [
        f"{start}: class_emb.weight: 1 of 3 classes ('up') are not among the 3 there; new, the null class kept",
        f"{start}: pos_1LC of scale 1 (side 3): new",
        f"{start}: lvl_embed.weight of scale 1 (side 3): new",
    ]
    ours, theirs = load_file(file), load_file(start)
    close = {"rtol": 0.0, "atol": 1e-6}  # an update at a rate of 10⁻¹²
    torch.testing.assert_close(ours["blocks.1.ffn.fc1.weight"], theirs["blocks.1.ffn.fc1.weight"], **close)
    torch.testing.assert_close(ours["class_emb.weight"][[0, 1, 3]], theirs["class_emb.weight"][[0, 2, 3]], **close)
    assert (ours["class_emb.weight"][2] - theirs["class_emb.weight"][1]).abs().max() > 0.01


# ---- what is trained ------------------------------------------------------------------------------------------------


def test_precisions_learn_alike(run_var, tmp_path):
    learnt = {}
    for precision in ("fp32", "bf16", "fp16"):
        options = {**QUIET, "optimiser.precision": precision, "model.label_dropout": 0.0, "model.drop_path": 0.0}
        run_var(tmp_path / precision, **options)
        learnt[precision] = losses(tmp_path / precision)
        assert len(learnt[precision]) == 20
        assert sum(learnt[precision][-5:]) / 5 < learnt[precision][0] - 0.2
    for precision in ("bf16", "fp16"):  # of nats near 4; bf16 has 8 bits
        assert learnt[precision] == pytest.approx(learnt["fp32"], abs=0.02)
        assert learnt[precision] != learnt["fp32"]
    lines = read_metrics(tmp_path / "fp16")
    assert {line["loss_scale"] for line in lines if "loss" in line} <= {65536.0 / 2**n for n in range(10)}
    assert "loss_scale" not in read_metrics(tmp_path / "bf16")[0]


def test_blocks_computed_again_give_the_same_bits(run_var, tmp_path):
    files = []
    for again in ("false", "true"):
        options = QUIET | {"optimiser.iterations": 6}
        files.append(run_var(tmp_path / again, f"execution.checkpoint_blocks={again}", **options))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert losses(tmp_path / "false") == losses(tmp_path / "true")
    norms = [[line.get("gradient_norm") for line in read_metrics(tmp_path / name)] for name in ("false", "true")]
    assert norms[0] == norms[1]


@pytest.mark.parametrize(("kind", "parts"), [("var", ["AdaLNBlock", "AdaLNBlock"]), ("vqvae", ["Encoder", "Decoder"])])
def test_compiled_parts_learn_alike(run_var, run_vqvae, tmp_path, monkeypatch, kind, parts):
    """Traced as for the inductor, whose C++ compiler takes a minute for it."""
    compiled: list[str] = []
    plain = nn.Module.compile

    def traced(module: nn.Module) -> None:
        compiled.append(type(module).__name__)
        plain(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", traced)
    nothing = Evaluation(values={}, score=None, pictures_HW3=None)  # which would be traced anew
    for training in (VARTraining, VQVAETraining):
        monkeypatch.setattr(training, "evaluate", lambda *_: nothing)
    run = run_var if kind == "var" else run_vqvae
    for name in ("false", "true"):
        run(tmp_path / name, f"execution.compile={name}", **QUIET | {"optimiser.iterations": 3})
    assert compiled == parts
    # the same operations may be done in another order, which rounds otherwise
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-4)
    ours, theirs = (load_file(tmp_path / name / f"{kind}.safetensors") for name in ("true", "false"))
    assert ours.keys() == theirs.keys()


def test_progressive_scales_train_the_coarsest_first(run_var, tmp_path):
    run_var(tmp_path / "run", "progressive.first=1", "progressive.until=0.8", "progressive.ramp=0.1", **QUIET)
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    scales = [int(line["scales"]) for line in lines]
    assert scales == sorted(scales)
    assert set(scales) == {1, 2, 3}
    for line, trained in zip(lines, scales, strict=True):
        assert [value is not None for value in line["loss_by_scale"]] == [k < trained for k in range(3)]
    assert read_metrics(tmp_path / "run")[-1]["validation_loss_by_scale"][-1] is not None


def test_stored_tokens_give_the_losses_of_the_images(run_var, stored_tokens, small_images, tmp_path):
    """For as many epochs as there are passes: 2 of 9 iterations; then the crops begin anew."""
    crops = {"data.flip": True, "data.enlarge": 1.5, "data.validation": str(small_images)}
    options = {**QUIET, "optimiser.iterations": 20, **crops}
    ours = run_var(tmp_path / "images", **options)
    run_var(tmp_path / "tokens", **options | {"data.path": str(stored_tokens)})
    of_images, of_tokens = losses(tmp_path / "images"), losses(tmp_path / "tokens")
    assert of_tokens[:18] == of_images[:18]
    assert of_tokens[18:] != of_images[18:]
    assert class_names_of(ours) == class_names_of(tmp_path / "tokens" / "var.safetensors") == CLASSES
    assert open_tokens(stored_tokens).passes == 2


def test_epochs_of_stored_tokens_give_the_very_same_weights(run_var, stored_tokens, small_images, tmp_path):
    options = {**QUIET, "optimiser.iterations": None, "optimiser.epochs": 1, "data.validation": str(small_images)}
    crops = {"data.flip": True, "data.enlarge": 1.5}
    files = [
        run_var(tmp_path / "images", **options, **crops),
        run_var(tmp_path / "tokens", **options, **{"data.path": str(stored_tokens)}),
    ]
    states = [load_file(file) for file in files]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert len(losses(tmp_path / "tokens")) == 9


def test_a_vqvae_can_be_gone_on_from(run_vqvae, short_vqvae, tmp_path):
    start = short_vqvae / "vqvae.safetensors"
    file = run_vqvae(
        tmp_path / "run",
        f"model.start_from={start}",
        "optimiser.learning_rate=1e-12",
        "optimiser.ema=0",
        **QUIET | {"optimiser.iterations": 1},
    )
    ours, theirs = load_file(file), load_file(start)
    for key in ours.keys() - {"quantize.ema_vocab_hit_SV"}:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_the_finished_files_are_a_pair_with_class_names(run_var, short_vqvae, tmp_path):
    vqvae = short_vqvae / "vqvae.safetensors"
    few = QUIET | {"optimiser.iterations": 1, "keeping.finished": "fp16", "model.vqvae": str(vqvae)}
    var = run_var(tmp_path / "var", **few)
    pair = load_pair(var, vqvae)
    assert class_names_of(var) == class_names_of(vqvae) == CLASSES
    assert patch_nums_of(vqvae) == pair.var.patch_nums == pair.vqvae.patch_nums == (1, 2, 4)
    assert pair.var.num_classes == len(CLASSES)
    for path, model, dtype in zip((var, vqvae), pair.models(), (torch.float16, torch.float32), strict=True):
        stored: dict[str, Tensor] = load_file(path)
        assert stored.keys() == model.state_dict().keys()
        assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {dtype}
    assert json.loads((tmp_path / "var" / "run.json").read_text())["classes"] == list(CLASSES)


def test_initial_weights_depend_on_the_seed_alone(monkeypatch, var_toml, vqvae_toml, tmp_path):
    seen: list[dict[str, Tensor]] = []

    def stop(training: Any, run: Any, folder: Path) -> Path:
        (model,) = (m for name, m in training.state.models.items() if name in ("var", "vqvae"))
        seen.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        return folder

    monkeypatch.setattr(setup, "_run", stop)
    for seed in (3, 3, 4):
        torch.rand(seed)  # whatever was drawn before
        train_var(read_run(VARRun, var_toml(tmp_path), [f"seed={seed}"]), tmp_path, CPU)
        train_vqvae(read_run(VQVAERun, vqvae_toml(tmp_path), [f"seed={seed}"]), tmp_path, CPU)
    for kind, weight in ((0, "head.weight"), (1, "encoder.conv_in.weight")):
        first, again, other = seen[kind::2]
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first[weight], other[weight])
    assert seen[0]["blocks.0.ada_lin.1.weight"][:64].abs().max() < 1e-3  # the gammas', times 1e-3
