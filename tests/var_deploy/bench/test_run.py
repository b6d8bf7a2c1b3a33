"""The benchmark: what a row holds, the order of the runs, the references, the record, the sweep, and wrong requests."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import var_deploy
from var_deploy import cli
from var_deploy.bench import Spread, bench, bench_record
from var_deploy.bench import reference as bench_reference
from var_deploy.bench import run as timing
from var_deploy.bench.floor import floor
from var_deploy.bench.reference import Reference
from var_deploy.bench.sweep import sweep
from var_deploy.bundle import SamplingDefaults
from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.errors import EngineError, RequestError
from var_deploy.precision import Precision
from var_kernels.timing import Ceilings

RATES = SimpleNamespace(bytes_per_second=1e10, flops_per_second={"float32": 1e11, "bfloat16": 4e11})


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads of a busy machine wait for each other far longer than this model takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> var_deploy.Pipeline:
    return var_deploy.load(tiny_bundle, engine="onnx", threads=1)


class FakeReference:
    """Counts its runs; `fails` names what raises and with what."""

    how = "fake"

    def __init__(self, fails: dict[str, Exception] | None = None) -> None:
        self.fails, self.calls, self.compiled = fails or {}, [], False

    def run(self, batch: int) -> None:
        self.calls.append((batch, self.compiled))
        if (error := self.fails.get("compiled" if self.compiled else "eager")) is not None:
            raise error

    def compile(self) -> None:
        self.compiled = True

    def variant(self, precision: Precision, *, channels_last: bool) -> FakeReference:
        assert (precision, channels_last) == (Precision.BF16, True)
        other = FakeReference({"eager": self.fails["half"]} if "half" in self.fails else None)
        other.how, other.calls = "half", self.calls
        return other


@pytest.fixture
def fake(monkeypatch):
    """Puts a fake in the reference's place; returns it after `fake(fails)`."""

    def install(fails: dict[str, Exception] | None = None) -> FakeReference:
        made = FakeReference(fails)
        monkeypatch.setattr(timing, "Reference", lambda *_, **__: made)
        return made

    return install


def test_spread_is_quantiles_smallest_and_largest():
    spread = Spread.of([5.0, 1.0, 2.0])
    assert (spread.median, spread.minimum, spread.maximum, spread.count) == (2.0, 1.0, 5.0, 3)
    many = Spread.of([float(i) for i in range(101)])
    assert (many.median, many.p10, many.p90, many.p99) == pytest.approx((50, 10, 90, 99))
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_rows_hold_the_latency_of_both_and_their_ratio(pipe):
    rows = bench(pipe, batches=[2, 1, 2], repeats=2)
    assert [row.batch for row in rows] == [1, 2]
    for row in rows:
        assert (row.engine, row.device, row.precision, row.guidance) == ("onnx", "cpu", "fp32", 1.5)
        for spread in (row.seconds, row.reference):
            assert spread.minimum <= spread.p10 <= spread.median <= spread.p90 <= spread.p99 <= spread.maximum
            assert spread.count == 2
        assert row.images_per_second == pytest.approx(row.batch / row.seconds.median)
        # A median of ratios lies between the extreme ratios.
        assert row.reference.minimum / row.seconds.maximum <= row.speedup
        assert row.speedup <= row.reference.maximum / row.seconds.minimum
        assert row.reference_how == "float32"
        assert {"condition", "scale_00", "scale_03", "draw", "finish", "decode"} <= row.stages.keys()
        # Stages are parts of the whole; of two repeats, the median is the mean.
        assert 0.5 * row.seconds.minimum < sum(row.stages.values()) <= row.seconds.maximum
        assert 0 < row.pss_bytes <= 1.1 * row.peak_rss_bytes  # the system's counters lag by some pages
        assert row.failed == {}
        for absent in ("device_seconds", "without_decoder", "compiled", "floor_seconds", "joules_per_image"):
            assert getattr(row, absent) is None


def test_without_the_reference_there_is_no_ratio(pipe):
    (row,) = bench(pipe, batches=[1], repeats=1, reference=False, stages=False)
    assert row.reference is None
    assert row.speedup is None
    assert row.stages == {}


