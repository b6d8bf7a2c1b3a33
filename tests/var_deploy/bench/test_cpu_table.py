"""Targets of a CPU beside results, and the page of a record, whatever it lacks."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from var_deploy.bench.cpu_plot import plot_cpu
from var_deploy.bench.cpu_table import TARGETS, Goal, Target, outcome, outcomes, page
from var_deploy.bench.table import NOT_MEASURED


def spread(median: float) -> dict[str, float]:
    return {"median": median, "minimum": 0.9 * median, "maximum": 1.2 * median, "p10": 0.95 * median,
            "p90": 1.1 * median, "p99": 1.2 * median, "count": 5}  # fmt: skip


def timed(seconds: float) -> dict[str, Any]:
    parts = {"transformer": 0.6 * seconds, "draw": 0.05 * seconds, "decode": 0.3 * seconds, "rest": 0.05 * seconds}
    return {
        "seconds": spread(seconds),
        "first_seconds": 40.0,
        "stages": {"condition": 0.01, "draw": 0.05 * seconds},
        "parts": parts,
        "share_of_ceiling": {"transformer": 0.75, "decode": 1.25},
    }


def batch_row(batch: int, fp32: float = 1.6, **more: float) -> dict[str, Any]:
    """A row whose ratio of fp32 over eager is given."""
    return {
        "batch": batch,
        "flops": {"blocks": 8_000_000_000, "attention": 10**9, "head": 10**9, "decode": 5_000_000_000},
        "ceilings": {"float32": {"how": "MatMul", "flops_per_second": 198e9, "seconds": spread(0.02)}},
        "variants": {"eager": timed(8.0), "compiled": timed(7.0), "fp32": timed(5.0)},
        "ratios": {"fp32": {"eager": spread(fp32), "half": spread(0.8)}}
        | {name: {"half": spread(ratio)} for name, ratio in more.items()},
        "failed": {"half_compiled": "InductorError: no compiler"},
    }


def record(**more: Any) -> dict[str, Any]:
    how = {"ours": False, "precision": "fp32"}
    return {
        "model": {"depth": 16, "width": 1024, "image": 256},
        "machine": {
            "processor": "Fake",
            "cores": 2,
            "threads": 2,
            "instructions": ["avx2"],
            "python": "3.11",
            "torch": "2.13",
        },
        "sampling": {"guidance": 1.5, "top_k": 900, "top_p": 0.96},
        "weights_bytes": {"fp32": 1_000_000_000},
        "starts": {},
        "variants": {
            "eager": {"how": "eager PyTorch, float32", **how},
            "compiled": {"how": "torch.compile, float32", **how},
            "fp32": {"how": "bundle fp32, engine onnx", "ours": True, "precision": "fp32"},
        },
        "batches": [],
        "operators": {},
        **more,
    }


def started(pss: float = 1.5e9, first: float = 4.0) -> dict[str, Any]:
    later = {"load_seconds": 1.0, "first_image_seconds": first, "warm_seconds": 1.0, "pss_bytes": pss}
    return {"starts": {"fp32": {"first": {**later, "first_image_seconds": 9.0}, "later": later}}}


@pytest.mark.parametrize(
    ("target", "found", "limit", "result", "met"),
    [
        ((1, Goal.EAGER, 1.5), {"batches": [batch_row(1, 1.6)]}, "≥ 1.5×", "1.60× (1.44–1.92)", True),
        ((1, Goal.EAGER, 1.5), {"batches": [batch_row(1, 1.499)]}, "≥ 1.5×", "1.50× (1.35–1.80)", False),
        ((8, Goal.EAGER, 1.5), {"batches": [batch_row(1), batch_row(8, 1.5)]}, "≥ 1.5×", "1.50× (1.35–1.80)", True),
        ((8, Goal.EAGER, 1.5), {"batches": [batch_row(1)]}, "≥ 1.5×", NOT_MEASURED, None),
        ((1, Goal.HALF, 0.9), {"batches": [batch_row(1)]}, "≥ 0.9×", "0.80× (0.72–0.96)", False),
        ((1, Goal.MEMORY, 1.3), started(1.7e9), "≤ 1.3 × weights + 400 MB = 1,700 MB", "1,700 MB", True),
        ((1, Goal.MEMORY, 1.3), started(1.71e9), "≤ 1.3 × weights + 400 MB = 1,700 MB", "1,710 MB", False),
        ((1, Goal.MEMORY, 1.3), {}, "≤ 1.3 × weights + 400 MB", NOT_MEASURED, None),
        ((1, Goal.START, 1.5), started(first=4.5), "≤ 1.5 × warm image + 3 s = 4.50 s", "4.50 s", True),
        ((1, Goal.START, 1.5), started(first=4.6), "≤ 1.5 × warm image + 3 s = 4.50 s", "4.60 s", False),
        ((1, Goal.START, 1.5), {}, "≤ 1.5 × warm image + 3 s", NOT_MEASURED, None),
    ],
)  # fmt: skip
def test_a_target_is_met_or_not_or_not_measured(target, found, limit, result, met):
    batch, goal, number = target
    done = outcome(Target(precision="fp32", batch=batch, goal=goal, limit=number), record(**found))
    assert (done.limit, done.result, done.met) == (limit, result, met)
    assert done.target == f"fp32, batch {batch}: {goal}"


def test_memory_that_the_system_does_not_tell_is_not_measured():
    found = record(**started())
    del found["starts"]["fp32"]["later"]["pss_bytes"], found["starts"]["fp32"]["first"]["pss_bytes"]
    met = {done["target"]: done["met"] for done in outcomes(found)}
    assert met["fp32, batch 1: PSS after one image"] is None
    assert met["fp32, batch 1: load to first image"] is True
    assert f"| fp32, later | 1,000 | 1.00 | 4.00 | 1.00 | {NOT_MEASURED} |" in page(found)


def test_the_page_of_a_whole_run():
    operators = {"transformer": {"MatMul": 3000.0, "Add": 90.0, "Shape": 1.0}, "decoder": {"Conv": 900.0}}
    text = page(record(batches=[batch_row(1), batch_row(8, int8=2.5)], operators={"fp32": operators}, **started()))
    for line in (
        "# d16 on a CPU",
        "Machine: Fake, 2 cores with avx2, 2 threads for every variant; python 3.11, torch 2.13.",
        "| fp32, batch 8: over eager PyTorch in float32 | ≥ 1.5× | 1.60× (1.44–1.92) | yes |",
        "| int8, batch 8: over PyTorch under bf16 autocast | ≥ 1.6× | 2.50× (2.25–3.00) | yes |",
        "| PyTorch float32 | 8.000 (7.600–8.800) | 1.000 | 4.800 | 0.400 | 2.400 | 0.400 | 75% | 125% |  |  |",
        "| fp32 | 5.000 (4.750–5.500) | 5.000 | 3.000 | 0.250 | 1.500 | 0.250 | 75% | 125% | 1.60× (1.44–1.92) "
        "| 0.80× (0.72–0.96) |",
        "Repeats: 5. Operations: transformer 10.0 G, decoder 5.0 G,",
        "float32 198 (MatMul)",
        "- fp32, milliseconds by stage: condition 10.0, draw 250.0",
        "- compiled float32: the first run, compilation included, took 40 s",
        "- PyTorch float32: eager PyTorch, float32",
        "| fp32, first | 1,000 | 1.00 | 9.00 | 1.00 | 1,500 |",
        "- transformer, 3091.0 in all: MatMul 3000.0, Add 90.0, others 1.0",
        "- batch 8, compiled bf16: InductorError: no compiler",
        "## Export and parity",
    ):
        assert line in text
    assert text.count("| fp32 | 5.000") == 2
    assert "Shape" not in text


def test_a_page_of_little_says_what_is_missing():
    text = page(record(**started()))
    assert text.count(f"| {NOT_MEASURED} | {NOT_MEASURED} |") == len(TARGETS) - 2
    for absent in ("## Batch", "## Milliseconds by operator", "## Failed"):
        assert absent not in text


@pytest.mark.parametrize("rows", [[], [batch_row(1)]], ids=["nothing", "one batch size"])
def test_the_plot_is_a_picture_with_whatever_was_measured(tmp_path, rows):
    pytest.importorskip("matplotlib")
    plot_cpu(record(batches=rows), tmp_path / "cpu.png")
    with Image.open(tmp_path / "cpu.png") as image:
        assert image.size[0] > 1000


def test_the_plot_names_variants_and_parts(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_cpu(record(batches=[batch_row(1), batch_row(8)]), tmp_path / "cpu.svg")
    text = (tmp_path / "cpu.svg").read_text(encoding="utf-8")
    for label in ("transformer", "draw", "decoder", "PyTorch float32", "fp32", "batch 1", "batch 8", "d16, 256 px"):
        assert label in text
