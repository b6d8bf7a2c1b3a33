"""Scaling laws: known laws are found again, intervals hold the truth as often as they say, operations by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("pydantic")
pytest.importorskip("scipy")

from scipy import stats

from var_deploy.bench.floor import floor
from var_deploy.config import VARConfig, config_to_dict
from var_deploy.errors import DataError, EngineError, RequestError
from var_train.configuration import VARRun
from var_train.model_flops import forward_flops, training_flops
from var_train.presets import PRESETS, preset_configs
from var_train.recipe import Progressive, Schedule
from var_train.scaling_law import (
    Fit,
    Measure,
    PowerLaw,
    ScalingReport,
    Size,
    fit_power_law,
    fit_runs,
    plot_report,
    print_report,
)
from var_train.var import VAR

SMALL = VARConfig(patch_nums=(1, 2, 4), vocab_size=61, z_channels=5, num_classes=7, depth=2, embed_dim=128, ffn_dim=320)
Records = tuple[dict[str, Any], list[dict[str, Any]]]  # run.json and the lines of metrics.jsonl


def _records(depth: int, parameters: int, *, iterations: int = 100, batch: int = 8) -> Records:
    config = dataclasses.replace(SMALL, depth=depth, embed_dim=64 * depth, ffn_dim=256 * depth)
    run = VARRun.model_validate(
        {
            "data": {"path": "images", "validation": "held out", "batch": batch},
            "optimiser": {"iterations": iterations},
            "model": {"depth": depth, "vqvae": "vae.safetensors"},
        }
    )
    record = {
        "format": 1,
        "kind": "var",
        "configuration": run.model_dump(mode="json"),
        "model": config_to_dict(config),
        "classes": [str(c) for c in range(7)],
        "images": 5000,
        "iterations": iterations,
        "batch": batch,
        "parameters": parameters,
    }
    validation = {
        "iteration": iterations,
        "validation_loss": 4.0 - 0.1 * depth,
        "validation_loss_last": 4.5 - 0.1 * depth,
        "validation_accuracy": 0.1 + 0.01 * depth,
        "validation_accuracy_last": 0.05 + 0.01 * depth,
    }
    early = validation | {"iteration": 10, "validation_loss": 9.0}
    return record, [early, {"iteration": 20, "loss": 5.0, "accuracy": [0.5, 0.1]}, validation]


def _write(folder: Path, records: Sequence[Records]) -> list[Path]:
    runs = []
    for i, (record, lines) in enumerate(records):
        runs.append(folder / f"run{i}")
        runs[-1].mkdir(parents=True, exist_ok=True)
        (runs[-1] / "run.json").write_text(json.dumps(record))
        (runs[-1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs


def _four() -> list[Records]:
    return [_records(depth, 1000 * depth**3) for depth in (1, 2, 3, 5)]


def _law(report: ScalingReport, y: Measure, x: Size) -> PowerLaw:
    (found,) = [fit.law for fit in report.fits if (fit.y, fit.x) == (y, x)]
    return found


def test_known_laws_are_found_again(tmp_path):
    """Loss and error follow the parameters here, those of the last scale the compute."""
    records = [
        _records(depth, 997 * depth**3 + 11, iterations=50 * depth**2, batch=4 + depth) for depth in (6, 1, 4, 2, 3)
    ]
    for record, lines in records:
        N, batch, iterations = record["parameters"], record["batch"], record["iterations"]
        depth = record["model"]["depth"]
        config = dataclasses.replace(SMALL, depth=depth, embed_dim=64 * depth, ffn_dim=256 * depth)
        C = 3 * forward_flops(config) * iterations * batch
        lines[-1] |= {
            "validation_loss": (1e-9 * N) ** -0.2,
            "validation_accuracy": 1 - (490 * N) ** -0.016,
            "validation_loss_last": (2e-20 * C) ** -0.13,
            "validation_accuracy_last": 1 - (1e-4 * C) ** -0.007,
        }
    report = fit_runs(_write(tmp_path, records))
    for y, x, alpha, beta in (
        (Measure.LOSS, Size.PARAMETERS, -0.2, 1e-9),
        (Measure.ERROR, Size.PARAMETERS, -0.016, 490.0),
        (Measure.LOSS_LAST, Size.COMPUTE, -0.13, 2e-20),
        (Measure.ERROR_LAST, Size.COMPUTE, -0.007, 1e-4),
    ):
        law = _law(report, y, x)
        assert law.alpha == pytest.approx(alpha, rel=1e-9)
        assert math.exp(law.log_beta) == pytest.approx(beta, rel=1e-8)
        assert law.correlation == pytest.approx(-1.0, abs=1e-12)
        assert law.alpha_interval == pytest.approx((alpha, alpha), rel=1e-9)
        assert law.log_beta_interval == pytest.approx((math.log(beta), math.log(beta)), abs=1e-7)
    assert [run.depth for run in report.runs] == [1, 2, 3, 4, 6]
    assert [run.name for run in report.runs] == ["run1", "run3", "run4", "run2", "run0"]
    other = _law(report, Measure.LOSS, Size.COMPUTE)  # follows the parameters, so not quite the compute
    assert 1e-4 < other.alpha_interval[1] - other.alpha_interval[0] < 0.1


def test_everything_is_as_the_library_for_statistics_says():
    rng = np.random.default_rng(3)
    x = np.exp(rng.uniform(5, 12, size=7))
    y = np.exp(1.3 - 0.11 * np.log(x) + 0.2 * rng.normal(size=7))
    law, theirs = fit_power_law(x.tolist(), y.tolist()), stats.linregress(np.log(x), np.log(y))
    t = stats.t.ppf(0.975, df=5)
    assert law.alpha == pytest.approx(theirs.slope)
    assert law.alpha * law.log_beta == pytest.approx(theirs.intercept)
    assert law.correlation == pytest.approx(theirs.rvalue)
    assert law.correlation == pytest.approx(stats.pearsonr(np.log(x), np.log(y)).statistic)
    assert law.alpha_interval == pytest.approx((theirs.slope - t * theirs.stderr, theirs.slope + t * theirs.stderr))
    low, high = law.band(np.array([1.0]))  # log x = 0: the intercept's interval
    half = t * theirs.intercept_stderr
    assert np.log([low[0], high[0]]) == pytest.approx([theirs.intercept - half, theirs.intercept + half])


def test_three_points_by_hand():
    """log₂ x = 1, 2, 3 and log₂ y = 3, 0, 0, so the line goes through 2.5, 1, −0.5."""
    law = fit_power_law([2.0, 4.0, 8.0], [8.0, 1.0, 1.0])
    # Residuals 0.5, −1, 0.5 in units of log 2; their squares sum to 1.5, with one degree of freedom; t = 12.7062.
    half = 12.706204736 * math.sqrt(1.5 / 2)
    assert law.alpha == pytest.approx(-1.5)
    assert law.alpha_interval == pytest.approx((-1.5 - half, -1.5 + half))
    assert law.log_beta == pytest.approx((-1 / 1.5 - 2) * math.log(2))
    assert law.log_beta_interval is None  # the slope may be 0
    assert law.correlation == pytest.approx(-math.sqrt(0.75))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Six points: with a normal distribution's 1.96 instead of Student's quantile it would be 88 % of the times."""
    rng, repetitions, alpha, log_beta = np.random.default_rng(11), 3000, -0.15, -20.0
    log_x = np.linspace(11.0, 19.0, 6)
    at, within = math.exp(17.0), np.zeros(3)
    for _ in range(repetitions):
        log_y = alpha * (log_x + log_beta) + 0.1 * rng.normal(size=6)
        law = fit_power_law(np.exp(log_x).tolist(), np.exp(log_y).tolist())
        assert law.log_beta_interval is not None
        (low,), (high,) = law.band(np.array([at]))
        within += [
            law.alpha_interval[0] <= alpha <= law.alpha_interval[1],
            law.log_beta_interval[0] <= log_beta <= law.log_beta_interval[1],
            low <= math.exp(alpha * (17.0 + log_beta)) <= high,
        ]
    four_deviations = 4 * math.sqrt(0.95 * 0.05 / repetitions)
    assert within / repetitions == pytest.approx(0.95, abs=four_deviations)