def test_a_missing_reference_is_left_out_unless_it_was_asked_for_by_name(pipe, monkeypatch):
    monkeypatch.setattr(timing, "find_spec", lambda _: None)
    (row,) = bench(pipe, batches=[1], repeats=1)
    assert row.speedup is None
    monkeypatch.setitem(sys.modules, "var_train", None)
    with pytest.raises(EngineError, match=r"^the reference needs var_train; pip install 'var-deploy\[train\]'$"):
        bench(pipe, batches=[1], repeats=1, compiled=True)


def test_repeats_warm_up_and_guidance_are_those_asked_for(pipe, monkeypatch):
    calls, said = [], []
    generate = pipe.generate
    monkeypatch.setattr(
        pipe, "generate", lambda labels, **options: calls.append((len(labels), options)) or generate(labels, **options)
    )
    bench(pipe, batches=[3], repeats=2, warmup=2, guidance=0.0, reference=False, progress=said.append)
    assert calls == [(3, {"seeds": 0, "guidance": 0.0})] * 4
    assert said == ["warm-up, batch 3", "batch 3, repeat 1 of 2", "batch 3, repeat 2 of 2"]


def test_pictures_are_part_of_what_is_timed(pipe, monkeypatch):
    read = []

    class Done:
        timings = {"all": 1.0}  # noqa: RUF012
        parts = 1

        @property
        def images(self) -> list[None]:
            read.append(1)
            return [None]

    monkeypatch.setattr(pipe, "generate", lambda *_, **__: Done())
    bench(pipe, batches=[1], repeats=3, reference=False)
    assert len(read) == 4


def test_a_time_limit_leaves_at_least_three_repeats(pipe, fake):
    theirs = fake()
    (row,) = bench(pipe, batches=[1], repeats=50, limit_seconds=0.0)
    assert (row.seconds.count, row.reference.count) == (3, 3)
    assert len(theirs.calls) == 1 + 3


def test_rows_are_heard_one_by_one_and_again_with_the_compiled_reference(pipe, fake):
    theirs, heard = fake(), []
    rows = bench(
        pipe,
        batches=[1, 2],
        repeats=1,
        compiled=True,
        on_rows=lambda rows: heard.append([(row.batch, row.compiled is not None) for row in rows]),
    )
    assert heard == [
        [(1, False)],
        [(1, False), (2, False)],
        [(1, True), (2, False)],
        [(1, True), (2, True)],
    ]
    # Warm-up and one repeat of each: eager for all batch sizes first.
    assert theirs.calls == [(1, False)] * 2 + [(2, False)] * 2 + [(1, True)] * 2 + [(2, True)] * 2
    assert all(row.compiled.count == 1 and row.compiled_speedup > 0 for row in rows)


def test_the_compiled_reference_alone(pipe, fake):
    theirs = fake()
    (row,) = bench(pipe, batches=[1], repeats=1, reference=False, compiled=True)
    assert row.reference is None
    assert row.compiled_speedup > 0
    assert theirs.calls == [(1, True)] * 2


def test_a_failure_to_compile_is_part_of_the_row(pipe, fake):
    fake({"compiled": RuntimeError("no C++ compiler\nand a long trace")})
    (row,) = bench(pipe, batches=[1], repeats=1, compiled=True)
    assert row.compiled is None
    assert row.speedup > 0
    assert row.failed == {"compiled": "RuntimeError: no C++ compiler"}


def test_a_reference_too_large_for_the_memory_is_part_of_the_row_and_other_errors_are_not(pipe, fake):
    fake({"eager": torch.OutOfMemoryError("tried to allocate much")})
    (row,) = bench(pipe, batches=[1], repeats=1)
    assert (row.reference, row.speedup) == (None, None)
    assert row.failed == {"reference": "OutOfMemoryError: tried to allocate much"}
    fake({"eager": ValueError("ours to mend")})
    with pytest.raises(ValueError, match="ours to mend"):
        bench(pipe, batches=[1], repeats=1)


# ---- approximate precisions on a CPU ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def approximate(tiny_bundle: Path) -> var_deploy.Pipeline:
    return var_deploy.load(tiny_bundle, engine="torch", device="cpu", precision="int8")


