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
from var_deploy.engines.torch import TorchEngine
from var_deploy.errors import BundleError, CheckpointError, EngineError, RequestError
from var_export import verify
from var_export.bundle import write_bundle
from var_export.verify import TOLERANCE, verify_bundle
from var_train.checkpoint import CheckpointPair


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


# ---- the torch engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_parity(tiny_bundle, tiny_pair):
    return verify_bundle(tiny_bundle, *tiny_pair[1:], engine="torch", device="cpu")


def test_the_torch_engine_passes_like_the_onnx_engine(torch_parity, parity):
    assert torch_parity.passed
    assert (torch_parity.engine, torch_parity.precision, torch_parity.exact) == ("torch", "fp32", True)
    assert (parity.engine, parity.precision, parity.exact) == ("onnx", "fp32", True)
    (rows,) = torch_parity.scales.values()
    assert [row.scale for row in rows] == [0, 1, 2, 3]
    for row in (*rows, *parity.scales["static"], *parity.scales["symbolic"]):
        assert row.logit_error < 1e-4  # what the golden vectors agree to
        assert row.token_agreement == 1.0
        assert 0 <= row.mean_kl < 1e-9  # quadratic in an error of 1e-5
    assert max(torch_parity.pixel_error.values()) < 1e-4
    # Rounding of 1e-5 of pixels is 100 dB.
    assert all(psnr > 90 for report in (torch_parity, parity) for psnr in report.decoder_psnr.values())
    assert torch_parity.encoded_token_agreement == 1.0
    assert torch_parity.reconstruction_error < 1e-4
    assert abs(torch_parity.reconstruction_loss) < 1e-2


def test_the_whole_loop_is_held_against_its_steps_where_an_engine_has_one(torch_parity, parity):
    assert parity.loop is None
    assert (torch_parity.loop.token_agreement, torch_parity.loop.clear_disagreements) == (1.0, 0)
    assert 55 < torch_parity.loop.pixel_psnr < 65  # rounding to 8 bits is 58.9 dB


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["token", "picture"])
def test_a_loop_that_draws_or_paints_otherwise_fails(small_bundle, small_paths, monkeypatch, precision, what):
    original = TorchEngine.generate

    def altered(self, *arguments):
        done = original(self, *arguments)
        if what == "token":  # the last: nothing comes after it, so that all other tokens stay right
            done.tokens[-1][0, -1] = (done.tokens[-1][0, -1] + 1) % 61
        else:
            done.bytes_BRR3[:] = np.flip(done.bytes_BRR3, axis=1).copy()
        return done

    monkeypatch.setattr(TorchEngine, "generate", altered)
    parity = verify_bundle(small_bundle, *small_paths, engine="torch", device="cpu", precision=precision)
    assert not parity.passed
    assert not parity.loop.passed
    assert (parity.loop.clear_disagreements == 1) is (what == "token")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_report_of_the_torch_engine_is_json(small_bundle, small_paths, precision):
    parity = verify_bundle(small_bundle, *small_paths, engine="torch", device="cpu", precision=precision)
    data = json.loads(json.dumps(parity.to_dict(), allow_nan=False))
    assert (data["engine"], data["precision"], data["exact"]) == ("torch", precision, precision == "fp32")
    for field in ("scales", "pixel_error", "decoder_psnr"):
        assert list(data[field]) == [precision]
    assert data["passed"] is parity.passed
    assert (data["max_mean_kl"], data["min_decoder_psnr"]) == (verify.MAX_MEAN_KL, verify.MIN_DECODER_PSNR)
    row = data["scales"][precision][0]
    assert row.keys() == {
        "scale",
        "logit_error",
        "logit_place",
        "token_agreement",
        "clear_disagreements",
        "mean_kl",
    }


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("plain_attention", 3.0),
        ("both", 1.5),
        ("phi_per_scale", 0.0),
        ("first_scale_of_four", 3.0),
        ("one_class", 0.0),
        ("no_downsampling", 3.0),
    ],
)
def test_the_torch_engine_runs_odd_configurations(odd_states, tmp_path, name, guidance):
    var, vqvae, *states = odd_states(name)
    paths = tmp_path / "var.pth", tmp_path / "vae.pth"
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    bundle = write_bundle(CheckpointPair(var, vqvae, *states), tmp_path / "bundle")
    parity = verify_bundle(bundle, *paths, engine="torch", device="cpu", guidance=guidance)
    assert parity.passed
    assert max(row.logit_error for row in parity.scales["fp32"]) < 1e-4


