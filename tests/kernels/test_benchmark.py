"""The benchmark at tiny sizes on a CPU, references for kernels: rows, traffic, the gate, the file, the command."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from var_deploy.config import PLAIN_SCALE
from var_kernels import benchmark, benchmark_cases, ops, result_file, sizes
from var_kernels.benchmark import run
from var_kernels.benchmark_page import page
from var_kernels.benchmark_report import BenchmarkError, print_report
from var_kernels.benchmark_setup import COMPILE, EAGER, LIBRARY, PROVIDERS, Inputs, WrongResultError, check
from var_kernels.ops import OPERATIONS, reference_ops
from var_kernels.timing import Ceilings
from var_train.presets import preset_configs

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LIMITS = Ceilings(bytes_per_second=1e10, flops_per_second={"float32": 1e11, "bfloat16": 1e11}, how="given")


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads of a busy machine wait for each other far longer than these sizes take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_cases(dtype=torch.float32):
    """Every operation and variant, at sizes that are no powers of two where the operation allows."""
    return [
        benchmark_cases.adaln(R=2, n=9, D=192, dtype=dtype),
        benchmark_cases.cached_attention(R=2, H=3, n=9, begin=5, L=20, dtype=dtype),
        benchmark_cases.cached_attention(R=2, H=1, n=1, begin=0, L=4, dtype=dtype),
        benchmark_cases.cached_attention(R=2, H=3, n=9, begin=5, L=20, dtype=dtype, variant="plain"),
        benchmark_cases.draw(B=2, n=4, V=1000, C=8),
        benchmark_cases.draw(B=2, n=4, V=1000, C=8, variant="unguided"),
        benchmark_cases.draw(B=2, n=4, V=1000, C=8, variant="smooth", begin=14, ratio=1.0),
        benchmark_cases.groupnorm_silu(B=2, side=6, C=64, dtype=dtype),
        benchmark_cases.groupnorm_silu(B=2, side=6, C=64, dtype=dtype, variant="sum"),
        benchmark_cases.linear(M=12, K=48, N=20, variant="", dtype=dtype),
        benchmark_cases.linear(M=12, K=48, N=20, variant="gelu", dtype=dtype),
        benchmark_cases.linear(M=12, K=48, N=20, variant="int8", dtype=dtype),
        benchmark_cases.linear(M=12, K=48, N=20, variant="head", dtype=dtype),
        benchmark_cases.linear(M=2, K=48, N=40, variant="modulation", dtype=dtype),
        benchmark_cases.mix_codes(B=2, n=3, V=1000, C=8),
        benchmark_cases.keep_given(B=2, n=3, V=1000, C=8),
        benchmark_cases.next_scale(B=2, p=2, q=3, h=5, C=8, D=64),
        benchmark_cases.quantize_rows(M=7, K=48, dtype=dtype),
        benchmark_cases.to_pixels(B=2, side=6, dtype=dtype),
        benchmark_cases.uniforms(B=2, L=30),
        benchmark_cases.upsample_sum(B=2, side=3, C=96, dtype=dtype),
    ]


def tiny_case(operation):
    return next(case for case in tiny_cases() if case.operation == operation)


def measure(cases, ops=None, providers=(EAGER,), out=None, **options):
    if out is not None:
        options["on_row"] = lambda report: report.write(out)
    return run(CPU, cases, ops or reference_ops(), providers, repeats=2, limits=LIMITS, **options)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_operation_has_a_row_with_the_right_results_of_all_providers(storage):
    report = measure(tiny_cases(storage), providers=(EAGER, LIBRARY))
    assert len(report.rows) == len(tiny_cases())
    assert {row.operation for row in report.rows} == set(OPERATIONS)
    for row in report.rows:
        assert list(row.providers) == ["reference", EAGER]  # the library's calls are for a GPU
        assert row.providers["reference"].error == 0
        for measured in row.providers.values():
            assert measured.timing.count == 2
            assert measured.share == pytest.approx(row.floor_seconds / measured.timing.median)


def test_what_is_compiled_is_one_graph_with_the_same_results(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no compiler
    for case in tiny_cases():
        (row,) = measure([case], providers=(COMPILE,)).rows
        assert list(row.providers) == ["reference", COMPILE]


def test_only_the_first_row_of_an_operation_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    report = measure(tiny_cases(), providers=(EAGER, COMPILE))
    compiled = [row.operation for row in report.rows if COMPILE in row.providers]
    assert compiled == list(dict.fromkeys(row.operation for row in report.rows))
    assert all(EAGER in row.providers for row in report.rows)
    lines = page(report.record(), tiny_cases()).splitlines()
    (first,) = [line for line in lines if line.startswith("| linear M=12 ")]
    (second,) = [line for line in lines if line.startswith("| linear gelu ")]
    assert [line.split("|")[11].strip() != "" for line in (first, second)] == [True, False]


@pytest.mark.parametrize("case", tiny_cases(torch.bfloat16), ids=lambda case: case.name)
def test_traffic_is_every_input_once_and_every_output_once(case):
    """Counted again from the tensors that an implementation is handed."""
    handed = []
    setup = case.build(Inputs(CPU, 0))
    setup.ours(lambda *arguments, **named: handed.append([*arguments, *named.values()]))
    tensors = [value for value in handed[0] if isinstance(value, torch.Tensor)]
    counted = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if case.operation == "adaln":  # the residual is read and written
        counted += 4 * tensors[0].numel()
    elif case.operation == "cached_attention":  # of the caches only what is written and what lies before
        *scales, cache_k, cache_v = tensors[1:-1]
        caches, beyond = (cache_k, cache_v), cache_k.shape[2] - case.shape["begin"] - case.shape["n"]
        counted -= sum(4 * q_scale_H.numel() for q_scale_H in scales)
        counted -= sum(2 * cache[:, :, 0].numel() * beyond for cache in caches)
    elif case.operation == "draw":  # of the codebook the codes drawn; flags are written only when something is wrong
        strength_B, codebook_VC, codes_BnC, invalid_B = (tensors[i] for i in (2, 6, 8, 9))
        counted += 4 * (codes_BnC.numel() - codebook_VC.numel() - invalid_B.numel())
        counted -= 4 * strength_B.numel() if case.variant == "unguided" else 0
    assert case.bytes == counted


@pytest.mark.parametrize(
    ("case", "flops"),
    [
        (benchmark_cases.linear(M=3, K=5, N=7, variant="", dtype=torch.float32), 2 * 3 * 5 * 7),
        (
            benchmark_cases.cached_attention(R=2, H=3, n=4, begin=5, L=9, dtype=torch.float32),
            2 * 2 * (2 * 3) * 4 * 9 * 64,
        ),
        (
            benchmark_cases.next_scale(B=2, p=2, q=3, h=5, C=8, D=64),
            2 * 2 * 25 * 9 * 8 * 8 + 2 * 2 * 9 * 8 * 64,
        ),
        (tiny_case("adaln"), 0),
    ],
)
def test_operations_count_products(case, flops):
    assert case.flops == flops


def test_the_floor_of_a_row_is_the_larger_of_moving_and_computing():
    case = dataclasses.replace(tiny_case("linear"), bytes=10**7, flops=10**7)
    (row,) = measure([case], providers=()).rows
    assert row.floor_seconds == pytest.approx(1e-3)
    (row,) = measure([dataclasses.replace(case, flops=10**9)], providers=()).rows
    assert row.floor_seconds == pytest.approx(1e-2)


def test_the_published_sizes_are_all_there_once_and_the_telling_ones_first():
    every = list(benchmark_cases.cases(torch.bfloat16))
    names = [case.name for case in every]
    assert len(set(names)) == len(names)
    firsts = {case.operation: case.name for case in reversed(every)}
    assert [firsts[name] for name in ("linear", "cached_attention", "draw")] == [
        "linear int8 M=512 K=4096 N=1024",
        "cached_attention R=2 H=16 n=256 begin=424",
        "draw B=1 n=256 V=4096",
    ]
    # What the library multiplies has one row each, for comparison.
    assert [name for name in names if re.match("linear (gelu|M)", name)] == [
        "linear gelu M=512 K=1024 N=4096",
        "linear M=512 K=1024 N=3072",
    ]
    assert {
        "adaln R=128 n=256 D=1920",
        "cached_attention R=2 H=30 n=256 begin=424",
        "cached_attention R=128 H=16 n=16 begin=14",
        "draw B=64 n=256 V=4096",
        "groupnorm_silu B=64 side=256 C=160",
        "groupnorm_silu sum B=64 side=256 C=160",
        "groupnorm_silu B=1 side=64 C=320",
        "groupnorm_silu B=1 side=16 C=640",
        "linear int8 M=32768 K=7680 N=1920",
        "linear head M=512 K=1024 N=4096",
        "linear head M=32768 K=1920 N=4096",
        "linear modulation M=2 K=1024 N=100352",
        "linear modulation M=2 K=1920 N=349440",
        "next_scale B=1 p=13 q=16 D=1024",
        "next_scale B=64 p=4 q=5 D=1920",
        "quantize_rows M=512 K=1024",
        "to_pixels B=64 side=256",
        "upsample_sum B=64 side=128 C=160",
        "uniforms B=64 L=680",
        "cached_attention plain R=128 H=30 n=256 begin=424",
        "draw unguided B=1 n=256 V=4096",
        "draw smooth B=64 n=256 V=4096",
        "mix_codes B=64 n=256 V=4096",
        "keep_given B=64 n=256 C=32",
    } <= set(names)
    quick = list(benchmark_cases.quick_cases(torch.bfloat16))
    assert {(case.operation, case.variant) for case in quick} == {(case.operation, case.variant) for case in every}
    assert {case.operation for case in quick} == set(OPERATIONS)
    assert [case.name for case in quick] == names[: len(quick)]


@pytest.mark.parametrize("model", sizes.WIDTH)
def test_sizes_are_those_of_the_presets(model):
    var, vqvae = preset_configs(model)
    assert (sizes.WIDTH[model], sizes.SCALES[model]) == (var.embed_dim, var.patch_nums)
    assert (var.vocab_size, vqvae.z_channels, PLAIN_SCALE) == (sizes.V, sizes.C, sizes.PLAIN_SCALE)
    assert sizes.positions(var.patch_nums) == var.num_tokens


def test_resampling_matrices_do_what_interpolate_does():
    image = torch.randn(1, 1, 5, 5)
    for side, mode in ((8, "bicubic"), (5, "bicubic"), (3, "area")):
        matrix = benchmark_cases.resampling(5, side, mode, CPU)
        expected = torch.nn.functional.interpolate(image, size=(side, side), mode=mode)
        torch.testing.assert_close(matrix @ image[0, 0] @ matrix.T, expected[0, 0], atol=1e-5, rtol=1e-5)


def wrong(operation, spoil):
    """References but for one operation, whose results are spoiled."""
    right = getattr(reference_ops(), operation)

    def spoiled(*arguments, **named):
        result = right(*arguments, **named)
        spoil(arguments, named)
        return result

    return dataclasses.replace(reference_ops(), **{operation: spoiled})


@pytest.mark.parametrize(
    ("operation", "spoil", "message"),
    [
        ("adaln", lambda a, n: n["out_MD"].mul_(1.1), "result 1: relative error 1.0e-01 in norm"),
        ("adaln", lambda a, n: n["out_MD"][3, 5:7].add_(0.5), "result 1: .* at the worst element"),
        ("adaln", lambda a, n: n["out_MD"][3, 5].fill_(math.nan), "result 1: relative error nan in norm"),
        ("adaln", lambda a, n: a[0].zero_(), "result 0: relative error 1.0e\\+00 in norm"),
        ("linear", lambda a, n: n["out_MN"].copy_(torch.zeros(12, 20)), "result 0: relative error 1.0e\\+00"),
        ("cached_attention", lambda a, n: a[2][:, :, 6].zero_(), "result 1: relative error"),
        ("cached_attention", lambda a, n: a[3][:, :, 2].zero_(), "result 4: relative error"),
        ("uniforms", lambda a, n: n["out_BL"][1, 7].add_(2.0**-53), "result 0: 1.67% differ"),
        ("draw", lambda a, n: n["tokens_out_Bn"][0, 1].add_(1), "result 0: 12.50% differ from the reference"),
        ("draw", lambda a, n: n["codes_out_BnC"][0, 1].add_(1), "result 1: 12.50% differ"),
        ("draw", lambda a, n: n["invalid_out_B"].fill_(1), "result 2: 100.00% differ"),
        ("keep_given", lambda a, n: n["codes_out_BnC"][1].zero_(), "result 1: relative error"),
        ("mix_codes", lambda a, n: n["codes_out_BnC"][1].zero_(), "result 0: relative error"),
        ("quantize_rows", lambda a, n: n["scale_out_M1"].mul_(2), "result 0: relative error 1.0e\\+00"),
        ("next_scale", lambda a, n: n["x_out_RmD"][2:].zero_(), "result 1: relative error"),
        ("groupnorm_silu", lambda a, n: n["out_BlC"][1].zero_(), "result 0: relative error"),
        ("upsample_sum", lambda a, n: n["out_BHWC"][1].zero_(), "result 0: relative error"),
        ("to_pixels", lambda a, n: n["bytes_out_BRR3"].add_(1), "result 1: 100.00% differ"),
    ],
)
def test_a_wrong_provider_is_an_error_and_gets_no_time(operation, spoil, message, tmp_path):
    out = tmp_path / "rows.json"
    cases = [tiny_case(operation), tiny_case("to_pixels" if operation == "linear" else "linear")]
    with pytest.raises(BenchmarkError, match=rf"{operation}.*: reference: {message}") as failed:
        measure(cases, wrong(operation, spoil), out=out)
    rows = json.loads(out.read_text())["rows"]
    assert [list(row["providers"]) for row in rows] == [[EAGER], ["reference", EAGER]]  # the others were measured
    assert len(failed.value.report.failures) == 1


@pytest.mark.parametrize(
    ("variant", "spoil", "message"),
    [
        ("smooth", lambda a, n: n["smooth_weights_out_BnV"][1, 2].copy_(torch.ones(1000) / 1000), "result 3: 12.50%"),
        ("smooth", lambda a, n: n["smooth_weights_out_BnV"][0, 0, 5].fill_(math.nan), "result 3: 12.50% differ"),
        ("unguided", lambda a, n: n["tokens_out_Bn"][0, 1].add_(1), "result 0: 12.50% differ"),
    ],
)
def test_a_wrong_variant_of_the_draw_is_an_error(variant, spoil, message):
    case = next(case for case in tiny_cases() if (case.operation, case.variant) == ("draw", variant))
    with pytest.raises(BenchmarkError, match=f"draw {variant} .*: reference: {message}"):
        measure([case], wrong("draw", spoil))


def test_an_implementation_that_writes_nothing_is_wrong():
    silent = dataclasses.replace(reference_ops(), adaln=lambda *_, **__: None)
    with pytest.raises(BenchmarkError, match="adaln R=2 n=9 D=192: reference: result 0: relative error"):
        measure([tiny_case("adaln")], silent)


def test_a_provider_that_raises_is_an_error_and_the_others_go_on():
    def refuses(*_, **__):
        raise ValueError("x_MD: strides\nmore")

    with pytest.raises(BenchmarkError, match=r": reference: ValueError: x_MD: strides$") as failed:
        measure([tiny_case("adaln")], dataclasses.replace(reference_ops(), adaln=refuses))
    (row,) = failed.value.report.rows
    assert list(row.providers) == [EAGER]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), torch.AcceleratorError("CUDA error: out of memory")])
def test_too_little_memory_leaves_out_and_is_no_error(error):
    def hungry(*_, **__):
        raise error

    cases = [dataclasses.replace(tiny_case("adaln"), build=hungry), tiny_case("linear")]
    report = measure(cases, dataclasses.replace(reference_ops(), linear=hungry))
    assert report.left_out == [
        "adaln R=2 n=9 D=192: out of memory",
        "linear M=12 K=48 N=20: reference: out of memory",
    ]
    assert [list(row.providers) for row in report.rows] == [[EAGER]]


def test_after_a_failure_of_the_device_nothing_more_is_tried(tmp_path):
    def crashes(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    out = tmp_path / "rows.json"
    ops = dataclasses.replace(reference_ops(), linear=crashes)
    with pytest.raises(BenchmarkError, match=r"linear .*: reference: AcceleratorError: CUDA error: an illegal memory"):
        measure([tiny_case("adaln"), tiny_case("linear"), tiny_case("draw")], ops, out=out)
    record = json.loads(out.read_text())
    assert [row["operation"] for row in record["rows"]] == ["adaln"]
    assert record["left_out"] == ["draw B=2 n=4 V=1000: the device failed before"]


@pytest.mark.parametrize(
    ("got", "expected", "message"),
    [
        ((torch.ones(3),), (torch.ones(3), torch.ones(3)), "1 results, expected 2"),
        ((torch.ones(4),), (torch.ones(3),), r"result 0 has shape \(4,\), expected \(3,\)"),
        ((torch.tensor([1, 2]),), (torch.tensor([1, 3]),), "result 0: 50.00% differ from the reference, at most 0.5%"),
        (
            (torch.tensor([1.0, 1.01]),),
            (torch.ones(2),),
            "result 0: relative error 7.1e-03 in norm, 1.0e-02 at the worst element, at most 1e-03 and 5e-03",
        ),
    ],
)
def test_the_gate_says_what_differs(got, expected, message):
    with pytest.raises(WrongResultError, match=message):
        check(tiny_case("linear"), got, expected)


def test_the_gate_returns_the_worst_error_and_accepts_another_view_of_the_same_result():
    expected = (torch.ones(2, 3), torch.ones(4), torch.tensor([True]), torch.ones(0))
    got = (torch.ones(6), torch.full((4,), 1.0005), torch.tensor([True]), torch.ones(0))
    assert check(tiny_case("linear"), got, expected) == pytest.approx(5e-4, rel=1e-3)


def test_outputs_are_not_valid_before_they_are_written():
    new = Inputs(CPU, 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        assert new.unwritten(3, dtype=dtype).float().isnan().all()
    assert (new.unwritten(3, dtype=torch.int64) == 77).all()
    assert new.allocated == 3 * (4 + 2 + 1 + 8)


def test_the_same_seed_gives_the_same_inputs():
    first, same, other = (Inputs(CPU, seed) for seed in (1, 1, 2))
    a, b, c = (torch.cat([new.normal(4).double(), new.uniform(4)]) for new in (first, same, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_file_is_whole_after_every_row(tmp_path):
    out, seen = tmp_path / "results" / "rows.json", []

    def progress(name):
        seen.append((name, len(json.loads(out.read_text())["rows"]) if out.exists() else None))

    measure([tiny_case("adaln"), tiny_case("linear"), tiny_case("draw")], out=out, progress=progress)
    assert [rows for _, rows in seen] == [None, 1, 2]
    record = json.loads(out.read_text())
    assert [file.name for file in out.parent.iterdir()] == ["rows.json"]
    assert len(record["rows"]) == 3
    assert record["machine"]["torch"] == torch.__version__
    assert record["ceilings"]["bytes_per_second"] == 1e10
    assert "not in its L2 cache" in record["timed"]
    row = record["rows"][0]
    assert (row["operation"], row["dtype"], row["shape"]) == ("adaln", "float32", {"R": 2, "n": 9, "D": 192})
    assert {"median", "p10", "p90", "p99", "minimum", "count", "how"} == row["providers"][EAGER]["timing"].keys()


def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    report = measure([tiny_case("adaln")], out=out)
    before = out.read_text()
    monkeypatch.setattr(result_file.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write(out)
    assert out.read_text() == before


def test_a_spent_budget_starts_no_further_row_and_says_which_were_left_out(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 11.0, 99.0])
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: next(clock))
    out = tmp_path / "rows.json"
    cases = [tiny_case(name) for name in ("adaln", "linear", "draw", "to_pixels")]
    measure(cases, out=out, budget=10.0)
    record = json.loads(out.read_text())
    assert [row["operation"] for row in record["rows"]] == ["adaln", "linear"]
    assert record["left_out"] == ["draw B=2 n=4 V=1000: budget spent", "to_pixels B=2 side=6: budget spent"]


def test_the_table_shows_times_shares_ceilings_and_what_is_missing():
    report = measure([tiny_case("adaln"), tiny_case("linear")])
    report.left_out.append("draw [B]: budget spent")
    report.failures.append("linear: eager: result 0")
    text = StringIO()
    print_report(report, Console(file=text, width=160))
    table = text.getvalue()
    for part in (
        *("median µs (share of the ceiling)", "floor", "reference", EAGER, "R=2 n=9 D=192", "linear"),
        *("copy 0.01 TB/s", "float32 0.1", "left out: draw [B]: budget spent", "FAILED: linear: eager: result 0"),
    ):
        assert part in table


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(*arguments)` runs the command line with tiny cases, as if there were a GPU but on the CPU."""
    app = typer.Typer()
    app.command()(benchmark.main)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 NVL")
    monkeypatch.setattr(torch, "device", lambda name, kind=torch.device: kind("cpu"))
    monkeypatch.setattr(benchmark, "triton_ops", reference_ops)
    monkeypatch.setattr(benchmark, "cases", tiny_cases)
    monkeypatch.setattr(benchmark, "quick_cases", tiny_cases)
    monkeypatch.setattr(benchmark, "ceilings", lambda device: LIMITS)
    return lambda *arguments: CliRunner().invoke(app, ["--out", str(tmp_path / "results"), *arguments])