@given(
    st.lists(st.tuples(st.floats(0, 30), st.floats(-3, 3)), min_size=3, max_size=12),
    st.floats(1e-6, 1e6),
)
@settings(max_examples=60, deadline=None)
def test_a_change_of_unit_changes_beta_alone(points, unit):
    x, y = ([math.exp(value) for value in values] for values in zip(*points, strict=True))
    if len({round(math.log(value), 3) for value in x}) < 3 or len({round(value, 3) for _, value in points}) < 2:
        return  # nothing, or nothing but rounding, to fit
    law, scaled = fit_power_law(x, y), fit_power_law([value * unit for value in x], y)
    assert scaled.alpha == pytest.approx(law.alpha, rel=1e-6, abs=1e-9)
    assert scaled.alpha_interval == pytest.approx(law.alpha_interval, rel=1e-6, abs=1e-9)
    assert scaled.correlation == pytest.approx(law.correlation, abs=1e-6)
    assert -1 <= law.correlation <= 1
    if abs(law.alpha) < 1e-3 or abs(law.log_beta) > 600:
        return
    assert scaled.log_beta + math.log(unit) == pytest.approx(law.log_beta, rel=1e-5, abs=1e-5)
    assert law.at(np.exp([-law.log_beta])) == pytest.approx(1.0, rel=1e-5)
    if law.log_beta_interval is not None and max(map(abs, law.log_beta_interval)) < 600:
        assert law.log_beta_interval[0] <= law.log_beta <= law.log_beta_interval[1]
        for end in law.log_beta_interval:  # an edge of the band meets 1 there
            low, high = law.band(np.exp([-end]))
            assert min(abs(np.log(low[0])), abs(np.log(high[0]))) == pytest.approx(0, abs=1e-5)


