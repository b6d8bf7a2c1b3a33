"""The digits example: data, the quality measures, the command line, and the checkpoints that the repository ships."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from var_deploy.errors import CheckpointError, RequestError, VarDeployError
from var_train import digits, digits_data
from var_train.digits_quality import (
    LabelledImages,
    import_sklearn,
    nearest_distance_N,
    quality_report,
    rms,
)

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


def test_batches_pass_over_all_images_and_repeat_with_the_seed(split):
    labels_N = np.arange(40)
    images = LabelledImages(split.train.images_N3RR[:40], labels_N)
    stream = digits_data.batches(images, 16, seed=3)
    passes = [torch.cat([next(stream)[1] for _ in range(3)]) for _ in range(2)]
    assert all(sorted(one.tolist()) == labels_N.tolist() for one in passes)
    assert not torch.equal(*passes)
    image_B3RR, labels_B = next(digits_data.batches(images, 16, seed=3))
    again_B3RR, _ = next(digits_data.batches(images, 16, seed=3))
    assert torch.equal(image_B3RR, again_B3RR)
    assert image_B3RR.shape == (16, 3, 32, 32)
    assert -1 <= image_B3RR.min() < image_B3RR.max() <= 1 + 1e-6
    original_B3RR = torch.from_numpy(images.images_N3RR)[labels_B] * 2 - 1
    difference = (image_B3RR - original_B3RR).abs().mean()
    assert 0.01 < difference < 0.5  # moved, but still the same digit


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
    models = digits.load_models(VQVAE_PATH, VAR_PATH)
    for model, path in zip(models, (VQVAE_PATH, VAR_PATH), strict=True):
        stored = load_file(path)
        assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert {v.dtype for v in stored.values()} <= {torch.float16, torch.int64}
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert load_file(VAR_PATH)["lvl_1L"].dtype == torch.int64


def test_shipped_checkpoints_draw_digits(split):
    vqvae, var = digits.load_models(VQVAE_PATH, VAR_PATH)
    generated = digits.generate_digits(vqvae, var, per_class=10, seed=1)
    report = quality_report(generated, split.train, split.held_out)["generated"]
    assert report["accuracy"] >= 0.95
    assert report["distinct"] == 100
    real = first(split.held_out, 50)
    assert rms(digits.reconstruct(vqvae, real), real) < 0.1


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"digits_var.*not the VQVAE .* differ.*var_train\.digits train"):
        digits.load_models(VAR_PATH, VQVAE_PATH)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: cannot be read.*var_train\.digits train"):
        digits.load_models(tmp_path / "absent.safetensors", VAR_PATH)
    (tmp_path / "text").write_text("these are no tensors")
    with pytest.raises(CheckpointError, match=r"text: cannot be read"):
        digits.load_models(VQVAE_PATH, tmp_path / "text")


def test_train_then_quality_on_the_command_line(split, tmp_path, monkeypatch):
    small = digits_data.DigitsSplit(first(split.train, 100), first(split.held_out, 20))
    monkeypatch.setattr(digits, "load_split", lambda: small)
    monkeypatch.setattr(digits, "AUGMENTED_REFERENCES", 1)
    monkeypatch.setattr(digits, "BATCH_SIZE", 8)
    for name in ("VQVAE_SETTINGS", "VAR_SETTINGS"):
        monkeypatch.setattr(digits, name, dataclasses.replace(getattr(digits, name), steps=2))
    result = CliRunner().invoke(digits.app, ["train", "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    report_path, grid_path = tmp_path / "report.json", tmp_path / "grid.png"
    arguments = {
        "--vae": tmp_path / digits.VQVAE_FILE,
        "--var": tmp_path / digits.VAR_FILE,
        "--training": tmp_path / "training.json",
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
    assert report["training"]["var"]["steps"] == 2
    assert grid_path.stat().st_size > 0
