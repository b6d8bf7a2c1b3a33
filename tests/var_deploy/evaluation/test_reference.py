"""What samples are compared with: statistics of a file or of images, kept by content, and never of other features."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from var_deploy.errors import RequestError
from var_deploy.evaluation import reference
from var_deploy.evaluation.reference import load_reference
from var_deploy.prepared import PreparedCache

IMAGES_NHW3 = np.random.default_rng(0).integers(0, 256, (40, 4, 6, 3), dtype=np.uint8)
SIZE = (4, 6)
STATISTICS = {"mu": np.arange(12.0), "sigma": np.eye(12), "mu_s": np.arange(6.0), "sigma_s": 2 * np.eye(6)}


@pytest.fixture
def written(tmp_path):
    """`written(**arrays)` → path of an .npz; by default images alone."""

    def write(**arrays: np.ndarray) -> Path:
        np.savez(tmp_path / "reference.npz", **(arrays or {"arr_0": IMAGES_NHW3}))
        return tmp_path / "reference.npz"

    return write


def quarters(images_NHW3: np.ndarray) -> np.ndarray:
    """What the small network sees."""
    n, height, width, _ = images_NHW3.shape
    cells = images_NHW3.reshape(n, 2, height // 2, 2, width // 2, 3) / 255
    return cells.mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(n, 12)


def test_statistics_of_images(small_network, written, tmp_path):
    found = load_reference(written(), small_network, size=SIZE)
    features_ND = quarters(IMAGES_NHW3)
    np.testing.assert_allclose(found.pooled.mean_D, features_ND.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.pooled.covariance_DD, np.cov(features_ND, rowvar=False), atol=1e-7)
    np.testing.assert_allclose(found.spatial.covariance_DD, np.cov(features_ND[:, :6] ** 2, rowvar=False), atol=1e-7)
    np.testing.assert_allclose(found.manifold_ND, features_ND, rtol=1e-5)
    assert found.notes == {
        "path": str(tmp_path / "reference.npz"),
        "images": 40,
        "statistics": "computed",
        "features": "computed",
        "manifold": 40,
    }


def test_of_many_images_the_manifold_takes_some_at_equal_steps(small_network, written, monkeypatch):
    monkeypatch.setattr(reference, "MANIFOLD_IMAGES", 4)
    found = load_reference(written(), small_network, size=SIZE)
    np.testing.assert_allclose(found.manifold_ND, quarters(IMAGES_NHW3)[[0, 13, 26, 39]], rtol=1e-5)
    np.testing.assert_allclose(found.pooled.mean_D, quarters(IMAGES_NHW3).mean(axis=0), rtol=1e-6)


def test_statistics_of_a_file_are_taken_as_they_are(small_network, written):
    alone = load_reference(written(**STATISTICS), small_network, size=SIZE)
    np.testing.assert_array_equal(alone.pooled.mean_D, STATISTICS["mu"])
    np.testing.assert_array_equal(alone.spatial.covariance_DD, STATISTICS["sigma_s"])
    assert alone.manifold_ND is None
    assert (alone.notes["images"], alone.notes["statistics"], alone.notes["manifold"]) == (None, "of the file", 0)

    # As guided-diffusion's: the whole data set's statistics beside a few of its images, fewer than a covariance needs.
    both = load_reference(written(arr_0=IMAGES_NHW3[:5], **STATISTICS), small_network, size=SIZE)
    np.testing.assert_array_equal(both.pooled.mean_D, STATISTICS["mu"])
    np.testing.assert_allclose(both.manifold_ND, quarters(IMAGES_NHW3[:5]), rtol=1e-5)

    pooled_only = load_reference(written(mu=STATISTICS["mu"], sigma=STATISTICS["sigma"]), small_network, size=SIZE)
    assert pooled_only.spatial is None


def test_computed_once_and_kept_by_features_and_content(small_network, written, tmp_path, monkeypatch):
    cache = PreparedCache(directory=tmp_path / "cache")
    computed: list[str] = []
    compute = reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *a: (computed.append(a[1].sha256[0]), compute(*a))[1])

    def load(network=small_network, **arrays):
        return load_reference(written(**arrays), network, size=SIZE, cache=cache)

    first, second = load(), load()
    assert computed == ["a"]
    assert (first.notes["features"], second.notes["features"]) == ("computed", "kept")
    np.testing.assert_array_equal(first.pooled.covariance_DD, second.pooled.covariance_DD)
    np.testing.assert_array_equal(first.manifold_ND, second.manifold_ND)
    load(replace(small_network, sha256="b" * 64))  # other features
    load(arr_0=IMAGES_NHW3[::-1])  # other content
    load(arr_0=IMAGES_NHW3, **STATISTICS)  # the same images, of which features alone are kept
    assert computed == ["a", "b", "a", "a"]
    for kept in cache.directory.glob("reference-*"):
        (kept / "reference.safetensors").write_bytes(b"damaged")
    again = load()
    assert again.notes["features"] == "computed"
    np.testing.assert_array_equal(again.pooled.covariance_DD, first.pooled.covariance_DD)


@pytest.mark.parametrize(
    ("arrays", "published", "said"),
    [
        (STATISTICS, False, "its statistics are of the published network's features, "),
        (STATISTICS | {"mu": np.zeros(2048)}, True, "mu: got float64 (2048,), expected float (12,): statistics of"),
        (STATISTICS | {"sigma": np.eye(3)}, True, "sigma: got float64 (3, 3), expected float (12, 12): statistics of"),
        ({"mu": np.zeros(12)}, True, "sigma: got nothing, expected float (12, 12): statistics of other features, or"),
        (STATISTICS | {"mu_s": np.arange(6)}, True, "mu_s: got int64 (6,), expected float (6,)"),
        (STATISTICS | {"sigma_s": np.full((6, 6), np.nan)}, True, "sigma_s holds NaN or infinity; make or copy"),
        (STATISTICS | {"sigma": -np.eye(12)}, True, "sigma is no covariance: its eigenvalue -1.0e+00 is negative"),
        (STATISTICS | {"sigma": np.eye(12) + np.eye(12, k=1)}, True, "sigma is no covariance: it is not symmetric"),
        (STATISTICS | {"sigma": 1e200 * np.eye(12)}, True, "sigma is no covariance: it holds 1.0e+200"),
        ({"arr_0": IMAGES_NHW3[:, :, :5]}, True, "reference images of 5×4 pixels, samples of 6×4; compare"),
        ({"arr_0": IMAGES_NHW3[:12]}, True, "12 images of the reference, expected more than 12: with fewer a"),
    ],
    ids=["features", "mean", "covariance", "half", "integers", "nan", "negative", "skew", "huge", "size", "few"],
)  # fmt: skip
def test_what_is_refused_in_one_line(small_network, written, arrays, published, said):
    path = written(**arrays)
    with pytest.raises(RequestError, match=re.escape(f"{path}: {said}")) as caught:
        load_reference(path, replace(small_network, published=published), size=SIZE)
    assert "\n" not in str(caught.value)


def test_few_images_are_enough_where_they_are_asked_for(small_network, written):
    found = load_reference(written(arr_0=IMAGES_NHW3[:3]), small_network, size=SIZE, few=True)
    assert np.linalg.matrix_rank(found.pooled.covariance_DD) == 2
    with pytest.raises(RequestError, match="1 images of the reference"):
        load_reference(written(arr_0=IMAGES_NHW3[:1]), small_network, size=SIZE, few=True)