def test_few_runs_of_which_some_are_of_one_size(tmp_path):
    records = [_records(depth, 1000 * depth) for depth in (1, 1, 2, 3)]
    records[1][1][-1]["validation_loss"] = 3.85
    report = fit_runs(_write(tmp_path, records))
    assert [run.parameters for run in report.runs] == [1000, 1000, 2000, 3000]
    assert {fit.law.points for fit in report.fits} == {4}


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [_write(tmp_path / name, [records])[0] for name, records in zip("abcd", _four(), strict=True)]
    assert [run.name for run in fit_runs(runs).runs] == [str(run) for run in runs]


# ---- operations


def test_forward_operations_by_hand():
    """L = 21 tokens, 20 of them embedded; pairs that see each other: 1·1 + 4·5 + 16·21."""
    products = {
        "word embedding": 20 * 5 * 128,
        "AdaLN of two blocks and the head": (2 * 6 + 2) * 128 * 128,
        "qkv": 2 * 21 * 128 * 384,
        "scores and values": 2 * 2 * (1 + 20 + 336) * 128,
        "projection": 2 * 21 * 128 * 128,
        "FFN": 2 * 2 * 21 * 128 * 320,
        "head": 21 * 128 * 61,
    }
    assert forward_flops(SMALL) == 2 * sum(products.values()) == 13_564_160
    shared = forward_flops(dataclasses.replace(SMALL, shared_aln=True))
    assert forward_flops(SMALL) - shared == 2 * 6 * 128 * 128
    assert forward_flops(SMALL, 1) == 2 * (14 * 128**2 + 2 * (4 * 128**2 + 2 * 128 + 2 * 128 * 320) + 128 * 61)


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("scales", [2, 3])
def test_products_are_counted_as_they_run(shared_aln, scales):
    """On a CPU attention computes all pairs, also those that the mask hides; the rest is as counted."""
    config, rows = dataclasses.replace(SMALL, shared_aln=shared_aln), 3
    end = config.span(scales - 1)[1]
    var = VAR(config).train()
    labels_B, features_BlC = torch.zeros(rows, dtype=torch.long), torch.randn(rows, end - 1, config.z_channels)
    with sdpa_kernel(SDPBackend.MATH):  # the counter knows no other on a CPU
        with FlopCounterMode(display=False) as forward:
            logits_BlV = var(labels_B, features_BlC)
        with FlopCounterMode(display=False) as backward:
            logits_BlV.sum().backward()
    tokens = config.tokens_per_scale[:scales]
    hidden = end * end - sum(n * config.span(k)[1] for k, n in enumerate(tokens))
    hidden_flops = 4 * config.embed_dim * hidden * config.depth
    counted = rows * (forward_flops(config, scales) + hidden_flops)
    assert forward.get_total_flops() == counted
    without_gradient = 2 * rows * (end - 1) * config.z_channels * config.embed_dim  # by the word embedding's input
    assert backward.get_total_flops() == 2 * counted - without_gradient