def test_the_command_measures_what_it_is_asked_for(command, tmp_path):
    result = command("--only", "adaln", "--only", "linear", "--quick")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "results" / "gpu-nvidia-h200-nvl-kernels.json").read_text())
    rows = record["rows"]
    assert [(row["operation"], row["dtype"]) for row in rows] == [("adaln", "bfloat16")] + [("linear", "bfloat16")] * 5
    assert list(rows[0]["providers"]) == ["reference", EAGER]
    written = (tmp_path / "results" / "gpu-kernels.md").read_text(encoding="utf-8")
    assert written == page(record, tiny_cases(torch.bfloat16))
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_the_command_fails_where_a_provider_is_wrong_but_shows_the_rest(command, monkeypatch):
    monkeypatch.setattr(benchmark, "triton_ops", lambda: wrong("linear", lambda a, n: n["out_MN"].zero_()))
    result = command("--quick", "--only", "linear")
    assert result.exit_code == 1
    assert "median µs" in result.output
    assert "FAILED" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "adalm"), "operation 'adalm' is unknown; known: adaln"),
        (("--record", "rows.json"), "--record without --table"),
        (("--table", "page.md", "--record", "absent.json"), "absent.json: [Errno 2] No such file or directory"),
        (("--table", "page.md", "--record", "pyproject.toml"), "expected what a run of this benchmark wrote"),
        (("--dtype", "fp8"), "type 'fp8' is unknown; known: bf16, fp16"),
    ],
)
def test_a_wrong_request_is_named(command, arguments, message):
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_without_a_gpu_the_command_says_so_and_measures_nothing(command, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command()
    assert result.exit_code == 1
    assert "no CUDA device: nothing was measured; run this on a machine with an NVIDIA GPU" in result.output
    assert not (tmp_path / "results").exists()


# --- The page ---


def test_the_page_in_the_repository_is_of_nothing_or_of_a_record_beside_it():
    """Written by the command alone, so that it cannot name rows that are no longer there."""
    kept = ROOT / "docs" / "results" / "gpu-kernels.md"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in kept.parent.glob("gpu-*-kernels.json")]
    pages = [page(record, list(benchmark_cases.cases(torch.bfloat16))) for record in (None, *records)]
    assert kept.read_text(encoding="utf-8") in pages, "run: make pages"


