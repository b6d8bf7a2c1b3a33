"""The command on a few images, with a network of a few features; every number against its definition."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from typer.testing import CliRunner

from var_deploy.cli import app
from var_deploy.errors import RequestError
from var_deploy.evaluation import evaluate as command
from var_deploy.evaluation.evaluate import Options, evaluate
from var_deploy.evaluation.metrics import Gaussian, frechet_distance, inception_score, precision_recall
from var_deploy.evaluation.samples import NpzImages

RNG = np.random.default_rng(0)
REAL_NHW3 = RNG.integers(0, 256, (40, 4, 6, 3), dtype=np.uint8)
MADE_NHW3 = RNG.integers(40, 256, (30, 4, 6, 3), dtype=np.uint8)


@pytest.fixture
def files(small_network, tmp_path, monkeypatch):
    """(samples, reference, features) as the command line takes them."""
    monkeypatch.setattr(command, "load_features", lambda path, **_: small_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "made").mkdir()
    for i, image in enumerate(MADE_NHW3):
        Image.fromarray(image).save(tmp_path / "made" / f"{i:06d}.png")
    np.savez(tmp_path / "real.npz", arr_0=REAL_NHW3)
    return tmp_path / "made", tmp_path / "real.npz", tmp_path / "weights.pth"


def features(network, images_NHW3, path):
    np.savez(path, arr_0=images_NHW3)
    pooled, spatial = zip(*network.batches(NpzImages(path=path, shape=images_NHW3.shape)), strict=True)
    return np.concatenate(pooled).astype(np.float64), np.concatenate(spatial).astype(np.float64)


def test_every_number_is_that_of_its_definition(files, small_network, tmp_path):
    found = evaluate(*files, options=Options(bootstrap=3))
    made, real = (features(small_network, x, tmp_path / "x.npz") for x in (MADE_NHW3, REAL_NHW3))
    for name, ours, theirs in zip(("fid", "sfid"), made, real, strict=True):
        covariances = [np.cov(x, rowvar=False) for x in (ours, theirs)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        expected = np.sum((ours.mean(0) - theirs.mean(0)) ** 2) + np.trace(sum(covariances) - 2 * root)
        assert found["measures"][name]["value"] == pytest.approx(expected, rel=1e-5)
    logits = made[0] @ small_network.network.fc.weight.double().numpy().T  # without the bias
    assert found["measures"]["inception_score"]["value"] == pytest.approx(inception_score(logits), rel=1e-6)
    precision, recall = precision_recall(real[0], made[0])
    assert (found["measures"]["precision"]["value"], found["measures"]["recall"]["value"]) == (precision, recall)
    for name in ("fid", "sfid", "inception_score"):
        low, high = found["measures"][name]["interval"]
        assert low < found["measures"][name]["value"] < high
    assert found["left_out"] == {}
    assert found["samples"]["images"] == 30
    assert found["features"] == {"path": str(tmp_path / "weights.pth"), "sha256": "a" * 64, "published": True}


def test_the_same_images_are_at_distance_0(files, tmp_path):
    np.savez(tmp_path / "made.npz", arr_0=MADE_NHW3)
    measures = evaluate(files[0], tmp_path / "made.npz", files[2], options=Options(bootstrap=0))["measures"]
    assert measures["fid"]["value"] == pytest.approx(0, abs=1e-7)
    assert measures["sfid"]["value"] == pytest.approx(0, abs=1e-7)
    assert (measures["precision"]["value"], measures["recall"]["value"]) == (1, 1)
    assert {found["interval"] for found in measures.values()} == {None}


def test_statistics_alone_leave_out_what_needs_images(files, tmp_path):
    statistics = Gaussian.of_rows(RNG.standard_normal((50, 12)))
    np.savez(tmp_path / "real.npz", mu=statistics.mean_D, sigma=statistics.covariance_DD)
    found = evaluate(*files, options=Options(bootstrap=0))
    assert found["measures"].keys() == {"fid", "inception_score"}
    assert found["left_out"] == {
        "sfid": "the reference has no statistics of spatial features (mu_s, sigma_s)",
        "precision": "the reference has statistics alone, no images",
        "recall": "the reference has statistics alone, no images",
    }
    made = features(command.load_features("x"), MADE_NHW3, tmp_path / "x.npz")[0]
    expected = frechet_distance(statistics, Gaussian.of_rows(made))
    assert found["measures"]["fid"]["value"] == pytest.approx(expected, rel=1e-9)


def test_too_few_samples_are_refused_before_anything_is_computed(files, monkeypatch):
    monkeypatch.setattr(command, "load_features", None)
    for file in sorted(files[0].iterdir())[12:]:
        file.unlink()
    with pytest.raises(
        RequestError, match=r"made: 12 images of the samples, expected more than 12: with fewer a covar"
    ):
        evaluate(*files, options=Options())


@pytest.mark.parametrize("repeats", [1, -2])
def test_one_repeat_has_no_spread(repeats):
    with pytest.raises(RequestError, match=f"bootstrap: got {repeats}, expected 0 "):
        Options(bootstrap=repeats)


def run(files, *options: str):
    names = ("--samples", "--reference", "--features")
    arguments = [str(part) for pair in zip(names, files, strict=True) for part in pair]
    return CliRunner().invoke(app, ["evaluate", *arguments, *options], env={"COLUMNS": "200"})


def test_the_command_prints_numbers_and_protocol(files, tmp_path, monkeypatch, small_network):
    result = run(files, "--bootstrap", "2", "--out", str(tmp_path / "found.json"))
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "found.json").read_text())
    lines = result.output.splitlines()
    value, (low, high) = data["measures"]["fid"]["value"], data["measures"]["fid"]["interval"]
    assert f"FID {value:.3f} {low:.3f}–{high:.3f} lower" in [" ".join(line.replace("│", "").split()) for line in lines]
    assert f"samples: {files[0]}, 30 images of 6×4, PNG, classes not known, settings not known" in lines
    assert f"reference: {files[1]}, 40 images, statistics computed, precision and recall against 40" in lines
    assert f"features: {files[2]}, sha256 {'a' * 64}, the published weights" in lines
    assert lines[-1].startswith("not the paper's protocol: 30 images, not 50,000; balance of classes not known; ")

    other = replace(small_network, published=False, sha256="b" * 64)
    monkeypatch.setattr(command, "load_features", lambda path, **_: other)
    result = run(files, "--bootstrap", "0", "--json", "--no-precision-recall")
    found = json.loads(result.output)
    assert found["left_out"] == {"precision": "not asked for", "recall": "not asked for"}
    assert found["reference"]["features"] == "computed"  # those kept are of other weights
    assert found["differences_from_paper"][-2:] == [
        "features of other weights than the published ones",
        "reference statistics computed from the images given",
    ]


def test_the_network_takes_what_the_command_says(files, small_network, monkeypatch):
    asked: dict[str, object] = {}
    monkeypatch.setattr(command, "load_features", lambda path, **given: asked.update(given) or small_network)
    result = run(files, "--bootstrap", "0", "--features-sha256", "ab", "--device", "cpu", "--no-cache")
    assert result.exit_code == 0, result.output
    assert asked == {"sha256": "ab", "device": "cpu"}
    assert not torch.cuda.is_initialized()