@pytest.mark.parametrize("name", PRESETS)
def test_the_benchmark_counts_the_same(name):
    """It generates, so it leaves out the word embedding."""
    config, _ = preset_configs(name)
    counted = floor(config, None, batch=1, rows=1)
    embedded = config.num_tokens - config.tokens_per_scale[0]
    assert forward_flops(config) == counted.flops + 2 * embedded * config.z_channels * config.embed_dim


def test_training_is_three_times_forward():
    schedule = Schedule(iterations=70, learning_rate=1e-4)
    assert training_flops(SMALL, schedule, batch=12) == 70 * 12 * 3 * forward_flops(SMALL)


@given(
    iterations=st.integers(1, 200),
    first=st.integers(1, 5),
    until=st.floats(0.01, 1.0),
    warmup=st.floats(0.0, 0.9),
)
@settings(max_examples=50, deadline=None)
def test_progressive_training_counts_the_scales_of_every_iteration(iterations, first, until, warmup):
    schedule = Schedule(iterations=iterations, learning_rate=1e-4, warmup=warmup)
    progressive = Progressive(first=first, until=until, ramp=0.1)
    counted = training_flops(SMALL, schedule, batch=5, progressive=progressive)
    one_by_one = 0
    for iteration in range(iterations):
        scales, _ = progressive.at(iteration, scales=3, schedule=schedule)
        one_by_one += 3 * 5 * forward_flops(SMALL, min(scales, 3))
    assert counted == one_by_one


def test_compute_is_that_of_the_run_as_it_was(tmp_path):
    records = _four()
    records[2][0]["configuration"]["progressive"] = {"first": 1, "until": 1.0, "ramp": 0.0}
    plain, progressive = fit_runs(_write(tmp_path / "a", _four())), fit_runs(_write(tmp_path / "b", records))
    for i, (before, after) in enumerate(zip(plain.runs, progressive.runs, strict=True)):
        assert (after.compute < before.compute) == (i == 2)
        assert after.compute >= before.compute * 0.3
    config = VARConfig(**{**records[0][0]["model"], "patch_nums": (1, 2, 4)})
    assert plain.runs[0].compute == 100 * 8 * 3 * forward_flops(config)


# ---- errors


