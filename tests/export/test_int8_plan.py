"""`--precision auto`: calibration, smoothing, and what is chosen where int8 is slow, unfaithful or harmless."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
from var_export.smoothing import SMOOTHING, smoothed_weights, smoothing_factors
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
        given = calibration(plain, str(tmp_path), ["a", "b", *(str(i) for i in range(2, plain.var.num_classes))])
        assert given.labels == [0, 1, 1]
        assert given.source == "3 images"
        assert not torch.equal(given.reference.tokens[-1][0], given.reference.tokens[-1][1])

    @pytest.mark.parametrize("text", ["0,x", "", "-1", "0,99999", "no/such/folder"])
    def test_wrong_classes(self, plain, text):
        classes = plain.var.num_classes
        with pytest.raises(RequestError) as error:
            calibration(plain, text)
        assert str(error.value) == (
            f"calibration: got {text!r}, expected class ids from 0 to {classes - 1}, like 0,5,9, or a folder with a "
            "folder of images per class"
        )

    def test_folders_that_do_not_serve(self, plain, tmp_path):
        with pytest.raises(DataError, match="got no sub-folders"):
            calibration(plain, str(tmp_path))
        for i in range(plain.var.num_classes + 1):
            (tmp_path / f"{i:04d}").mkdir()
            Image.new("RGB", (8, 8)).save(tmp_path / f"{i:04d}" / "x.png")
        with pytest.raises(
            RequestError, match=r"has \d+ classes \(0000, …\), of which the model's \d+ are not told by name"
        ):
            calibration(plain, str(tmp_path))

    def test_folders_are_told_by_name_where_names_are_known(self, plain, tmp_path):
        names = [f"kind {i}" for i in range(plain.var.num_classes)]
        for label in (3, 1):
            (tmp_path / names[label]).mkdir()
            Image.new("RGB", (8, 8)).save(tmp_path / names[label] / "x.png")
        assert calibration(plain, str(tmp_path), names).labels == [1, 3]
        with pytest.raises(RequestError, match=r"has 2 classes \(kind 1, …\)"):
            calibration(plain, str(tmp_path))
        with pytest.raises(RequestError, match=r"has 2 classes \(kind 1, …\)"):
            calibration(plain, str(tmp_path), ["other", *names[2:], "another"])

    def test_an_image_that_cannot_be_read_is_named(self, plain, tmp_path, monkeypatch):
        for i in range(plain.var.num_classes):
            (tmp_path / str(i)).mkdir()
            Image.new("RGB", (8, 8)).save(tmp_path / str(i) / "x.png")
        (tmp_path / "0" / "x.png").write_bytes(b"no image")
        with pytest.raises(RequestError, match=r"calibration: .*x.png cannot be read \(.*\); take it out$"):
            calibration(plain, str(tmp_path))
        Image.new("RGB", (50, 50)).save(tmp_path / "0" / "x.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # beyond twice as many PIL raises
        with pytest.raises(RequestError, match=r"calibration: .*x.png cannot be read \(.*decompression bomb.*\)"):
            calibration(plain, str(tmp_path))


class TestSmoothing:
    def test_changes_nothing_in_exact_arithmetic(self, pair, tmp_path):
        """Float32 bundles with and without it draw the same image, though activations and weights differ by factors."""
        peaks = calibration(pair, "0").peaks
        for i, peak_D in enumerate(peaks.values()):
            peak_D[i % len(peak_D)] *= 1000  # factors far from 1
        plain = var_deploy.load(write_bundle(pair, tmp_path / "plain"))
        factors = smoothing_factors(deploy_weights(pair), peaks)
        smooth = var_deploy.load(write_bundle(pair, tmp_path / "smooth", factors=factors, kept=["blocks.0"]))
        one, other = (pipe.generate([0, 1], seeds=7, top_k=1) for pipe in (plain, smooth))
        for expected, got in zip(one.tokens, other.tokens, strict=True):
            np.testing.assert_array_equal(got, expected)
        np.testing.assert_allclose(other.pixels, one.pixels, atol=1e-4)  # rounding of a greedy image

    def test_factors(self, pair):
        peaks = calibration(pair, "0").peaks
        weights = deploy_weights(pair)
        changed = smoothed_weights(weights, pair.var, smoothing_factors(weights, peaks), kept=["blocks.1"])
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
        weights = deploy_weights(plain)
        factors = smoothed_weights(weights, plain.var, smoothing_factors(weights, peaks))[SMOOTHING].numpy()
        assert factors[0, 0, 2, 3] == 1
        assert np.isfinite(factors).all()


class FakeTrials:
    """Instead of the engine: parts disturb by known amounts, which add up, and int8 takes a known time."""

    KL = {"blocks.0": 1e-3, "blocks.1": 4e-3, "head": 2e-3, "condition": 0.0}  # noqa: RUF012
    seconds = 1.0  #: of a model in int8 alone; float32 takes 2
    smoothed = 1.0  #: share of the disturbance that is left

    def __init__(self, *_: object) -> None:
        self.factors = {"a product": torch.ones(1)}

    def run(self, kept: Sequence[str] = (), factors: object = None) -> Trial:
        taken = [part for part in self.KL if part not in kept]
        share = len(taken) / len(self.KL)
        mean_kl = sum(self.KL[part] for part in taken) * (1 if factors is None else self.smoothed)
        return Trial(mean_kl=mean_kl, seconds=2 + share * (self.seconds - 2), float32_seconds=2.0)


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
        assert (plan.precision, plan.kept, plan.factors) == (Precision.INT8, (), None)
        assert plan.reason == "2.00 times as fast as float32"
        assert plan.trial.mean_kl == pytest.approx(7e-3)
        assert {part: trial.mean_kl for part, trial in plan.alone.items()} == FakeTrials.KL

    @pytest.mark.parametrize(("limit", "kept"), [(6.9e-3, ("blocks.1",)), (1.5e-3, ("blocks.1", "head"))])
    def test_the_most_sensitive_parts_stay_float32(self, planned, limit, kept):
        plan = planned(limit)
        assert (plan.precision, plan.kept) == (Precision.INT8, kept)
        assert plan.trial.mean_kl <= limit

    def test_slower_is_refused_before_anything_else_is_measured(self, planned):
        plan = planned(0.01, seconds=1.98)
        assert plan.precision is Precision.FP32
        assert plan.reason == "int8 is not faster here: 1.98 s, float32 2 s"
        assert plan.alone == {}

    def test_what_is_left_of_int8_may_not_be_worth_it(self, planned):
        plan = planned(1.5e-3, seconds=1.9)
        assert (plan.precision, plan.kept) == (Precision.FP32, ())
        assert plan.reason == "what int8 may take is not faster here: 1.95 s, float32 2 s"

    def test_int8_that_takes_nothing_is_refused(self, planned):
        plan = planned(-1.0)
        assert (plan.precision, plan.kept, plan.factors) == (Precision.FP32, (), None)
        assert plan.reason == "int8 is not faithful: mean KL 0.0e+00, limit -1"  # that of the least sensitive part

    def test_a_nan_is_not_faithful(self, planned):
        plan = planned(0.01, KL=dict.fromkeys(FakeTrials.KL, float("nan")))
        assert plan.precision is Precision.FP32

    def test_a_part_that_makes_a_nan_stays_float32(self, planned):
        plan = planned(0.01, KL=FakeTrials.KL | {"head": float("nan")})
        assert (plan.precision, plan.kept) == (Precision.INT8, ("head",))

    def test_a_part_that_is_slower_stays_float32(self, planned, monkeypatch):
        run = FakeTrials.run

        def slow_head(self, kept: Sequence[str] = (), factors: object = None) -> Trial:
            trial = run(self, kept, factors)
            alone = len(kept) == len(self.KL) - 1
            return replace(trial, seconds=2.2) if alone and "head" not in kept else trial

        plan = planned(0.01, run=slow_head)
        assert (plan.precision, plan.kept) == (Precision.INT8, ("head",))
        assert plan.trial.mean_kl == pytest.approx(5e-3)

    def test_parts_that_are_all_slower_are_refused(self, planned):
        run = FakeTrials.run

        def slow(self, kept: Sequence[str] = (), factors: object = None) -> Trial:
            trial = run(self, kept, factors)
            return replace(trial, seconds=2.2) if kept else trial

        plan = planned(0.01, run=slow)
        assert (plan.precision, plan.reason) == (Precision.FP32, "every part alone is slower than in float32 here")

    @pytest.mark.parametrize(("left", "used"), [(0.5, True), (0.95, False)])
    def test_smoothing_is_used_where_it_helps(self, planned, left, used):
        plan = planned(0.01, smoothed=left)
        assert (plan.factors is not None) is used
        assert plan.trial.mean_kl == pytest.approx(7e-3 * (left if used else 1))

    def test_trials_for_real(self, plain, float32, monkeypatch):
        monkeypatch.setattr(planner, "AT_LEAST_SECONDS", 0)
        trials, parts = planner._Trials(plain, float32, calibration(plain, "0"), None), parts_of(plain.var)
        whole, none = trials.run(), trials.run(parts)
        assert none.mean_kl < 1e-9 < whole.mean_kl < planner.MAX_MEAN_KL
        assert min(whole.seconds, whole.float32_seconds) > 0
        for part in parts:
            assert 1e-9 < trials.run([other for other in parts if other != part]).mean_kl < planner.MAX_MEAN_KL

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
        rough, smooth = (trials.run(factors=factors) for factors in (None, trials.factors))
        assert smooth.mean_kl < 0.2 * rough.mean_kl


class TestExport:
    @pytest.fixture
    def chosen(self, plain, monkeypatch):
        """`chosen(kept, smoothing)` stands in for the measurement."""

        def choose(kept: tuple[str, ...], smoothing: bool) -> None:
            plan = planner.Int8Plan(
                precision=Precision.INT8,
                reason="1.50 times as fast as float32",
                kept=kept,
                factors=smoothing_factors(deploy_weights(plain), calibration(plain, "0").peaks) if smoothing else None,
                trial=Trial(mean_kl=0.001, seconds=2.0, float32_seconds=3.0),
                alone={
                    "head": Trial(mean_kl=0.002, seconds=2.5, float32_seconds=3.0),
                    "blocks.1": Trial(mean_kl=float("nan"), seconds=2.5, float32_seconds=2.0),
                },
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
        assert re.search(r"head +│ 2\.0e-03 │ 1\.20", result.output)
        assert re.search(r"blocks\.1 +│ NaN +│ 0\.80", result.output)
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
            bundle_from_checkpoint(*tiny_pair[1:], tmp_path / "deep" / "bundle", precision="auto", calibration="0")
        assert list(tmp_path.iterdir()) == []

    def test_calibration_without_auto(self, tiny_pair, tmp_path):
        with pytest.raises(RequestError, match="calibration: precision fp32 needs none; leave it out, or give"):
            bundle_from_checkpoint(*tiny_pair[1:], tmp_path / "bundle", calibration="0")

    def test_for_real(self, tiny_pair, plain, tmp_path, monkeypatch):
        """What was measured is what is written: the bundle diverges as its plan says, on the same tokens."""
        monkeypatch.setattr(Trial, "faster", True)  # how fast a tiny model is does not matter
        monkeypatch.setattr(Trial, "slower", False)
        monkeypatch.setattr(planner, "AT_LEAST_SECONDS", 0)
        given = calibration(plain, "0,1")
        trials = planner._Trials(plain, Bundle.open(write_bundle(plain, tmp_path / "float32")), given, None)
        monkeypatch.setattr(planner, "MAX_MEAN_KL", 0.7 * trials.run().mean_kl)
        out = Path(bundle_from_checkpoint(*tiny_pair[1:], tmp_path / "bundle", precision="auto", calibration="0,1"))
        manifest = Bundle.open(out).manifest
        noted = manifest.source["precision"]
        assert manifest.precision is Precision.INT8
        assert noted["calibration"] == "classes [0, 1]"
        assert 0 < len(noted["float32"]) < len(parts_of(plain.var)) == len(noted["alone"])
        engine = var_deploy.load(out).engine
        assert trials._divergence(engine) == pytest.approx(noted["trial"]["mean_kl"], rel=1e-6)
