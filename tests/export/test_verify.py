"""`verify` passes a faithful bundle and fails every other one: nudged weights, NaN, another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import var_deploy
from var_deploy.bundle import sha256_of
from var_deploy.engines.onnx import OnnxEngine
from var_deploy.errors import BundleError, CheckpointError, RequestError
from var_export.bundle import write_bundle
from var_export.checkpoint import CheckpointPair
from var_export.verify import TOLERANCE, verify_bundle


def nudged(bundle: Path, out: Path, name: str, by: float) -> Path:
    """A copy whose weight `name` differs by `by` in one entry, sealed as if it had been exported so."""
    shutil.copytree(bundle, out)
    path = out / "weights.safetensors"
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    begin = end + json.loads(content[8:end])[name]["data_offsets"][0]
    value = np.frombuffer(content, dtype=np.float32, count=1, offset=begin)[0]
    content[begin : begin + 4] = np.float32(value + by).tobytes()
    path.write_bytes(content)
    manifest = json.loads((out / "bundle.json").read_text())
    manifest["files"]["weights.safetensors"]["sha256"] = sha256_of(path)
    (out / "bundle.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="module")
def small(odd_states, tmp_path_factory) -> tuple[Path, tuple[Path, Path]]:
    """A bundle and its checkpoints that verify in half a second."""
    directory = tmp_path_factory.mktemp("small")
    var, vqvae, *states = odd_states("one_phi")
    paths = directory / "var.pth", directory / "vae.pth"
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    return write_bundle(CheckpointPair(var, vqvae, *states), directory / "bundle"), paths


@pytest.fixture
def small_bundle(small) -> Path:
    return small[0]


@pytest.fixture
def small_paths(small) -> tuple[Path, Path]:
    return small[1]


@pytest.fixture(scope="module")
def parity(tiny_bundle, tiny_pair):
    return verify_bundle(tiny_bundle, *tiny_pair[1:])


def test_faithful_bundle_passes_well_within_the_tolerance(parity):
    assert parity.passed
    assert parity.tolerance == TOLERANCE
    for rows in parity.scales.values():
        assert [row.scale for row in rows] == [0, 1, 2, 3]
        assert all(row.logit_error < 1e-4 for row in rows)  # what the golden vectors agree to
        assert all(row.token_agreement == 1.0 for row in rows)
    assert max(parity.pixel_error.values()) < 1e-4
    assert parity.encoded_token_agreement == 1.0
    assert parity.reconstruction_error < 1e-4


def test_both_kinds_of_graphs_are_compared_and_the_report_is_json(parity):
    data = json.loads(json.dumps(parity.to_dict()))
    assert data["passed"] is True
    assert list(data["scales"]) == ["static", "symbolic"]
    assert list(data["pixel_error"]) == ["static", "symbolic"]
    assert data["labels"] == [0, 9]
    assert len(data["scales"]["static"][2]["logit_place"]) == 3


def test_shared_aln_bundle_passes_unguided_too(shared_aln_bundle, shared_aln_pair):
    assert verify_bundle(shared_aln_bundle, *shared_aln_pair[1:], guidance=0.0, labels=[1]).passed


def test_znorm_bundle_is_encoded_by_cosine_on_both_sides(odd_states, tmp_path):
    var, vqvae, var_state, vqvae_state = odd_states("one_phi")
    fields = {name: getattr(vqvae, name) for name in vqvae.__dataclass_fields__} | {"using_znorm": True}
    vqvae_state["quantize.embedding.weight"] *= torch.linspace(0.1, 5, 61)[:, None]  # so that cosine picks otherwise
    paths = tmp_path / "var.pth", tmp_path / "vae.pth"
    for path, state in zip(paths, (var_state, vqvae_state), strict=True):
        torch.save(state, path)
    znorm = write_bundle(CheckpointPair(var, type(vqvae)(**fields), var_state, vqvae_state), tmp_path / "znorm")
    assert verify_bundle(znorm, *paths).passed
    distance = write_bundle(CheckpointPair(var, vqvae, var_state, vqvae_state), tmp_path / "distance")
    assert verify_bundle(distance, *paths).passed
    pixels = np.random.default_rng(0).random((1, 3, 16, 16), dtype=np.float32)
    encoded = [np.concatenate(var_deploy.load(path).encode(pixels), axis=1) for path in (znorm, distance)]
    assert (encoded[0] != encoded[1]).any()


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("head.bias", "logits"),
        ("blocks.1.attn.qkv.weight", "logits"),
        ("head_nm.ada_lin.bias", "logits"),
        ("start_position", "logits"),
        ("position", "logits"),
        ("quantize.phi.bias", "logits"),
        ("decoder.conv_out.bias", "pixels"),
        ("encoder.conv_out.bias", "encoder"),
    ],
)
def test_one_changed_weight_fails(small_bundle, small_paths, tmp_path, weight, where):
    parity = verify_bundle(nudged(small_bundle, tmp_path / "b", weight, 0.5), *small_paths)
    assert not parity.passed
    logits = max(row.logit_error for rows in parity.scales.values() for row in rows) > TOLERANCE
    pixels = max(parity.pixel_error.values()) > TOLERANCE
    encoder = parity.encoded_token_agreement < 1.0
    assert {"logits": logits, "pixels": pixels, "encoder": encoder}[where]
    if where != "logits":
        assert not logits


def test_difference_far_below_the_tolerance_passes(small_bundle, small_paths, tmp_path):
    assert verify_bundle(nudged(small_bundle, tmp_path / "b", "head.bias", 1e-6), *small_paths).passed


def test_the_place_of_the_largest_error_is_told(small_bundle, small_paths, tmp_path):
    """Entry 0 of the head's bias moves entry 0 of every logit, and nothing else."""
    parity = verify_bundle(nudged(small_bundle, tmp_path / "b", "head.bias", 0.25), *small_paths)
    for rows in parity.scales.values():
        assert all(row.logit_place[2] == 0 for row in rows)
        assert all(row.logit_error == pytest.approx(0.25, abs=1e-4) for row in rows)