def _set(place: str, value: object) -> Callable[[dict[str, Any], list[dict[str, Any]]], None]:
    """Damages the run: a dotted place in run.json, or `last` for the final validation."""

    def damage(record: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        *sections, key = place.split(".")
        target: Any = record
        for section in sections:
            target = lines[-1] if section == "last" else target[section]
        target[key] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set("kind", "vqvae"), "{run}/run.json: kind: got 'vqvae', expected 'var'; leave the run out"),
        (_set("format", 2), "{run}/run.json: format: got 2, expected 1; update var_deploy"),
        (
            _set("parameters", "many"),
            "{run}/run.json: parameters: got 'many', expected a positive integer; restore it or leave the run out",
        ),
        (_set("iterations", 0), "{run}/run.json: iterations: got 0, expected a positive integer; "),
        (_set("batch", True), "{run}/run.json: batch: got True, expected a positive integer; "),
        (_set("images", 10**400), "{run}/run.json: images: got 1000000"),
        (_set("model", [1]), "{run}/run.json: model: got [1], expected an object; "),
        (_set("model.depth", -1), "{run}/run.json: model: depth: got -1, expected a positive integer; "),
        (_set("model.ffn_dim", 10**400), "{run}/run.json: model: int"),
        (_set("model.width", 1), "{run}/run.json: model: VARConfig: unknown keys ['width'], known are "),
        (
            _set("configuration.data.batch", 0),
            "{run}/run.json: configuration.data.batch: Input should be greater than or equal to 1; restore it or",
        ),
        (_set("configuration.data", None), "{run}/run.json: configuration.data: Input should be "),
        (
            lambda _, lines: lines.pop(),
            "{run}: last validation: got 10, expected iteration 100, the end of the run; let it finish or leave it out",
        ),
        (
            lambda _, lines: lines.clear(),
            "{run}/metrics.jsonl: got no validation, expected one at the end; train with validation images",
        ),
        (
            _set("last.validation_loss", None),
            "{run}: last validation: loss: got None, expected a positive number; leave the run out",
        ),
        (_set("last.validation_loss_last", math.nan), "{run}: last validation: loss: got nan, expected a positive"),
        (_set("last.validation_loss", 0), "{run}: last validation: loss: got 0, expected a positive number; "),
        (
            _set("last.validation_accuracy", 1.0),
            "{run}: last validation: accuracy: got 1.0, expected from 0 to below 1, as an error of 0 has no logarithm; "
            "leave the run out",
        ),
        (_set("last.validation_accuracy_last", -0.1), "{run}: last validation: accuracy: got -0.1, expected from 0"),
        (_set("last.validation_accuracy", math.nan), "{run}: last validation: accuracy: got nan, expected from 0"),
        (
            lambda _, lines: lines[-1].pop("validation_accuracy_last"),
            "{run}: last validation: accuracy: got 'nothing', expected from 0",
        ),
        (
            _set("model.patch_nums", [1, 2, 3]),
            "{run}: got patch_nums (1, 2, 3), expected (1, 2, 4) as in {first}, because losses on other tokens cannot "
            "be compared; leave one of them out",
        ),
        (_set("model.vocab_size", 62), "{run}: got vocab_size 62, expected 61 as in {first}, because "),
        (
            _set("configuration.data.validation", "other"),
            "{run}: got validation images 'other', expected 'held out' as in {first}, because ",
        ),
        (
            _set("configuration.data.validation", None),
            "{run}: got validation images 'images (its own split)', expected 'held out' as in {first}, because ",
        ),
        (
            _set("configuration.model.vqvae", "b.pth"),
            "{run}: got vqvae 'b.pth', expected 'vae.safetensors' as in {first}, because ",
        ),
    ],
)
def test_a_run_that_cannot_count_is_named_on_one_line(tmp_path, damage, message):
    records = _four()
    damage(*records[2])
    runs = _write(tmp_path, records)
    with pytest.raises(DataError) as refusal:
        fit_runs(runs)
    assert str(refusal.value).startswith(message.format(run=runs[2], first=runs[0]))
    assert "; " in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", None, "cannot be read (No such file or directory); name the directory of a finished run"),
        ("run.json", b"{", "cannot be read as JSON (Expecting property name"),
        ("run.json", b"\xff", "cannot be read as JSON ('utf-8' codec"),
        ("run.json", b"[" * 100_000, "cannot be read as JSON (maximum recursion depth"),
        ("run.json", b"[1, 2]", "got [1, 2], expected an object; restore it or leave the run out"),
        ("metrics.jsonl", None, "got no validation, expected one at the end; train with validation images"),
        ("metrics.jsonl", b"{}\n{\n", "cannot be read (Expecting property name"),
        ("metrics.jsonl", b"3\n[]\n", "got no validation, expected one at the end; train with validation images"),
    ],
)
def test_a_damaged_file_is_named_on_one_line(tmp_path, file, content, message):
    runs = _write(tmp_path, _four())
    (runs[1] / file).unlink()
    if content is not None:
        (runs[1] / file).write_bytes(content)
    with pytest.raises(DataError) as refusal:
        fit_runs(runs)
    assert str(refusal.value).startswith(f"{runs[1] / file}: {message}")
    assert "\n" not in str(refusal.value)