def test_without_a_record_the_page_lists_what_would_be_measured(tmp_path):
    app = typer.Typer()
    app.command()(benchmark.main)
    result = CliRunner().invoke(app, ["--table", str(tmp_path / "page.md")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.count("| not measured |") == len(list(benchmark_cases.cases(torch.bfloat16)))
    assert "| draw B=1 n=256 V=4096 | float32 | 8.46 |  | not measured |" in text


def test_a_record_fills_the_page(tmp_path):
    def wrong_or_hungry(*arguments, **named):
        raise torch.OutOfMemoryError if named["gelu"] else ValueError("x_MK: strides")

    out, planned = tmp_path / "rows.json", tiny_cases()
    ops = dataclasses.replace(reference_ops(), linear=wrong_or_hungry)
    with pytest.raises(BenchmarkError):
        measure([tiny_case("adaln"), *(case for case in planned if case.operation == "linear")], ops, out=out)
    record = json.loads(out.read_text())
    record["machine"] |= {"device": "NVIDIA H200", "driver": "580.1", "sm_clock_limit_mhz": 1980}
    row = record["rows"][0]
    row |= {"floor_seconds": 2e-6, "clocks": {"sm_clock_mhz": 1755, "memory_clock_mhz": None}}
    for name, seconds in (("reference", 4e-6), (EAGER, 9e-6)):
        row["providers"][name]["timing"] |= {"median": seconds, "p10": seconds - 1e-6, "p90": seconds + 5e-6}
    row["providers"]["reference"]["share"] = 0.5
    text = page(record, planned)
    filled = "4.0 (3.0–9.0) | 2.0 | 50% | 0.0e+00 | 9.0 | 2.25× |  |  |  |  | 1755 |"
    for part in (
        f"| adaln R=2 n=9 D=192 | float32 | 0.0599 |  | {filled}",
        "| linear M=12 K=48 N=20 | float32 | 0.00718 | 2.3e-05 | failed |",
        "| to_pixels B=2 side=6 | float32 | 0.00196 |  | not measured |",
        "- linear M=12 K=48 N=20: reference: ValueError: x_MK: strides",
        "- linear gelu M=12 K=48 N=20: reference: out of memory",
        "NVIDIA H200, driver 580.1, torch ",
        "SM clock limit in MHz 1980. Ceilings measured in this run: copy 0.01 TB/s; products in TFLOP/s: float32 0",
    ):
        assert part in text
    assert "Nothing is measured" not in text
    failing = {**record, "rows": [], "failures": ["adaln R=2 n=9 D=192: CUDA error"]}
    assert "| adaln R=2 n=9 D=192 | float32 | 0.0599 |  | failed |" in page(failing, planned)


# --- What is read of the GPU ---

UNREAD = {"driver": None, "sm_clock_limit_mhz": None, "memory_clock_limit_mhz": None, "power_limit_watts": None}


def test_without_nvml_nothing_is_known_and_nothing_fails(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    measure([tiny_case("adaln")], out=tmp_path / "rows.json")
    record = json.loads((tmp_path / "rows.json").read_text())
    assert UNREAD.items() <= record["machine"].items()
    assert record["rows"][0]["clocks"] == {"sm_clock_mhz": None, "memory_clock_mhz": None}


# --- Output paths ---


@pytest.mark.parametrize("program", [("benchmark", "--out"), ("benchmark", "--table"), ("resources", "--json")])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(program, tmp_path):
    """Refused in a process that could neither compile (interpreter) nor measure (no GPU)."""
    (tmp_path / "file").touch()
    module, option = program
    path = tmp_path / "file" / "results.json"
    command = [sys.executable, "-m", f"var_kernels.{module}", option, str(path)]
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    named = path / "gpu-kernels.md" if option == "--out" else path
    assert done.stderr == (
        f"error: {named}: cannot write (Not a directory: {tmp_path / 'file'}); choose another place\n"
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_a_directory_is_no_file_and_missing_directories_are_made(tmp_path, capsys):
    with pytest.raises(typer.Exit) as refused:
        result_file.refuse_unwritable(None, tmp_path)
    assert refused.value.exit_code == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: got a directory, expected a file name; add one\n"
    result_file.refuse_unwritable(tmp_path / "a" / "b" / "rows.json")
    assert list(tmp_path.iterdir()) == []
    result_file.replace_file(tmp_path / "a" / "b" / "rows.json", "{}")
    assert (tmp_path / "a" / "b" / "rows.json").read_text() == "{}"


@pytest.mark.gpu
def test_on_a_gpu_all_providers_of_every_operation_are_right_and_timed():
    cases = tiny_cases(torch.bfloat16)
    report = run(torch.device("cuda"), cases, ops.triton_ops(), PROVIDERS, repeats=5)
    assert [(row.operation, row.variant) for row in report.rows] == [(case.operation, case.variant) for case in cases]
    assert {row.operation for row in report.rows if COMPILE in row.providers} == set(OPERATIONS)
    assert {row.variant for row in report.rows if LIBRARY in row.providers} == {"gelu", "head", "modulation"}
    for row in report.rows:
        assert {"triton", EAGER} <= row.providers.keys()
        for measured in row.providers.values():
            assert measured.timing.how.startswith("CUDA graph")
            assert 0 < measured.share < 1.5