def test_tolerance_is_the_callers(small_bundle, small_paths):
    assert not verify_bundle(small_bundle, *small_paths, tolerance=1e-9).passed


@pytest.mark.parametrize("method", ["step", "decode"])
def test_nan_counts_as_failure(small_bundle, small_paths, monkeypatch, method):
    original = getattr(OnnxEngine, method)

    def with_one_nan(self, *arguments):
        result = original(self, *arguments).copy()
        result.flat[-1] = np.nan
        return result

    monkeypatch.setattr(OnnxEngine, method, with_one_nan)
    assert not verify_bundle(small_bundle, *small_paths).passed


@pytest.mark.parametrize("guidance", [float("nan"), -1.0, float("inf")])
def test_impossible_guidance_is_refused(small_bundle, small_paths, guidance):
    with pytest.raises(RequestError, match=r"guidance: got .*, expected a number from 0 to 1000"):
        verify_bundle(small_bundle, *small_paths, guidance=guidance)


def test_nan_features_count_as_failure(small_bundle, small_paths, monkeypatch):
    original = OnnxEngine.encode
    monkeypatch.setattr(OnnxEngine, "encode", lambda self, pixels: np.nan * original(self, pixels))
    assert not verify_bundle(small_bundle, *small_paths).passed


def test_bundle_of_another_model_is_told_apart(small_bundle, tiny_pair):
    with pytest.raises(CheckpointError, match="the bundle is of another model: its VAR is VARConfig") as refusal:
        verify_bundle(small_bundle, *tiny_pair[1:])
    assert "\n" not in str(refusal.value)


def test_other_weights_of_the_same_shape_fail(small_bundle, small_paths, tmp_path):
    """Configuration equal, weights not: only the numbers tell."""
    var_state = torch.load(small_paths[0])
    var_state["head.weight"] = var_state["head.weight"].roll(1, dims=0)
    torch.save(var_state, tmp_path / "var.pth")
    parity = verify_bundle(small_bundle, tmp_path / "var.pth", small_paths[1])
    assert not parity.passed
    assert any(row.clear_disagreements for row in parity.scales["static"])


def test_changed_file_without_its_seal_is_refused(small_bundle, small_paths, tmp_path):
    bundle = nudged(small_bundle, tmp_path / "b", "head.bias", 0.5)
    shutil.copy(small_bundle / "bundle.json", bundle / "bundle.json")
    with pytest.raises(BundleError, match=r"weights.safetensors has sha256 .*, expected"):
        verify_bundle(bundle, *small_paths)


@pytest.mark.parametrize("labels", [[7], [-1], [0, 99]])
def test_label_out_of_range_is_one_line(small_bundle, small_paths, labels):
    with pytest.raises(RequestError, match="class ids from 0 to 6"):
        verify_bundle(small_bundle, *small_paths, labels=labels)


def test_weights_of_the_copy_are_the_only_difference(small_bundle, tmp_path):
    """`nudged` changes one number, so the failures above are its doing."""
    copy = nudged(small_bundle, tmp_path / "b", "position", 0.5)
    changed = 0
    with (
        safe_open(small_bundle / "weights.safetensors", "np") as before,
        safe_open(copy / "weights.safetensors", "np") as after,
    ):
        for name in before.keys():  # noqa: SIM118 - safe_open is no mapping
            changed += int((before.get_tensor(name) != after.get_tensor(name)).sum())
    assert changed == 1
