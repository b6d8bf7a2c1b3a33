"""The CPU suite on a tiny bundle: what it writes, what may fail and what must not, the runs in turn, wrong requests."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from var_deploy.bench import cpu_ceilings, cpu_start, cpu_suite, cpu_variants
from var_deploy.bench.cpu_ceilings import counted_flops, instructions, products, shares
from var_deploy.bench.cpu_profile import operator_milliseconds, operators_of
from var_deploy.bench.cpu_variants import COMPILED, EAGER, HALF, HALF_COMPILED, Variant, parts, references
from var_deploy.bench.floor import floor
from var_deploy.bundle import Bundle
from var_deploy.errors import EngineError, VarDeployError
from var_deploy.precision import Precision

OPTIONS: dict[str, Any] = {
    "batch": [2, 1],
    "repeats": 2,
    "warmup": 1,
    "limit": None,
    "threads": 1,
    "guidance": None,
    "half_reference": True,
    "compiled": [1],
    "starts": 2,
    "profile": False,
    "table": None,
    "record": None,
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads of a busy machine wait for each other far longer than this model takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _small_products(monkeypatch):
    """Without bf16 instructions one product of the real size takes half a second."""
    for name, size in (("M", 5), ("K", 64), ("N", 33)):
        monkeypatch.setattr(cpu_ceilings, name, size)
    monkeypatch.setattr(cpu_ceilings.Product.sample, "__defaults__", (0.0,))


@pytest.fixture
def fakes(monkeypatch, _small_products) -> list[tuple[str, int]]:
    """References, starts and ceilings that take no time; says which reference ran with which batch size."""
    ran: list[tuple[str, int]] = []

    def fake(name: str, **more: Any) -> Variant:
        def run(batch: int) -> dict[str, float]:
            ran.append((name, batch))
            if name == HALF_COMPILED:
                raise RuntimeError("no compiler\nand a long trace")
            return {"transformer": 0.5, "draw": 0.1, "decode": 0.2, "rest": 0.1}

        precision = Precision.BF16 if name.startswith(HALF) else Precision.FP32
        return Variant(name=name, how=f"fake {name}", ours=False, precision=precision, run=run, **more)

    def made(manifest, *, half, compiled, **options) -> list[Variant]:
        assert options == {"guidance": None, "threads": 1}
        compiling = {"batches": tuple(compiled), "may_fail": True}
        names = {EAGER: {}, **({HALF: {}} if half else {}), COMPILED: compiling, HALF_COMPILED: compiling}
        return [fake(name, **more) for name, more in names.items()]

    start = {"load_seconds": 0.1, "first_image_seconds": 0.3, "warm_seconds": 0.2, "pss_bytes": 9e7}
    monkeypatch.setattr(cpu_suite, "references", made)
    monkeypatch.setattr(cpu_suite, "measured_starts", lambda *_, **__: {"first": start, "later": start})
    return ran


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_a_run_writes_record_page_and_plot(fakes, tiny_bundle, tmp_path, capsys):
    before = os.environ.get("XDG_CACHE_HOME")
    cpu_suite.main([tiny_bundle], out=tmp_path / "new", **OPTIONS)
    assert os.environ.get("XDG_CACHE_HOME") == before
    assert not list(tiny_bundle.parent.glob(".cache-*"))
    pytest.importorskip("matplotlib")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"cpu.json", "cpu.md", "cpu.png"}
    record = json.loads((tmp_path / "new" / "cpu.json").read_text(encoding="utf-8"))
    # Warm-up, then two repeats in turn; the compiled ones at batch 1 alone, one of which does not compile.
    one = [(EAGER, 1), (HALF, 1), (COMPILED, 1)]
    assert fakes == [*one, (HALF_COMPILED, 1), *one, *one] + [(EAGER, 2), (HALF, 2)] * 3
    first, second = record["batches"]
    assert (first["batch"], second["batch"]) == (1, 2)
    assert first["failed"] == {HALF_COMPILED: "RuntimeError: no compiler"}
    assert list(first["variants"]) == [EAGER, HALF, COMPILED, "fp32"]
    assert first["ratios"].keys() == {"fp32"}
    assert first["ratios"]["fp32"].keys() == {EAGER, HALF, COMPILED}
    mine = first["variants"]["fp32"]
    assert {"condition", "scale_00", "scale_03", "draw", "finish", "decode", "rest"} == {
        stage for stage in mine["stages"] if stage not in ("scale_01", "scale_02")
    }
    # Of two repeats medians are means, and the parts are all that is timed but the call itself.
    assert 0.5 * mine["seconds"]["median"] < sum(mine["parts"].values()) <= mine["seconds"]["median"]
    assert mine["seconds"]["count"] == 2
    assert all(of["flops_per_second"] > 0 for of in first["ceilings"].values())
    assert second["flops"] == {part: 2 * count for part, count in first["flops"].items()}
    assert record["machine"]["threads"] == 1
    assert record["weights_bytes"] == {"fp32": (tiny_bundle / "weights.safetensors").stat().st_size}
    assert record["operators"] == {}
    text = (tmp_path / "new" / "cpu.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "| fp32, batch 1: load to first image | ≤ 1.5 × warm image + 3 s = 3.30 s | 0.30 s | yes |" in text
    again = tmp_path / "again.md"
    from_record = {**OPTIONS, "table": again, "record": tmp_path / "new" / "cpu.json"}
    cpu_suite.main(None, out=tmp_path, **from_record)
    assert again.read_text(encoding="utf-8") == text


def test_a_run_cut_short_leaves_what_it_has(fakes, tiny_bundle, tmp_path, monkeypatch):
    def interrupted(*_: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_suite, "operator_milliseconds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cpu_suite.main([tiny_bundle], out=tmp_path, **{**OPTIONS, "batch": [1], "repeats": 1, "profile": True})
    assert len(json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["batches"]) == 1
    assert "## Batch 1" in (tmp_path / "cpu.md").read_text(encoding="utf-8")


def test_nothing_is_written_where_nothing_was_measured(fakes, tiny_bundle, tmp_path, monkeypatch):
    def missing(*_: Any, **__: Any) -> list[Variant]:
        raise EngineError("the reference needs torch")

    monkeypatch.setattr(cpu_suite, "references", missing)
    with pytest.raises(EngineError, match="the reference needs torch"):
        cpu_suite.main([tiny_bundle], out=tmp_path, **{**OPTIONS, "starts": 0})
    assert list(tmp_path.iterdir()) == []


def test_a_variant_that_must_run_ends_the_run_when_it_fails(tiny_bundle):
    def broken(batch: int) -> dict[str, float]:
        raise ValueError("ours to mend")

    variant = Variant(name="fp32", how="", ours=True, precision=Precision.FP32, run=broken)
    options: dict[str, Any] = {"guidance": None, "repeats": 1, "warmup": 1, "limit_seconds": None}
    with pytest.raises(ValueError, match="ours to mend"):
        cpu_variants.time_batch([variant], [], Bundle.open(tiny_bundle).manifest, 1, progress=print, **options)


# ---- its parts -------------------------------------------------------------------------------------------------------


def test_the_references_are_eager_and_compiled_in_both_precisions(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    found = references(manifest, half=True, compiled=[1], threads=1)  # compiles when first run
    assert [(variant.name, variant.how) for variant in found] == [
        (EAGER, "eager PyTorch, float32"),
        (HALF, "eager PyTorch, autocast to bf16, channels-last decoder"),
        (COMPILED, "torch.compile, float32"),
        (HALF_COMPILED, "torch.compile, autocast to bf16, channels-last decoder"),
    ]
    assert [variant.precision for variant in found] == ["fp32", "bf16"] * 2
    assert [(variant.batches, variant.may_fail) for variant in found] == [(None, False)] * 2 + [((1,), True)] * 2
    for variant in found[:2]:
        stages = variant.run(2)
        assert stages.keys() == {"transformer", "draw", "decode", "rest"}
        assert min(stages.values()) > 0
    assert [variant.name for variant in references(manifest, half=False, compiled=[])] == [EAGER]


def test_stages_add_up_to_parts():
    stages = {"condition": 1.0, "scale_00": 2.0, "scale_11": 4.0, "draw": 8.0, "finish": 16.0, "decode": 32.0}
    assert parts({**stages, "rest": 64.0}) == {"transformer": 7.0, "draw": 8.0, "decode": 32.0, "rest": 80.0}


def test_operations_are_all_those_of_the_floor(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    counted = floor(manifest.var, manifest.vqvae, batch=3, precision=Precision.FP32)
    flops = counted_flops(counted, manifest.var.vocab_size, manifest.var.embed_dim)
    assert sum(flops.values()) == counted.flops
    tokens = manifest.var.num_tokens
    assert flops["head"] == 2 * 6 * tokens * manifest.var.embed_dim * manifest.var.vocab_size


@pytest.mark.parametrize(
    ("precision", "transformer", "decode"),
    [
        (Precision.FP32, (80 + 10 + 10) / 10, 40 / 10),
        (Precision.FP16, (80 + 10 + 10) / 10, 40 / 10),  # computed in float32 on a CPU
        (Precision.BF16, (80 + 10) / 20 + 10 / 10, 40 / 20),
        (Precision.INT8, (80 + 10) / 40 + 10 / 10, 40 / 10),
    ],
)
def test_the_share_is_the_time_at_the_ceilings_over_the_time_taken(precision, transformer, decode):
    flops = {"blocks": 80, "attention": 10, "head": 10, "decode": 40}
    found = shares(flops, precision, {"float32": 10.0, "bf16": 20.0, "u8×s8": 40.0}, 20.0, 8.0)
    assert found == pytest.approx({"transformer": transformer / 20, "decode": decode / 8})


@pytest.mark.usefixtures("_small_products")
def test_ceilings_are_measured_products():
    made = products(1)
    assert [str(product.arithmetic) for product in made] == ["float32", "bf16", "u8×s8"]
    for product in made:
        product.sample()
        product.sample()
        found = product.record()
        assert "5×64×33" in found["how"]
        assert found["seconds"]["count"] == 2
        assert found["flops_per_second"] == pytest.approx(2 * 5 * 64 * 33 / found["seconds"]["median"])
        assert product.seconds == []


def test_instructions_are_those_that_the_system_names(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "model name\t: Fake\nflags\t\t: fpu avx2 avx512f avx512_bf16x avx512_vnni\nflags\t\t: amx_int8\n"
    )
    assert instructions(cpuinfo) == ["avx2", "avx512f", "avx512_vnni"]
    cpuinfo.write_text("Features\t: fp asimddp bf16\n")
    assert instructions(cpuinfo) == ["bf16", "asimddp"]
    cpuinfo.write_text("")
    assert instructions(cpuinfo) == instructions(tmp_path / "none") == []


def test_a_product_is_sampled_for_a_while():
    product = cpu_ceilings.Product(arithmetic=cpu_ceilings.Arithmetic.BF16, how="", run=lambda: time.sleep(0.002))
    product.sample(0.01)
    assert 2 <= len(product.seconds) <= 5  # no call is shorter than it sleeps


def test_a_start_tells_seconds_and_memory(tiny_bundle, capsys):
    cpu_start.main(tiny_bundle, threads=1, guidance=0.0)
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["load_seconds"] < found["first_image_seconds"]
    assert found["warm_seconds"] > 0
    assert found["pss_bytes"] > 1e7


def test_starts_are_one_without_a_cache_and_medians_of_those_after(monkeypatch, tmp_path):
    made = iter([9.0, 4.0, 1.0, 2.0])
    heard = []

    def run(command, *, env, **_):
        heard.append((command[3:], env["XDG_CACHE_HOME"]))
        return SimpleNamespace(returncode=0, stdout=json.dumps({"load_seconds": next(made), "pss_bytes": None}))

    monkeypatch.setattr(cpu_start.subprocess, "run", run)
    found = cpu_start.measured_starts(Path("b"), threads=2, guidance=1.0, cache=tmp_path, repeats=3)
    assert found == {"first": {"load_seconds": 9.0}, "later": {"load_seconds": 2.0}}
    assert heard == [(["b", "--threads", "2", "--guidance", "1.0"], str(tmp_path))] * 4


def test_a_start_that_fails_is_one_line(tmp_path):
    with pytest.raises(EngineError, match=r"^a new process failed with status 1: .*none.*bundle"):
        cpu_start.measured_starts(tmp_path / "none", threads=1, guidance=None, cache=tmp_path)


def test_operators_of_the_last_image_are_added_up():
    def event(name: str, ts: int, dur: int, op: str | None = None) -> dict[str, Any]:
        return {"cat": "Session" if op is None else "Node", "name": name, "ts": ts, "dur": dur, "args": {"op_name": op}}

    runs = [event("model_run", ts, 90) for ts in (0, 100, 200, 300)]
    nodes = [event("a_kernel_time", 10, 1000, "MatMul"), event("a_kernel_time", 210, 2000, "MatMul")]
    nodes += [event("b_kernel_time", 310, 500, "Add"), event("a_kernel_time", 320, 3000, "MatMul")]
    nodes += [event("a_fence_before", 320, 9, "MatMul")]
    assert operators_of([*runs, *nodes]) == {"MatMul": 5.0, "Add": 0.5}


def test_the_profile_of_a_bundle_names_its_operators(tiny_bundle):
    found = operator_milliseconds(tiny_bundle, 1)
    assert found.keys() == {"transformer", "decoder"}
    assert {"MatMul", "Attention", "TensorScatter"} <= found["transformer"].keys()
    assert found["decoder"]["Conv"] > 0
    for milliseconds in found.values():
        assert list(milliseconds.values()) == sorted(milliseconds.values(), reverse=True)


# ---- wrong requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bundles", "options", "message"),
    [
        ([], {}, "got no bundle, expected one or more of one model; export one, or use --table"),
        (["tiny", "tiny"], {}, "tiny: got fp32, as tiny has; give each precision once"),
        (["tiny", "shared"], {}, "shared: its model is not that of tiny; give bundles of one checkpoint"),
        ([], {"table": "t.md"}, "--table FILE and --record JSON: expected both, and no bundle; add what is missing"),
        ([], {"record": "t.json"}, "--table FILE and --record JSON: expected both, and no bundle; add what is missing"),
        ([], {"table": "t.md", "record": "broken.json"}, "broken.json: not JSON (Expecting value: line 1 column 1"),
        ([], {"table": "t.md", "record": "other.json"}, "other.json: got no batches, expected what a run of this"),
        ([], {"table": ".", "record": "other.json"}, ".: got a directory, expected a file name; add one"),
        (["tiny"], {"out": "taken"}, "taken/cpu.png: got a directory, expected a file name; add one"),
    ],
    ids=["none", "twice", "model", "table", "record", "not JSON", "other JSON", "directory", "unwritable"],
)
def test_a_wrong_request_is_told_what_would_be_right(
    tiny_bundle, shared_aln_bundle, tmp_path, monkeypatch, bundles, options, message
):
    (tmp_path / "tiny").symlink_to(tiny_bundle)
    (tmp_path / "shared").symlink_to(shared_aln_bundle)
    (tmp_path / "broken.json").write_text("rows")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "taken" / "cpu.png").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = {**OPTIONS, "out": Path("."), **{name: Path(value) for name, value in options.items()}}
    with pytest.raises(VarDeployError) as refusal:
        cpu_suite.main([Path(name) for name in bundles] or None, **given)
    assert str(refusal.value).startswith(message)
    assert not (tmp_path / "t.md").exists()
