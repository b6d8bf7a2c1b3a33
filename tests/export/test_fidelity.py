"""What `verify` notes in the manifest of an inexact bundle, what `inspect` says of it, and the samples of digits."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure
from typer.testing import CliRunner

import var_deploy
from var_deploy.bundle import MANIFEST, Bundle, note_fidelity
from var_deploy.cli import app
from var_deploy.errors import RequestError
from var_export import digits_fidelity as fidelity
from var_export import verify
from var_export.bundle import bundle_from_checkpoint, write_bundle
from var_export.digits_fidelity import DigitsFidelity, digits_fidelity, digits_split
from var_export.teacher_forcing import guided, teacher_forced
from var_export.verify import verify_bundle
from var_train import digits
from var_train.checkpoint import load_pair

CHECKPOINTS = Path(__file__).parents[2] / "train" / "checkpoints"
DIGITS = CHECKPOINTS / digits.VAR_FILE, CHECKPOINTS / digits.VQVAE_FILE
JUDGED = DigitsFidelity(images=10, accuracy=1.0, reference_accuracy=1.0, feature_distance=0.1, reference_distance=0.1)


@pytest.fixture(scope="module")
def int8(tiny_pair, tmp_path_factory) -> Path:
    return write_bundle(load_pair(*tiny_pair[1:]), tmp_path_factory.mktemp("int8") / "bundle", precision="int8")


@pytest.fixture
def bundle(int8, tmp_path) -> Path:
    """A copy that may be written."""
    return Path(shutil.copytree(int8, tmp_path / "bundle"))


def inspected(path: Path) -> str:
    result = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if "approximate" in line]
    return line


def test_the_measured_fidelity_is_noted_and_shown(bundle, tiny_pair):
    assert "int8, approximate: not measured yet, run verify" in inspected(bundle)
    parity = verify_bundle(bundle, *tiny_pair[1:], labels=[2])
    noted = Bundle.open(bundle).manifest.fidelity
    rows = [row for rows in parity.scales.values() for row in rows]
    assert parity.passed
    assert noted["passed"] is True
    assert noted["mean_kl"] == max(row.mean_kl for row in rows) > 0
    assert noted["mean_kl_by_scale"].keys() == {"static", "symbolic"}
    assert (noted["engine"], noted["classes"], noted["guidance"]) == ("onnx", [2], 1.5)
    assert noted["decoder_psnr"] == min(parity.decoder_psnr.values())
    assert "digits" not in noted
    line = inspected(bundle)
    assert f"int8, approximate: passed the fidelity gate, mean KL {noted['mean_kl']:.1e}, tokens " in line
    assert f"decoder {noted['decoder_psnr']:.1f} dB, SSIM 1.0000" in line


def test_a_failure_is_noted_too(bundle, tiny_pair, monkeypatch):
    monkeypatch.setattr(verify, "MAX_MEAN_KL", 0.0)
    assert not verify_bundle(bundle, *tiny_pair[1:], labels=[2]).passed
    assert "approximate: FAILED the fidelity gate" in inspected(bundle)


@pytest.mark.parametrize(("accuracy", "passed"), [(1.0, True), (0.98, False)])
def test_digits_of_an_earlier_run_stay_and_count(bundle, tiny_pair, accuracy, passed, caplog):
    judged = asdict(replace(JUDGED, accuracy=accuracy))
    note_fidelity(Bundle.open(bundle), {"passed": passed, "digits": judged})
    assert verify_bundle(bundle, *tiny_pair[1:], labels=[2]).passed
    assert ("the digits of an earlier run did not pass" in caplog.text) is not passed
    noted = Bundle.open(bundle).manifest.fidelity
    assert noted["digits"] == judged
    assert noted["passed"] is passed
    assert f"digits {accuracy:.1%}, of the reference's 100.0%" in inspected(bundle)


@pytest.mark.parametrize("digits", [{"images": 3}, "ten", [1]])
def test_digits_that_nobody_understands_are_dropped(bundle, tiny_pair, digits):
    note_fidelity(Bundle.open(bundle), {"digits": digits})
    verify_bundle(bundle, *tiny_pair[1:], labels=[2])
    assert "digits" not in Bundle.open(bundle).manifest.fidelity


def test_what_json_does_not_have_becomes_null(bundle):
    note_fidelity(Bundle.open(bundle), {"passed": False, "mean_kl": float("nan"), "deep": {"a": [float("inf"), 1.0]}})
    assert json.loads((bundle / MANIFEST).read_text())["fidelity"] == {
        "passed": False,
        "mean_kl": None,
        "deep": {"a": [None, 1.0]},
    }
    assert "approximate: FAILED the fidelity gate" in inspected(bundle)
    assert "mean KL" not in inspected(bundle)


def test_a_bundle_that_cannot_be_written_stays_as_it_is(bundle, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise var_deploy.errors.RequestError("no space")

    before = (bundle / MANIFEST).read_bytes()
    monkeypatch.setattr("var_deploy.bundle.write_text", full)
    note_fidelity(Bundle.open(bundle), {"passed": True})
    assert (bundle / MANIFEST).read_bytes() == before
    assert "the measured fidelity could not be noted (no space)" in caplog.text


def test_an_exact_bundle_says_nothing_of_fidelity(tiny_bundle, tiny_pair, tmp_path):
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = (copy / MANIFEST).read_bytes()
    verify_bundle(copy, *tiny_pair[1:], labels=[0])
    assert (copy / MANIFEST).read_bytes() == before


def test_bf16_that_no_engine_runs_is_not_sent_to_verify(tiny_pair, tmp_path):
    path = write_bundle(load_pair(*tiny_pair[1:]), tmp_path / "bf16", precision="bf16")
    assert "bf16, approximate: not measured: no engine here runs it yet" in inspected(path)


def test_structural_similarity_known_by_hand():
    """Of two flat images it is (2ab + c) / (a² + b² + c), c = 0.01²: there is no structure to differ."""
    a, b = 0.5, 0.75
    flat = [np.full((1, 3, 16, 16), value, np.float32) for value in (a, b)]
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    # Its variances are differences of float32 numbers, which do not quite cancel.
    assert verify._ssim(flat[0], torch.from_numpy(flat[1])) == pytest.approx(expected, abs=1e-3)
    noise = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    assert verify._ssim(noise, torch.from_numpy(noise)) == pytest.approx(1.0, abs=1e-6)
    shifted = torch.from_numpy(np.roll(noise, 1, axis=-1).copy())
    assert verify._ssim(noise, shifted) == pytest.approx(
        structural_similarity_index_measure(torch.from_numpy(noise), shifted, data_range=1.0).item()
    )
    assert verify._ssim(noise, shifted) < 0.5


def test_teacher_forcing_feeds_the_tokens_and_not_what_the_engine_would_draw(tiny_bundle):
    pipe = var_deploy.load(tiny_bundle)
    config, codebook_VC = pipe.bundle.manifest.var, pipe.bundle.weight("quantize.embedding.weight")
    fed: list[tuple[np.ndarray, np.ndarray | None]] = []

    class Listening:
        def begin(self, labels_R):
            fed.append((labels_R, None))
            return pipe.engine.begin(labels_R)

        def step(self, state, k, codes_RnC):
            fed.append((np.array([k]), codes_RnC))
            return pipe.engine.step(state, k, codes_RnC)

    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, config.vocab_size, (2, n)) for n in config.tokens_per_scale]
    scales = [
        (forced.k, guided(forced.logits_RnV, 0.5, 2), forced.seconds)
        for forced in teacher_forced(Listening(), config, codebook_VC, tokens, [3, 1], copies=2)
    ]
    assert [k for k, *_ in scales] == list(range(config.num_scales))
    assert all(seconds > 0 for *_, seconds in scales)
    assert fed[0][0].tolist() == [3, 1, config.null_class, config.null_class]
    assert fed[1][1] is None
    for k, (_, codes_RnC) in enumerate(fed[2:]):
        np.testing.assert_array_equal(codes_RnC, codebook_VC[np.concatenate([tokens[k]] * 2)])
    # Images one by one: the same logits, so rows belong to their image and their null row.
    for image, label in enumerate([3, 1]):
        own = [tokens_Bn[image : image + 1] for tokens_Bn in tokens]
        for forced in teacher_forced(pipe.engine, config, codebook_VC, own, [label], copies=2):
            np.testing.assert_allclose(
                guided(forced.logits_RnV, 0.5, 2)[0], scales[forced.k][1][image], atol=1e-5, rtol=0
            )


# digits ---------------------------------------------------------------------------------------------------------------


def test_another_model_than_digits_is_refused_before_anything_runs(bundle, tiny_pair, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(verify, "generate", None)
    with pytest.raises(RequestError, match=r"digits: the bundle makes \d+ classes at \d+ px, expected 10 at 32; leave"):
        verify_bundle(bundle, *tiny_pair[1:], digits=True)


def test_samples_of_the_digits_model_are_judged(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    path = bundle_from_checkpoint(*DIGITS, tmp_path / "bundle", precision="int8")
    pair = load_pair(*DIGITS)
    split, pipe = digits_split(pair.var, pair.vqvae), var_deploy.load(path)
    said: list[str] = []
    found = digits_fidelity(pipe, *pair.models(), split, images=30, progress=said.append)
    assert said == ["30 digits of the reference, twice", "30 digits of the engine"]
    assert found.images == 30
    assert min(found.accuracy, found.reference_accuracy) > 0.9
    # Thirty samples say little of a covariance; still two draws of one model are as near as this one and the other.
    assert 0.3 < found.feature_distance / found.reference_distance < 3

    generate = type(pipe).generate

    def other_classes(self, labels, **options):
        return generate(self, [(label + 1) % 10 for label in labels], **options)

    monkeypatch.setattr(type(pipe), "generate", other_classes)
    monkeypatch.setattr(fidelity, "generate_digits", lambda *_, per_class, seed: first(split.train, per_class))
    wrong = digits_fidelity(pipe, *pair.models(), split, images=30)
    assert wrong.accuracy < 0.2
    assert wrong.reference_accuracy > 0.9
    assert not wrong.passed

    images = first(split.train, 3)
    images.images_N3RR[4, 0, 0, 0] = np.nan
    monkeypatch.setattr(fidelity, "engine_digits", lambda *_: images)
    broken = digits_fidelity(pipe, *pair.models(), split, images=30)
    assert np.isnan([broken.accuracy, broken.feature_distance]).all()
    assert not broken.passed


def first(images, per_class: int):
    """So many real images of every digit."""
    chosen = np.concatenate([np.flatnonzero(images.labels_N == label)[:per_class] for label in range(10)])
    return type(images)(images.images_N3RR[chosen], images.labels_N[chosen])


@pytest.mark.parametrize(
    ("accuracy", "passed"), [(0.99, True), (0.9899, False), (float("nan"), False)], ids=["within", "beyond", "nan"]
)
def test_accuracy_within_a_point(accuracy, passed):
    assert replace(JUDGED, accuracy=accuracy).passed is passed