def test_beside_what_is_not_exact_the_reference_runs_in_float32_and_in_bf16(approximate):
    (row,) = bench(approximate, batches=[1], repeats=2)
    assert (row.precision, row.reference_how) == ("int8", "float32")
    assert row.half_reference_how == "autocast to bf16, channels-last decoder"
    assert (row.reference.count, row.half_reference.count) == (2, 2)
    assert row.half_reference.minimum / row.seconds.maximum <= row.half_speedup
    assert row.half_speedup <= row.half_reference.maximum / row.seconds.minimum


@pytest.mark.parametrize(
    ("exact", "options", "calls", "known"),
    [
        (True, {}, 2, ["reference"]),
        (True, {"half_reference": True}, 4, ["reference", "half_reference"]),
        (False, {}, 4, ["reference", "half_reference"]),
        (False, {"half_reference": False}, 2, ["reference"]),
        (False, {"reference": False}, 0, []),
        (False, {"reference": False, "half_reference": True}, 2, ["half_reference"]),
    ],
)
def test_the_half_reference_runs_where_it_tells_something_or_is_asked_for(
    pipe, approximate, fake, exact, options, calls, known
):
    theirs = fake()
    (row,) = bench(pipe if exact else approximate, batches=[1], repeats=1, **options)
    assert len(theirs.calls) == calls  # a warm-up and a repeat of each
    assert [name for name in ("reference", "half_reference") if getattr(row, name)] == known
    assert (row.half_speedup is not None) == ("half_reference" in known)


def test_the_command_has_a_switch_for_it(tiny_bundle):
    arguments = ["bench", str(tiny_bundle), "--half-reference", "--repeats", "1", "--threads", "1", "--json"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["precision"], row["reference_how"]) == ("fp32", "float32")
    assert row["half_speedup"] > 0


def test_a_half_reference_too_large_for_the_memory_leaves_the_other(approximate, fake):
    fake({"half": torch.OutOfMemoryError("too much")})
    (row,) = bench(approximate, batches=[1], repeats=1)
    assert row.failed == {"half_reference": "OutOfMemoryError: too much"}
    assert row.speedup > 0
    assert row.half_speedup is None


def test_on_a_gpu_a_half_reference_is_refused(approximate, monkeypatch):
    monkeypatch.setattr(approximate.engine, "device", "cuda:0")
    with pytest.raises(RequestError, match=r"^half_reference: for a CPU, on a GPU the reference runs in our precision"):
        bench(approximate, batches=[1], half_reference=True)


# ---- floor -----------------------------------------------------------------------------------------------------------


def test_floor_and_shares_are_counted_with_the_rates_given(pipe):
    manifest = pipe.bundle.manifest
    (row,) = bench(pipe, batches=[2], repeats=1, reference=False, ceilings=RATES)
    counted = floor(manifest.var, manifest.vqvae, batch=2, rows=4, precision=Precision.FP32)
    assert row.flops == counted.flops
    assert row.floor_seconds == pytest.approx(counted.seconds(1e10, 1e11))
    assert row.share_of_floor == pytest.approx(row.floor_seconds / row.seconds.median)
    assert row.flops_share == pytest.approx(row.flops / row.seconds.median / 1e11)


def test_rows_that_guidance_does_not_need_are_not_counted(pipe):
    with_guidance, without = (
        bench(pipe, batches=[1], repeats=1, guidance=g, reference=False, ceilings=RATES)[0] for g in (1.5, 0.0)
    )
    assert with_guidance.flops > without.flops
    assert (with_guidance.guidance, without.guidance) == (1.5, 0.0)


def test_a_missing_rate_is_an_error(pipe):
    rates = SimpleNamespace(bytes_per_second=1.0, flops_per_second={"float32": None})
    with pytest.raises(EngineError, match=r"^no ceiling of fp32 products was measured; leave the floor out$"):
        bench(pipe, batches=[1], repeats=1, reference=False, ceilings=rates)