def _alike(key: str, value: float) -> list[Records]:
    records = _four()
    for _, lines in records:
        lines[-1][key] = value
    return records


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (_four()[:2], "got 2 runs, expected at least 3 of different sizes; train or name more"),
        (
            [_records(depth, 1000 + depth // 2) for depth in (1, 2, 3)],
            "loss over N (parameters): got 2 distinct sizes, expected at least 3; add runs of other sizes",
        ),
        (
            [_records(depth, 1000 + number) for number, depth in enumerate((1, 2, 2))],
            "loss over C (FLOP): got 2 distinct sizes, expected at least 3; add runs of other sizes",
        ),
        (
            _alike("validation_loss_last", 3.3),
            "loss, last scale over N (parameters): got values around 3.3 that neither rise nor fall, expected a trend; "
            "add other runs",
        ),
        (_alike("validation_accuracy", 0.0), "token error over N (parameters): got values around 1 that neither"),
    ],
)
def test_runs_that_leave_no_law_are_one_line(tmp_path, records, message):
    with pytest.raises(DataError) as refusal:
        fit_runs(_write(tmp_path, records))
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_a_run_counts_once(tmp_path):
    runs = _write(tmp_path, _four())
    again = runs[1] / ".." / runs[1].name
    with pytest.raises(DataError, match="got this run twice, which would count as two; name it once"):
        fit_runs([*runs, again])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
PLACES = (
    *("format", "kind", "configuration", "model", "images", "iterations", "batch", "parameters"),
    *("model.patch_nums", "model.vocab_size", "model.depth", "model.embed_dim", "model.shared_aln"),
    *("configuration.data", "configuration.model.vqvae", "configuration.progressive", "configuration.optimiser"),
    *("configuration.optimiser.epochs", "configuration.data.batch", "configuration.optimiser.betas"),
    *("last.iteration", "last.validation_loss", "last.validation_accuracy"),
)


