"""Files of weights: what loads, what is refused and how, and that a file is known by its digest."""

from __future__ import annotations

import hashlib
import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from var_deploy.errors import CheckpointError, RequestError
from var_deploy.evaluation import features
from var_deploy.evaluation.features import load_features
from var_deploy.evaluation.samples import NpzImages

ADVICE = "; give FID's Inception as torch-fidelity and pytorch-fid publish it (…-6726825d.pth)"


def test_a_file_loads_as_it_is_without_counters_of_training_steps(weights, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({key: value for key, value in weights.items() if "num_batches" not in key}, path)
    found = load_features(path, device="cpu")
    for key, value in found.network.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert not any(module.training for module in found.network.modules())
    np.testing.assert_array_equal(found.classifier_KD, weights["fc.weight"])


@pytest.mark.gpu
def test_a_gpu_computes_the_same_features(weights_file, tmp_path):
    images_NHW3 = np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images_NHW3)
    images = NpzImages(path=tmp_path / "images.npz", shape=images_NHW3.shape)
    both = [next(load_features(weights_file, device=device).batches(images)) for device in ("cuda", "cpu")]
    for ours, theirs in zip(*both, strict=True):
        # Sums in another order; TensorFloat-32 would be ten times as far off.
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_published_is_what_has_the_published_digest_or_the_one_that_the_user_gives(thin, write_pth, monkeypatch):
    path = write_pth(thin)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_features(path, sha256=digest.upper(), device="cpu")
    assert found.published
    assert found.sha256 == digest
    with pytest.raises(CheckpointError, match=rf"file.pth: sha256 {digest}, expected 1234; copy it again, or correct"):
        load_features(path, sha256="1234")
    assert not load_features(path, device="cpu").published
    monkeypatch.setattr(features, "PUBLISHED", digest[:8])
    assert load_features(path, device="cpu").published


@pytest.fixture(scope="module")
def thin(weights):
    """Every tensor of the layout as one number, repeated: a file of them has kilobytes."""
    return {key: torch.ones((), dtype=value.dtype).expand(value.shape) for key, value in weights.items()}


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda w: {}, r"missing Conv2d_1a_3x3.bn.bias (32,); missing Conv2d_1a_3x3.bn.running_mean (32,); missing "),
        (lambda w: w | {"fc.weight": w["fc.weight"][:1000]}, "fc.weight has shape (1000, 2048), expected (1008, 2048)"),
        (lambda w: w | {"fc.bias": w["fc.bias"] / 0}, "fc.bias holds NaN or infinite values"),
        (
            lambda w: w | {"Mixed_7c.branch_pool.bn.running_var": -torch.ones(192)},
            "running_var holds negative variances",
        ),
        (lambda w: w | {"AuxLogits.fc.bias": torch.ones(2)}, "unexpected AuxLogits.fc.bias"),
        (lambda w: w | {"fc.bias": 3}, "missing fc.bias (1008,)"),
        (lambda w: [1, 2], "holds a list, expected a state dict"),
        (lambda w: {"a": _Runs()}, "not a file of weights, or damaged (Weights only load failed."),
    ],
    ids=["empty", "shape", "nan", "variance", "unexpected", "no tensor", "list", "code"],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(thin, write_pth, content, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_pth(content(thin))
    with pytest.raises(CheckpointError) as caught:
        load_features(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert said in line
    assert line.endswith(ADVICE)
    assert "\n" not in line
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.pth", None, "cannot be read (No such file or directory)"),
        ("text.pth", b"no weights", "not a file of weights, or damaged ("),
        ("short.safetensors", b"\x09\x00", "not a file of weights, or damaged ("),
    ],
)
def test_files_that_are_none_are_refused_in_one_line(name, content, said, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {said}")):
        load_features(path)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda" if not torch.cuda.is_available() else "mps"])
def test_devices_that_are_not_there(tmp_path, device):
    with pytest.raises(RequestError, match=f"device: got '{device}', "):
        load_features(tmp_path / "not looked at", device=device)


def test_features_that_are_no_numbers_name_the_image(small_network, tmp_path, monkeypatch):
    images_NHW3 = np.zeros((70, 4, 4, 3), dtype=np.uint8)
    images_NHW3[66] = 255
    np.savez(tmp_path / "images.npz", arr_0=images_NHW3)
    images = NpzImages(path=tmp_path / "images.npz", shape=images_NHW3.shape)
    # White images have no features.
    forward = lambda x: (torch.log(1 - x.float().mean((2, 3)) / 255),) * 2  # noqa: E731
    monkeypatch.setattr(small_network.network, "forward", forward)
    with pytest.raises(RequestError, match=r"images\.npz: features of image 66 hold NaN or infinity, with the weights"):
        list(small_network.batches(images))


def test_images_reach_the_network_as_they_are(small_network, tmp_path):
    images_NHW3 = np.random.default_rng(0).integers(0, 256, (70, 6, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images_NHW3)
    images, heard = NpzImages(path=tmp_path / "images.npz", shape=images_NHW3.shape), []
    pooled_ND = np.concatenate([pooled for pooled, _ in small_network.batches(images, heard.append)])
    # Means of the four quarters, channels first.
    expected = images_NHW3.reshape(70, 2, 3, 2, 4, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(70, 12) / 255
    np.testing.assert_allclose(pooled_ND, expected, rtol=1e-5)
    assert heard == [64, 70]