# ---- the reference itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "how", "seen"),
    [
        (Precision.FP32, "float32", None),
        (Precision.BF16, "autocast to bf16", torch.bfloat16),
        (Precision.FP16, "autocast to fp16", torch.float16),
        (Precision.INT8, "autocast to bf16", torch.bfloat16),
        (Precision.FP8, "autocast to bf16", torch.bfloat16),
    ],
)
def test_the_reference_runs_in_the_same_precision_and_ends_in_pictures_on_the_host(
    pipe, monkeypatch, precision, how, seen
):
    import var_train

    heard = []

    def stub(var, vqvae, labels_B, **options):
        heard.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        assert options == {"guidance": 0.5, "top_k": 900, "top_p": 0.96}
        assert labels_B.tolist() == [*range(10), 0, 1]  # ten classes
        return SimpleNamespace(image_B3RR=torch.full((12, 3, 4, 4), 0.5, dtype=seen))

    monkeypatch.setattr(var_train, "generate", stub)
    reference = Reference(pipe.bundle.manifest, "cpu", precision, guidance=0.5)
    assert reference.how == how
    pictures = reference.run(12)
    assert (pictures.shape, pictures.dtype) == ((12, 4, 4, 3), np.uint8)
    assert np.unique(pictures).tolist() == [128]
    assert heard == [seen]


def test_the_reference_takes_the_bundle_s_guidance(pipe):
    assert Reference(pipe.bundle.manifest, "cpu", Precision.FP32)._guidance == 1.5