@given(place=st.sampled_from(PLACES), value=JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_file_is_a_report_or_one_line(tmp_path, place, value):
    records = _four()
    _set(place, value)(*records[0])
    said = ""
    try:
        print_report(fit_runs(_write(tmp_path, records)), Console(file=io.StringIO()))
    except DataError as error:
        said = str(error)
    assert "\n" not in said


# ---- reports


ODD = "[bold]$\\frac{a$"  # markup to tables, a formula to plots


@pytest.fixture
def report(tmp_path) -> ScalingReport:
    records = _four()
    rng = np.random.default_rng(0)
    for _, lines in records:
        lines[-1]["validation_loss"] *= float(np.exp(0.003 * rng.normal()))
    return fit_runs(_write(tmp_path, records))


@pytest.fixture
def odd_report(report) -> ScalingReport:
    return dataclasses.replace(report, runs=(dataclasses.replace(report.runs[0], name=ODD), *report.runs[1:]))


def test_the_record_is_json_and_says_what_the_report_does(report):
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [row["name"] for row in record["runs"]] == ["run0", "run1", "run2", "run3"]
    assert record["runs"][1] == {
        "name": "run1",
        "depth": 2,
        "width": 128,
        "parameters": 8000,
        "compute": report.runs[1].compute,
        "loss": report.runs[1].loss,
        "loss_last": 4.3,
        "error": pytest.approx(0.88),
        "error_last": pytest.approx(0.93),
    }
    assert [(row["y"], row["x"]) for row in record["fits"]] == [(y, x) for x in Size for y in Measure]
    for row, fit in zip(record["fits"], report.fits, strict=True):
        low, high = row["alpha_interval"]
        assert low < row["alpha"] == fit.law.alpha < high
        assert row["beta"] == pytest.approx(math.exp(row["log_beta"]))
        low, high = row["log_beta_interval"]
        assert low < row["log_beta"] < high


@pytest.mark.parametrize("width", [60, 80, 160])
def test_tables_show_every_number_in_any_width(report, width):
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text.replace(" … ", " ").replace(" …", " ")
    if width == 160:
        lines = text.splitlines()
        (row,) = [line for line in lines if "run3" in line]
        assert [cell.strip() for cell in row.strip("│").split("│")][:3] == ["run3", "5 × 320", "125,000"]
        assert "85.00%" in row
        law = _law(report, Measure.ERROR_LAST, Size.COMPUTE)
        (row,) = [line for line in lines if "token error, last scale" in line and "│ C " in line]
        half = law.alpha_interval[1] - law.alpha
        assert f"{law.alpha:.4f} ± {half:.4f}" in row
        assert f"{math.exp(law.log_beta):.3g}" in row
        assert f"{law.correlation:.4f}" in row


def test_names_are_no_markup(odd_report):
    out = io.StringIO()
    print_report(odd_report, Console(file=out, width=200))
    assert ODD in out.getvalue()


def test_a_beta_that_no_float_holds_is_shown_as_a_power(report):
    law = fit_power_law([1e3, 1e4, 1e6], [0.9, 0.9, 0.89999])
    assert law.log_beta > 710
    assert law.to_dict()["beta"] is None
    out = io.StringIO()
    shown = ScalingReport(runs=report.runs, fits=(Fit(y=Measure.ERROR, x=Size.COMPUTE, law=law),))
    print_report(shown, Console(file=out, width=160))
    assert f"10^{law.log_beta / math.log(10):.0f}" in out.getvalue()
    assert json.loads(json.dumps(shown.to_dict(), allow_nan=False))["fits"][0]["log_beta"] == law.log_beta


def test_a_plot_is_a_picture(tmp_path, odd_report):
    loaded = "matplotlib.pyplot" in sys.modules
    path = tmp_path / "new" / "plot.PNG"
    plot_report(odd_report, path)
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (1600, 800))
        values = np.asarray(picture.convert("RGB"), dtype=float)
    panels = values.reshape(2, 400, 4, 400, 3).transpose(0, 2, 1, 3, 4).reshape(8, 400, 400, 3)
    orange = (np.abs(panels - [255, 127, 14]).max(axis=-1) < 10).sum(axis=(1, 2))
    assert (orange > 100).all()  # every panel has its runs
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_three_scattered_runs_can_be_plotted(tmp_path):
    law = fit_power_law([1e3, 1e4, 1e6], [3.0, 1.0, 2.9])
    records = _four()[:3]
    for (_, lines), loss in zip(records, (3.0, 1.0, 2.9), strict=True):
        lines[-1]["validation_loss"] = loss
    report = fit_runs(_write(tmp_path, records))
    assert _law(report, Measure.LOSS, Size.PARAMETERS).log_beta_interval is law.log_beta_interval is None
    plot_report(report, tmp_path / "plot.svg")
    assert b"<svg" in (tmp_path / "plot.svg").read_bytes()


def test_what_stops_a_plot_is_one_line(tmp_path, report, monkeypatch):
    with pytest.raises(RequestError, match=r"plot.jpg: unknown plot format '.jpg'; use .png, .svg, .pdf"):
        plot_report(report, tmp_path / "plot.jpg")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"plot\.png: cannot write \(.+\); choose another place"):
        plot_report(report, tmp_path / "file" / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EngineError, match=r"a plot needs matplotlib\S*; pip install 'var-deploy\[plot\]'"):
        plot_report(report, tmp_path / "plot.png")