@pytest.mark.parametrize(
    ("weight", "by"), [("head.bias", 0.25), ("blocks.1.attn.qkv.weight", 0.5), ("decoder.conv_out.bias", 0.1)]
)
def test_a_nudged_weight_fails_in_the_torch_engine_too(small_bundle, small_paths, tmp_path, weight, by):
    parity = verify_bundle(nudged(small_bundle, tmp_path / "b", weight, by), *small_paths, engine="torch", device="cpu")
    assert not parity.passed


@pytest.mark.parametrize(
    ("limits", "passes"),
    [
        ({}, True),
        ({"MAX_MEAN_KL": 1e-9}, False),  # far less than bf16 has
        ({"MIN_DECODER_PSNR": 150.0}, False),
        ({"MAX_RECONSTRUCTION_LOSS": -100.0}, False),
        ({"MAX_MEAN_KL": 1.0, "MIN_DECODER_PSNR": 1.0, "MAX_RECONSTRUCTION_LOSS": 10.0}, True),
    ],
    ids=["as-shipped", "divergence", "decoder", "reconstruction", "lenient"],
)
def test_an_inexact_precision_is_judged_by_the_gate_alone(tiny_bundle, tiny_pair, monkeypatch, limits, passes):
    for name, value in limits.items():
        monkeypatch.setattr(verify, name, value)
    monkeypatch.setattr(verify, "TOLERANCE", 0.0)  # one that no engine could keep plays no part
    options = {"engine": "torch", "device": "cpu", "precision": "bf16", "labels": [3], "tolerance": 0.0}
    parity = verify_bundle(tiny_bundle, *tiny_pair[1:], **options)
    assert not parity.exact
    assert parity.passed is passes
    assert parity.to_dict()["max_mean_kl"] == verify.MAX_MEAN_KL


@pytest.mark.parametrize("method", ["step", "decode"])
def test_nan_fails_the_gate(small_bundle, small_paths, monkeypatch, method):
    original = getattr(TorchEngine, method)

    def with_one_nan(self, *arguments):
        result = original(self, *arguments).copy()
        result.flat[-1] = np.nan
        return result

    monkeypatch.setattr(TorchEngine, method, with_one_nan)
    monkeypatch.setattr(verify, "MAX_MEAN_KL", 1e9)
    monkeypatch.setattr(verify, "MIN_DECODER_PSNR", -1e9)
    assert not verify_bundle(small_bundle, *small_paths, engine="torch", device="cpu", precision="fp16").passed


def test_other_weights_of_the_same_shape_fail_the_gate(small_bundle, small_paths, tmp_path):
    var_state = torch.load(small_paths[0])
    var_state["head.weight"] = var_state["head.weight"].roll(1, dims=0)
    torch.save(var_state, tmp_path / "var.pth")
    options = {"engine": "torch", "device": "cpu", "precision": "bf16"}
    assert not verify_bundle(small_bundle, tmp_path / "var.pth", small_paths[1], **options).passed


@pytest.mark.parametrize("engine", ["auto", "warp", ""])
def test_an_engine_is_named(small_bundle, small_paths, engine):
    with pytest.raises(RequestError) as refusal:
        verify_bundle(small_bundle, *small_paths, engine=engine)
    assert str(refusal.value) == f"engine: got {engine!r}, expected one by name: onnx, torch, tensorrt"


@pytest.mark.parametrize("precision", ["bf16", "fp4"])
def test_what_an_engine_does_not_run_is_refused(small_bundle, small_paths, precision):
    with pytest.raises(EngineError, match=f"precision '{precision}'"):
        verify_bundle(small_bundle, *small_paths, engine="onnx", precision=precision)


def test_divergence_of_distributions_known_by_hand():
    """KL((½, ½) ‖ (¼, ¾)) = ½·ln 2 + ½·ln ⅔; a shift of all logits changes nothing."""
    expected = np.zeros((1, 2, 2), np.float32)
    got = np.log(np.array([[[1, 3], [1, 1]]], np.float32)) + 5
    by_hand = (0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2  # the mean over two tokens, one of which is equal
    assert verify.mean_kl(expected, got) == pytest.approx(by_hand, abs=1e-7)
    assert verify.mean_kl(expected, expected) == 0


def test_signal_to_noise_ratio_known_by_hand():
    pixels = np.full((1, 3, 4, 4), 0.5, np.float32)
    assert verify._psnr(pixels + np.float32(0.125), pixels) == pytest.approx(-20 * np.log10(0.125))
    assert verify._psnr(pixels, pixels) == 200


def test_a_tolerance_is_refused_where_the_gate_decides(small_bundle, small_paths):
    with pytest.raises(RequestError, match=r"tolerance: precision bf16 is held to a gate .*; leave it out"):
        verify_bundle(small_bundle, *small_paths, engine="torch", device="cpu", precision="bf16", tolerance=0.5)