def test_a_variant_shares_the_weights_and_computes_the_same(pipe):
    reference = Reference(pipe.bundle.manifest, "cpu", Precision.FP32)
    other = reference.variant(Precision.FP32, channels_last=True)
    assert other.how == "float32, channels-last decoder"
    assert other._var is not reference._var
    for name in ("_var", "_vqvae"):
        theirs, ours = (dict(getattr(model, name).named_parameters()) for model in (other, reference))
        copied = {key for key in ours if theirs[key].data_ptr() != ours[key].data_ptr()}
        assert {key.split(".")[0] for key in copied} == ({"decoder", "post_quant_conv"} if name == "_vqvae" else set())
    weights = (other._vqvae.decoder.conv_in.weight, reference._vqvae.decoder.conv_in.weight)
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [True, False]
    pictures = []
    for model in (reference, other):
        torch.manual_seed(1)
        pictures.append(model.run(2).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # float32 sums in another order


def test_the_reference_s_stages_are_all_that_was_timed(pipe):
    reference = Reference(pipe.bundle.manifest, "cpu", Precision.FP32)
    begin = time.perf_counter()
    reference.run(3)
    seconds = time.perf_counter() - begin
    assert list(reference.stages) == ["transformer", "draw", "decode", "rest"]
    assert 0.5 * seconds < sum(reference.stages.values()) <= seconds
    assert not reference._var.head._forward_hooks


def test_compiling_keeps_every_block_and_serves_all_of_them_with_the_same_code(monkeypatch):
    from torch._dynamo.utils import counters

    both = {"patch_nums": (1, 2, 3, 4), "vocab_size": 61}
    manifest = SimpleNamespace(
        var=VARConfig(**both, num_classes=5, depth=3, embed_dim=64, ffn_dim=256),
        vqvae=VQVAEConfig(**both, ch=32, ch_mult=(1,), num_res_blocks=1),
        sampling=SamplingDefaults(),
    )
    monkeypatch.setattr(bench_reference, "BACKEND", "eager")
    torch.compiler.reset()
    counters.clear()
    try:
        reference = Reference(manifest, "cpu", Precision.FP32)
        torch.manual_seed(1)
        eager = reference.run(1)
        reference.compile()
        torch.manual_seed(1)
        compiled = reference.run(1)
        # Blocks without a past, with one of a single position, and with any; and the decoder.
        assert counters["stats"]["unique_graphs"] == 4
    finally:
        torch.compiler.reset()
    assert np.abs(eager.astype(int) - compiled).max() <= 1


# ---- record and sweep ------------------------------------------------------------------------------------------------


def test_the_record_is_json_and_says_what_where_and_with_which_versions(pipe):
    rows = bench(pipe, batches=[1], repeats=1, reference=False)
    record = json.loads(json.dumps(bench_record(pipe, rows)))
    assert record["model"] == {"depth": 2, "width": 128, "image": 64}
    assert (record["engine"], record["precision"]) == ("onnx", "fp32")
    for words in ("loading, warm-up and graph capture not included", "8-bit pictures on the host out", "CUDA events"):
        assert words in record["timed"]
    expected = {"processor", "cores", "system", "python", "var-deploy", "numpy", "onnxruntime", "torch"}
    assert expected <= record["machine"].keys()
    assert (record["gpu"], record["ceilings"]) == (None, None)
    (row,) = record["rows"]
    assert row["batch"] == 1
    assert row["seconds"].keys() == {"median", "minimum", "maximum", "p10", "p90", "p99", "count"}


def test_a_sweep_adds_up_precisions_and_is_heard_after_every_row(tiny_bundle):
    loaded, heard = [], []

    def load(precision: str) -> var_deploy.Pipeline:
        loaded.append(precision)
        return var_deploy.load(tiny_bundle, engine="torch", device="cpu", precision=precision)

    record = sweep(
        load,
        ["fp32", "fp16", "fp32"],
        batches=[1, 2],
        repeats=1,
        reference=False,
        on_record=lambda record: heard.append([(row["precision"], row["batch"]) for row in record["rows"]]),
    )
    rows = [("fp32", 1), ("fp32", 2), ("fp16", 1), ("fp16", 2)]
    assert heard == [rows[:1], rows[:2], rows[:3], rows]
    assert loaded == ["fp32", "fp16"]
    assert (record["engine"], record["precision"], record["ceilings"]) == ("torch", "fp32, fp16", None)
    assert {"upload", "condition", "scale_03", "draw", "decode"} <= record["rows"][0]["stages"].keys()


def test_a_sweep_measures_the_ceilings_once_when_asked(tiny_bundle, monkeypatch):
    measured = []
    rates = Ceilings(bytes_per_second=1e10, flops_per_second={"float32": 1e11, "bfloat16": 2e11}, how="given")
    monkeypatch.setattr("var_kernels.timing.ceilings", lambda device: measured.append(device) or rates)

    def load(precision: str) -> var_deploy.Pipeline:
        return var_deploy.load(tiny_bundle, engine="torch", device="cpu", precision=precision)

    record = sweep(load, ["fp32", "int8"], batches=[1], repeats=1, reference=False, floor=True)
    assert measured == ["cpu"]
    assert record["ceilings"] == asdict(rates)
    assert all(row["share_of_floor"] > 0 for row in record["rows"])
    assert sweep(load, ["fp32"], batches=[1], repeats=1, reference=False)["ceilings"] is None
    assert measured == ["cpu"]


@pytest.mark.parametrize(
    "options", [{"batches": []}, {"batches": [1, 0]}, {"batches": [1], "repeats": 0}, {"batches": [1], "warmup": 0}]
)
def test_a_wrong_request_is_told_what_would_be_right(pipe, options):
    with pytest.raises(RequestError, match="expected at least one repeat, one warm-up, and batch sizes of at least 1"):
        bench(pipe, **options)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_shows_what_was_measured_and_nothing_else(pipe, fake, capsys, monkeypatch):
    from var_deploy import report

    monkeypatch.setenv("COLUMNS", "120")
    fake({"compiled": RuntimeError("no [compiler]")})
    (row,) = bench(pipe, batches=[1], repeats=1, compiled=True)
    report.bench(bench_record(pipe, [row]))
    said = capsys.readouterr().out
    for word in ("generate", "p99", "images/s", "ratio", "PSS MB", "compiled not timed: RuntimeError: no [compiler]"):
        assert word in said
    for word in ("floor", "on the device", "J/image", "device peak"):
        assert word not in said.split("timed:")[0]
    spread = replace(row.seconds, median=0.002)
    full = replace(
        row,
        seconds=spread,
        device_seconds=spread,
        without_decoder=spread,
        floor_seconds=0.001,
        share_of_floor=0.5,
        flops_share=0.25,
        joules_per_image=1.25,
        half_reference=spread,
        half_reference_how="autocast to fake",
        half_speedup=3.25,
        device_peak_bytes=2_000_000,
        device_reserved_bytes=3_000_000,
    )
    report.bench({**bench_record(pipe, [full, replace(full, precision="bf16")]), "gpu": {"name": "Fake"}})
    said = capsys.readouterr().out
    for word in (
        "1 fp32",
        "reference in bf16",
        "3.25×",
        "reference in bf16: autocast to fake",
        "1 bf16",
        "ms",
        "on the device",
        "without decoder",
        "50%",
        "25%",
        "1.25",
        "2.0",
        "gpu: name F",
    ):
        assert word in said
