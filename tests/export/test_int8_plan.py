"""`--precision auto`: calibration, smoothing, and what is chosen where int8 is slow, unfaithful or harmless."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import var_deploy
from var_deploy.bundle import Bundle
from var_deploy.cli import app
from var_deploy.errors import DataError, EngineError, RequestError
from var_deploy.precision import Precision
from var_export import bundle as exporter
from var_export import int8_plan as planner
from var_export.bundle import bundle_from_checkpoint, write_bundle
from var_export.calibration import calibration
from var_export.deploy_view import deploy_weights
from var_export.int8_plan import Trial, int8_plan
from var_export.precision import parts_of
from var_export.smoothing import SMOOTHING, smoothed_weights
from var_train.checkpoint import CheckpointPair, load_pair


@pytest.fixture(scope="module", params=["tiny", "shared_aln"])
def pair(request, tiny_pair, shared_aln_pair) -> CheckpointPair:
    _, var, vqvae = {"tiny": tiny_pair, "shared_aln": shared_aln_pair}[request.param]
    return load_pair(var, vqvae)


@pytest.fixture(scope="module")
def plain(tiny_pair) -> CheckpointPair:
    return load_pair(*tiny_pair[1:])


@pytest.fixture
def float32(plain, tmp_path) -> Bundle:
    return Bundle.open(write_bundle(plain, tmp_path / "float32"))


class TestCalibration:
    def test_classes_are_drawn(self, plain):
        given = calibration(plain, "0,1")
        assert given.labels == [0, 1]
        assert given.source == "classes [0, 1]"
        assert [logits.shape[0] for logits in given.reference.logits] == [4] * plain.var.num_scales
        assert set(given.peaks) == {
            f"blocks.{i}.{name}" for i in range(plain.var.depth) for name in ("attn.qkv", "ffn.fc1")
        }
        again = calibration(plain, "0,1")
        for one, other in zip(given.reference.tokens, again.reference.tokens, strict=True):
            assert torch.equal(one, other)

    def test_default_is_spread_over_the_classes(self, plain):
        labels = calibration(plain, None).labels
        assert labels[0] == 0
        assert labels[-1] == plain.var.num_classes - 1
        assert len(set(labels)) == len(labels)

    def test_images_become_their_tokens(self, plain, tmp_path):
        rng = np.random.default_rng(0)
        for i, name in enumerate(["a/1.png", "b/2.png", "b/3.png"]):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)).save(tmp_path / name)
        given = calibration(plain, str(tmp_path))
        assert given.labels == [0, 1, 1]
        assert given.source == "3 images"
        assert not torch.equal(given.reference.tokens[-1][0], given.reference.tokens[-1][1])

    @pytest.mark.parametrize("text", ["0,x", "", "-1", "0,99999", "no/such/folder"])
    def test_wrong_classes(self, plain, text):
        classes = plain.var.num_classes
        with pytest.raises(RequestError) as error:
            calibration(plain, text)
        assert f"calibration: got {text!r}, expected a folder of images or class ids from 0 to {classes - 1}" in str(
            error.value
        )

    def test_folders_that_do_not_serve(self, plain, tmp_path):
        with pytest.raises(DataError, match="got no sub-folders"):
            calibration(plain, str(tmp_path))
        for i in range(plain.var.num_classes + 1):
            (tmp_path / f"{i:04d}").mkdir()
            Image.new("RGB", (8, 8)).save(tmp_path / f"{i:04d}" / "x.png")
        with pytest.raises(RequestError, match=r"classes of images, the model has \d+; give fewer"):
            calibration(plain, str(tmp_path))


class TestSmoothing:
    def test_changes_nothing_in_exact_arithmetic(self, pair, tmp_path):
        """Float32 bundles with and without it draw the same image, though activations and weights differ by factors."""
        peaks = calibration(pair, "0").peaks
        for i, peak_D in enumerate(peaks.values()):
            peak_D[i % len(peak_D)] *= 1000  # factors far from 1
        plain = var_deploy.load(write_bundle(pair, tmp_path / "plain"))
        smooth = var_deploy.load(write_bundle(pair, tmp_path / "smooth", peaks=peaks, kept=["blocks.0"]))
        one, other = (pipe.generate([0, 1], seeds=7, top_k=1) for pipe in (plain, smooth))
        for expected, got in zip(one.tokens, other.tokens, strict=True):
            np.testing.assert_array_equal(got, expected)
        np.testing.assert_allclose(other.pixels, one.pixels, atol=1e-4)  # rounding of a greedy image

    def test_factors(self, pair):
        peaks = calibration(pair, "0").peaks
        weights = deploy_weights(pair)
        changed = smoothed_weights(weights, pair.var, peaks, kept=["blocks.1"])
        factors_16D = changed[SMOOTHING].numpy()[0]
        assert (factors_16D[:, :2] == 1).all()  # gates
        assert (factors_16D[1] == 1).all()  # a block that is kept
        np.testing.assert_array_equal(factors_16D[0, 2], factors_16D[0, 4])
        for row, name in ((2, "blocks.0.attn.qkv"), (3, "blocks.0.ffn.fc1")):
            before, after = weights[f"{name}.weight"].numpy(), changed[f"{name}.weight"].numpy()
            np.testing.assert_allclose(after * factors_16D[0, row][:, None], before, rtol=1e-6)
            # α = ½: activations and weights of a channel become equally large, up to one factor for all.
            peak_D = peaks[name].numpy() * factors_16D[0, row]
            ratio_D = peak_D / np.abs(after).max(axis=1)
            np.testing.assert_allclose(ratio_D, np.full_like(ratio_D, ratio_D[0]), rtol=1e-4)

    def test_a_dead_channel_is_left_alone(self, plain):
        peaks = {name: peak_D.clone() for name, peak_D in calibration(plain, "0").peaks.items()}
        peaks["blocks.0.attn.qkv"][3] = 0
        factors = smoothed_weights(deploy_weights(plain), plain.var, peaks)[SMOOTHING].numpy()
        assert factors[0, 0, 2, 3] == 1
        assert np.isfinite(factors).all()


class FakeTrials:
    """Instead of the engine: parts disturb by known amounts, which add up, and int8 takes a known time."""

    KL = {"blocks.0": 1e-3, "blocks.1": 4e-3, "head": 2e-3}  # noqa: RUF012
    seconds = {Precision.FP32: 2.0, Precision.INT8: 1.0}  # noqa: RUF012
    smoothed = 1.0  #: share of the disturbance that is left

    def __init__(self, *_: object) -> None: ...

    def run(self, precision: Precision, kept: tuple[str, ...] = (), *, smoothing: bool = False) -> Trial:
        if precision is Precision.FP32:
            return Trial(mean_kl=0.0, seconds=self.seconds[precision])
        taken = [part for part in self.KL if part not in kept]
        share = len(taken) / len(self.KL)
        float32, int8 = self.seconds[Precision.FP32], self.seconds[Precision.INT8]
        mean_kl = sum(self.KL[part] for part in taken) * (self.smoothed if smoothing else 1)
        return Trial(mean_kl=mean_kl, seconds=float32 + share * (int8 - float32))


class TestPlan:
    @pytest.fixture
    def planned(self, plain, monkeypatch):
        """`planned(limit, **changes)`: the plan for FakeTrials with other figures."""
        given = calibration(plain, "0")

        def plan(limit: float, **changes: object) -> planner.Int8Plan:
            monkeypatch.setattr(planner, "_Trials", type("Changed", (FakeTrials,), changes))
            monkeypatch.setattr(planner, "MAX_MEAN_KL", limit)
            return int8_plan(plain, None, given)

        return plan

    def test_all_of_it(self, planned):
        plan = planned(0.01)
        assert (plan.precision, plan.kept, plan.smoothing) == (Precision.INT8, (), False)
        assert plan.reason == "2.00 times as fast as float32"
        assert plan.mean_kl == pytest.approx(7e-3)
        assert {part: trial.mean_kl for part, trial in plan.sensitivity.items()} == FakeTrials.KL

    @pytest.mark.parametrize(("limit", "kept"), [(6.9e-3, ("blocks.1",)), (1.5e-3, ("blocks.1", "head"))])
    def test_the_most_sensitive_parts_stay_float32(self, planned, limit, kept):
        plan = planned(limit)
        assert (plan.precision, plan.kept) == (Precision.INT8, kept)
        assert plan.mean_kl <= limit

    def test_slower_is_refused_before_anything_else_is_measured(self, planned):
        plan = planned(0.01, seconds={Precision.FP32: 1.0, Precision.INT8: 0.99})
        assert plan.precision is Precision.FP32
        assert plan.reason == "int8 is not faster here: 0.99 s, float32 1.00 s"
        assert plan.sensitivity == {}

    def test_what_is_left_of_int8_may_not_be_worth_it(self, planned):
        plan = planned(1.5e-3, seconds={Precision.FP32: 1.0, Precision.INT8: 0.95})
        assert plan.precision is Precision.FP32
        assert plan.reason == "what int8 may take is not faster here: 0.98 s, float32 1.00 s"

    def test_nothing_is_faithful_enough(self, planned):
        plan = planned(-1.0)
        assert plan.precision is Precision.FP32
        assert plan.reason.startswith("int8 is not faithful: mean KL ")

    def test_a_nan_is_not_faithful(self, planned):
        assert planned(0.01, KL=dict.fromkeys(FakeTrials.KL, float("nan"))).precision is Precision.FP32

    @pytest.mark.parametrize(("left", "used"), [(0.5, True), (0.95, False)])
    def test_smoothing_is_used_where_it_helps(self, planned, left, used):
        plan = planned(0.01, smoothed=left)
        assert plan.smoothing is used
        assert plan.mean_kl == pytest.approx(7e-3 * (left if used else 1))

    def test_trials_for_real(self, plain, float32):
        trials = planner._Trials(plain, float32, calibration(plain, "0"), None)
        exact, whole = trials.run(Precision.FP32), trials.run(Precision.INT8)
        alone = trials.run(Precision.INT8, [part for part in parts_of(plain.var) if part != "blocks.1"])
        assert exact.mean_kl < 1e-9 < alone.mean_kl < whole.mean_kl < planner.MAX_MEAN_KL
        assert exact.seconds > 0

    def test_smoothing_where_channels_stand_out(self, plain, tmp_path):
        """A channel a hundred times as large as the others takes their precision; smoothing gives it back."""
        state = dict(plain.var_state)
        D = plain.var.embed_dim
        for i in range(plain.var.depth):
            key = f"blocks.{i}.ada_lin.1.bias"
            bias_6D = state[key].clone()
            for row in (4, 5):  # the shifts
                bias_6D[row * D + 5] += 100.0
            state[key] = bias_6D
            for name in (f"blocks.{i}.attn.mat_qkv.weight", f"blocks.{i}.ffn.fc1.weight"):
                weight_ND = state[name].clone()
                weight_ND[:, 5] *= 0.01
                state[name] = weight_ND
        pair = replace(plain, var_state=state)
        bundle = Bundle.open(write_bundle(pair, tmp_path / "outliers"))
        given = calibration(pair, "0")
        trials = planner._Trials(pair, bundle, given, None)
        rough, smooth = (trials.run(Precision.INT8, smoothing=smoothing) for smoothing in (False, True))
        assert smooth.mean_kl < 0.2 * rough.mean_kl


class TestExport:
    @pytest.fixture
    def chosen(self, monkeypatch):
        """`chosen(kept, smoothing)` stands in for the measurement."""

        def choose(kept: tuple[str, ...], smoothing: bool) -> None:
            plan = planner.Int8Plan(
                precision=Precision.INT8,
                reason="1.50 times as fast as float32",
                kept=kept,
                smoothing=smoothing,
                float32_seconds=3.0,
                seconds=2.0,
                mean_kl=0.001,
                sensitivity={"head": Trial(mean_kl=0.002, seconds=2.5)},
                calibration="classes [0]",
            )
            monkeypatch.setattr(exporter, "int8_plan", lambda *args, **options: plan)

        return choose

    @pytest.mark.parametrize("smoothing", [False, True])
    def test_a_mixed_bundle(self, tiny_pair, tmp_path, chosen, smoothing):
        chosen(("blocks.1", "head"), smoothing)
        _, var, vqvae = tiny_pair
        out = tmp_path / "bundle"
        options = ["export", "--var", str(var), "--vae", str(vqvae), "--out", str(out), "--precision", "auto"]
        result = CliRunner().invoke(app, [*options, "--calibration", "0"])
        assert result.exit_code == 0, result.output
        words = f"int8 (blocks.1, head kept in float32, channels {'' if smoothing else 'not '}smoothed): 1.50 times"
        assert words in result.output
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
        manifest = Bundle.open(out).manifest
        assert manifest.precision is Precision.INT8
        assert manifest.source["precision"]["float32"] == ["blocks.1", "head"]
        names = Bundle.open(out).weight_sizes()
        assert ("smoothing" in names) is smoothing
        assert "blocks.0.attn.qkv.column_scale" in names
        assert "blocks.1.attn.qkv.column_scale" not in names
        pipe, exact = var_deploy.load(out), var_deploy.load(write_bundle(load_pair(var, vqvae), tmp_path / "exact"))
        ours, theirs = (p.engine.step(p.engine.begin(np.array([0, 1])), 0, None) for p in (pipe, exact))
        assert 0 < np.abs(ours - theirs).max() < 0.2 * np.abs(theirs).max()

    def test_a_failed_measurement_leaves_nothing(self, tiny_pair, tmp_path, monkeypatch):
        def fail(*args: object, **options: object) -> None:
            raise EngineError("no engine")

        monkeypatch.setattr(exporter, "int8_plan", fail)
        with pytest.raises(EngineError, match="no engine"):
            bundle_from_checkpoint(*tiny_pair[1:], tmp_path / "deep" / "bundle", precision=None, calibration="0")
        assert list(tmp_path.iterdir()) == []

    def test_calibration_without_auto(self, tiny_pair, tmp_path):
        with pytest.raises(RequestError, match="calibration: precision fp32 needs none; leave it out, or give"):
            bundle_from_checkpoint(*tiny_pair[1:], tmp_path / "bundle", calibration="0")

    def test_for_real(self, tiny_pair, tmp_path):
        out = Path(bundle_from_checkpoint(*tiny_pair[1:], tmp_path / "bundle", precision=None, calibration="0,1"))
        manifest = Bundle.open(out).manifest
        noted = manifest.source["precision"]
        assert noted["calibration"] == "classes [0, 1]"
        assert noted["float32_seconds"] > 0
        assert manifest.precision is (Precision.INT8 if "times as fast" in noted["reason"] else Precision.FP32)
