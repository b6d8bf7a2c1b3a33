"""The digits example: data, the quality measures, the command line, and the checkpoints that the repository ships."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from var_deploy.config import ConfigError
from var_deploy.errors import DataError, RequestError, VarDeployError
from var_train import digits, digits_data
from var_train.checkpoint import load_pair
from var_train.digits_quality import (
    LabelledImages,
    import_sklearn,
    nearest_distance_N,
    quality_report,
    rms,
)
from var_train.image_data import decode
from var_train.image_files import open_images

pytest.importorskip("sklearn", reason="the digits example needs the extra 'digits'")

CHECKPOINTS = Path(__file__).parents[2] / "train" / "checkpoints"
VQVAE_PATH, VAR_PATH = CHECKPOINTS / digits.VQVAE_FILE, CHECKPOINTS / digits.VAR_FILE


@pytest.fixture(scope="module")
def split() -> digits_data.DigitsSplit:
    return digits_data.load_split()


def first(images: LabelledImages, count: int) -> LabelledImages:
    return LabelledImages(images.images_N3RR[:count], images.labels_N[:count])


def test_split_is_disjoint_stratified_and_fixed(split):
    train, held_out = split.train, split.held_out
    assert (len(train.labels_N), len(held_out.labels_N)) == (1297, 500)
    images = np.concatenate([train.images_N3RR, held_out.images_N3RR])
    assert len({image.tobytes() for image in images}) == 1797  # no digit occurs twice, so the parts share none
    for part in (train, held_out):
        share = np.bincount(part.labels_N) / len(part.labels_N)
        np.testing.assert_allclose(share, 0.1, atol=0.01)
    np.testing.assert_array_equal(digits_data.load_split().held_out.labels_N, held_out.labels_N)


def test_images_are_32_grey_pixels_from_black_to_white(split):
    images_N3RR = split.train.images_N3RR
    assert images_N3RR.shape[1:] == (3, 32, 32)
    assert images_N3RR.dtype == np.float32
    assert (images_N3RR.min(), images_N3RR.max()) == (0, 1)
    np.testing.assert_array_equal(images_N3RR[:, 0], images_N3RR[:, 2])


def test_enlarge_keeps_places():
    grey_188 = torch.zeros(1, 8, 8)
    grey_188[0, 2, 5] = 1
    image_RR = digits_data.enlarge(grey_188)[0, 0]
    assert image_RR[8:12, 20:24].mean() > 0.5
    assert image_RR[16:, :].max() == 0


def test_a_moved_digit_is_another_picture_of_the_same_digit(split):
    images = first(split.train, 40)
    passes = digits_data.moved(images, seed=3, passes=2)
    assert passes.labels_N.tolist() == [*images.labels_N, *images.labels_N]
    assert passes.images_N3RR.shape == (80, 3, 32, 32)
    assert 0 <= passes.images_N3RR.min() < passes.images_N3RR.max() <= 1 + 1e-6
    for pass_N3RR in np.split(passes.images_N3RR, 2):
        difference_N = np.abs(pass_N3RR - images.images_N3RR).mean(axis=(1, 2, 3))
        assert difference_N.min() > 0
        assert 0.01 < difference_N.mean() < 0.25
    assert not np.array_equal(*np.split(passes.images_N3RR, 2))
    again = digits_data.moved(images, seed=3)
    np.testing.assert_array_equal(again.images_N3RR, passes.images_N3RR[:40])


def test_the_data_set_is_read_as_it_was_written(split, tmp_path, monkeypatch):
    small = digits_data.DigitsSplit(first(split.train, 30), first(split.held_out, 20))
    monkeypatch.setattr(digits_data, "load_split", lambda: small)
    arguments = ["images", str(tmp_path / "digits"), "--variants", "3", "--seed", "4"]
    result = CliRunner().invoke(digits.app, arguments, catch_exceptions=False)
    assert result.output == f"wrote {tmp_path / 'digits'}: 90 training and 20 validation images\n"
    expected = digits_data.moved(small.train, 4, 3), small.held_out
    for part, wanted in zip(("train", "val"), expected, strict=True):
        images = open_images(tmp_path / "digits", split=part)
        assert images.class_names == digits_data.CLASS_NAMES
        assert images.labels_N.tolist() == wanted.labels_N.tolist()
        pixels_NRR3 = np.stack([np.asarray(decode(images.read(index))) for index in range(len(images))])
        np.testing.assert_allclose(pixels_NRR3 / 255, wanted.images_N3RR.transpose(0, 2, 3, 1), atol=0.5 / 255 + 1e-6)
    assert len({images.name(index) for index in range(len(images))}) == 20


@pytest.mark.parametrize(
    ("variants", "error", "message"),
    [
        (0, ConfigError, r"^variants: got 0, expected at least 1$"),
        (1, DataError, r"taken: exists already; nothing is overwritten, choose another name or remove it$"),
    ],
)
def test_a_data_set_that_cannot_be_written_is_one_line(split, tmp_path, monkeypatch, variants, error, message):
    monkeypatch.setattr(digits_data, "load_split", lambda: split)
    (tmp_path / "taken").mkdir()
    with pytest.raises(error, match=message):
        digits_data.write_digits(tmp_path / "taken", variants=variants, seed=0)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken"]


def test_real_digits_pass_as_generated(split):
    report = quality_report(split.held_out, split.train, split.held_out)
    assert report["generated"] == report["held_out"]
    assert report["generated"]["accuracy"] >= 0.97
    assert report["generated"]["images"] == report["generated"]["distinct"] == 500
    assert 0 < report["generated"]["distance"]["min"] < report["generated"]["distance"]["median"]


def test_copies_wrong_labels_and_repeats_show(split):
    copies = first(split.train, 100)
    report = quality_report(
        LabelledImages(copies.images_N3RR[[0] * 50 + [1] * 50], (copies.labels_N[[0] * 50 + [1] * 50] + 1) % 10),
        split.train,
        split.held_out,
    )
    assert report["generated"]["accuracy"] == 0
    assert report["generated"]["distinct"] == 2
    assert set(report["generated"]["distance"].values()) == {0.0}


def test_bytes_and_floats_measure_alike(split):
    images = first(split.held_out, 60)
    as_bytes = LabelledImages(np.rint(images.images_N3RR * 255).astype(np.uint8), images.labels_N)
    a = quality_report(images, split.train, split.held_out)["generated"]
    b = quality_report(as_bytes, split.train, split.held_out)["generated"]
    assert a["accuracy"] == b["accuracy"]
    assert a["distance"] == pytest.approx(b["distance"], abs=2e-3)


def test_distance_is_the_root_mean_square():
    black = LabelledImages(np.zeros((1, 3, 8, 8), np.float32), np.zeros(1))
    greys = LabelledImages(np.full((2, 3, 8, 8), [[[[0.5]]], [[[0.25]]]], np.float32), np.zeros(2))
    np.testing.assert_allclose(nearest_distance_N(black, greys), [0.25])


@pytest.mark.parametrize("shape", [(10, 3, 16, 16), (10, 1, 32, 32), (9, 3, 32, 32), (0, 3, 32, 32)], ids=str)
def test_images_of_another_shape_are_refused(split, shape):
    wrong = LabelledImages(np.zeros(shape, np.float32), np.zeros(shape[0] if shape[0] != 9 else 10, np.int64))
    with pytest.raises(RequestError, match=r"generated: images have shape .*, expected .*3, 32, 32.*own size"):
        quality_report(wrong, split.train, split.held_out)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(VarDeployError, match=r"pip install var-deploy\[digits\]"):
        import_sklearn("svm")


def test_shipped_checkpoints_are_small_plain_and_load_strictly():
    assert VQVAE_PATH.stat().st_size + VAR_PATH.stat().st_size < 16e6
    models = load_pair(VAR_PATH, VQVAE_PATH).models()
    for model, path in zip(models, (VAR_PATH, VQVAE_PATH), strict=True):
        stored = load_file(path)
        assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert {v.dtype for v in stored.values()} <= {torch.float16, torch.int64}
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert load_file(VAR_PATH)["lvl_1L"].dtype == torch.int64


def test_shipped_checkpoints_draw_digits(split):
    var, vqvae = load_pair(VAR_PATH, VQVAE_PATH).models()
    generated = digits.generate_digits(vqvae, var, per_class=10, seed=1)
    report = quality_report(generated, split.train, split.held_out)["generated"]
    assert report["accuracy"] >= 0.95
    assert report["distinct"] == 100
    real = first(split.held_out, 50)
    assert rms(digits.reconstruct(vqvae, real), real) < 0.1


@pytest.mark.parametrize(
    ("var", "vae", "message"),
    [
        (VQVAE_PATH, VAR_PATH, f"{VQVAE_PATH}: this is a VQVAE checkpoint, expected a VAR; are the two files swapped?"),
        (VAR_PATH, Path("absent"), "absent: no such file; check the path"),
    ],
    ids=["swapped", "absent"],
)
def test_files_that_do_not_fit_are_refused(monkeypatch, capsys, split, var, vae, message):
    monkeypatch.setattr(digits, "load_split", lambda: split)
    monkeypatch.setattr("sys.argv", ["digits", "quality", "--var", str(var), "--vae", str(vae)])
    with pytest.raises(SystemExit) as ended:
        digits.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def test_quality_on_the_command_line(split, tmp_path, monkeypatch):
    small = digits_data.DigitsSplit(first(split.train, 100), first(split.held_out, 20))
    monkeypatch.setattr(digits, "load_split", lambda: small)
    monkeypatch.setattr(digits, "AUGMENTED_REFERENCES", 1)
    report_path, grid_path = tmp_path / "report.json", tmp_path / "grid.png"
    arguments = {
        "--vae": VQVAE_PATH,
        "--var": VAR_PATH,
        "--json": report_path,
        "--grid": grid_path,
        "--per-class": 1,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    result = CliRunner().invoke(digits.app, ["quality", *flat], catch_exceptions=False)
    assert result.exit_code == 0
    assert "SVM accuracy" in result.output
    report = json.loads(report_path.read_text())
    assert report["generated"]["images"] == 10
    assert report["sampling"] == {"per_class": 1, "guidance": 2.0, "top_k": 0, "top_p": 0.95, "seed": 0}
    assert report["file_bytes"] == {"vqvae": VQVAE_PATH.stat().st_size, "var": VAR_PATH.stat().st_size}
    assert report["config"]["vqvae"]["patch_nums"] == [1, 2, 3, 4]
    assert set(report["copy_check"]) == {"generated", "held_out", "moved_copies"}
    assert 0 < report["cross_entropy"]["train"] < np.log(report["config"]["var"]["vocab_size"])
    assert grid_path.stat().st_size > 0
