"""The benchmark: what a row holds, the order of the runs, the record, and wrong requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import var_deploy
from var_deploy import bench as timing
from var_deploy.bench import Spread, bench, bench_record
from var_deploy.errors import RequestError


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> var_deploy.Pipeline:
    return var_deploy.load(tiny_bundle)


def test_spread_is_median_smallest_and_largest():
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(median=2.0, minimum=1.0, maximum=5.0)
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_rows_hold_the_latency_of_both_and_their_ratio(pipe):
    rows = bench(pipe, batches=[2, 1, 2], repeats=2)
    assert [row.batch for row in rows] == [1, 2]
    for row in rows:
        assert row.seconds.minimum <= row.seconds.median <= row.seconds.maximum
        assert row.images_per_second == pytest.approx(row.batch / row.seconds.median)
        assert row.reference.minimum <= row.reference.median <= row.reference.maximum
        # A median of ratios lies between the extreme ratios.
        assert row.reference.minimum / row.seconds.maximum <= row.speedup
        assert row.speedup <= row.reference.maximum / row.seconds.minimum
        assert {"condition", "scale_00", "scale_03", "draw", "finish", "decode"} <= row.stages.keys()
        # Stages are parts of the whole; of two repeats, the median is the mean.
        assert 0.5 * row.seconds.minimum < sum(row.stages.values()) <= row.seconds.maximum
        assert 0 < row.pss_bytes <= 1.1 * row.peak_rss_bytes  # the system's counters lag by some pages


def test_without_the_reference_there_is_no_ratio(pipe):
    (row,) = bench(pipe, batches=[1], repeats=1, reference=False)
    assert row.reference is None
    assert row.speedup is None


def test_a_missing_reference_is_left_out(pipe, monkeypatch):
    monkeypatch.setattr(timing, "_reference_runner", lambda *_: None)
    (row,) = bench(pipe, batches=[1], repeats=1)
    assert row.speedup is None


def test_repeats_warm_up_and_guidance_are_those_asked_for(pipe, monkeypatch):
    calls, said = [], []
    generate = pipe.generate
    monkeypatch.setattr(
        pipe, "generate", lambda labels, **options: calls.append((len(labels), options)) or generate(labels, **options)
    )
    bench(pipe, batches=[3], repeats=2, warmup=2, guidance=0.0, reference=False, progress=said.append)
    assert calls == [(3, {"seeds": 0, "guidance": 0.0})] * 4
    assert said == ["warm-up, batch 3", "batch 3, repeat 1 of 2", "batch 3, repeat 2 of 2"]


def test_the_record_is_json_and_says_what_where_and_with_which_versions(pipe):
    record = json.loads(json.dumps(bench_record(pipe, bench(pipe, batches=[1], repeats=1, reference=False))))
    assert record["model"] == {"depth": 2, "width": 128, "image": 64}
    assert (record["engine"], record["precision"]) == ("onnx", "fp32")
    assert "loading not included" in record["timed"]
    assert {"processor", "cores", "system", "python", "numpy", "onnxruntime", "torch"} <= record["machine"].keys()
    (row,) = record["rows"]
    assert row["batch"] == 1
    assert row["seconds"].keys() == {"median", "minimum", "maximum"}


@pytest.mark.parametrize(
    "options", [{"batches": []}, {"batches": [1, 0]}, {"batches": [1], "repeats": 0}, {"batches": [1], "warmup": 0}]
)
def test_a_wrong_request_is_told_what_would_be_right(pipe, options):
    with pytest.raises(RequestError, match="expected at least one repeat, one warm-up, and batch sizes of at least 1"):
        bench(pipe, **options)
