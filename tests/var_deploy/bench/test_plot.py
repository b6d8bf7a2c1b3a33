"""The plot of a benchmark: written in the format asked for, with every series, whatever a row lacks."""

from __future__ import annotations

import builtins
from importlib import util
from pathlib import Path

import pytest
from PIL import Image

from var_deploy.bench import plot
from var_deploy.bench.plot import check_plot, plot_bench
from var_deploy.errors import EngineError, RequestError

matplotlib = pytest.importorskip("matplotlib")


def row(batch: int, precision: str, seconds: float, **more: object) -> dict:
    spread = {"median": seconds, "p10": 0.9 * seconds, "p90": 1.2 * seconds}
    return {"batch": batch, "precision": precision, "seconds": spread, **more}


ROWS = [
    row(8, "bf16", 0.02, model="d16", floor_seconds=0.006),
    row(1, "bf16", 0.003, model="d16", floor_seconds=0.0018, reference={"median": 0.03}, compiled={"median": 0.01}),
    row(1, "fp8", 0.002, model="d16", floor_seconds=None, reference=None),
    {"model": "d36-s", "precision": "bf16", "batch": 1, "error": "OutOfMemoryError"},
]


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
def test_formats(tmp_path, name, begins):
    plot_bench(ROWS, tmp_path / name, "d16")
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_series_and_lines_are_named(tmp_path):
    out = tmp_path / "a.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_bench(ROWS, out, "Whole images on a fake")
    text = out.read_text(encoding="utf-8")
    for label in ("Whole images on a fake", "d16 bf16", "d16 fp8", "d16 bf16 floor", "d16 bf16 eager", "compiled"):
        assert label in text
    for absent in ("d36-s", "fp8 floor", "fp8 eager"):
        assert absent not in text


def test_no_row_makes_an_empty_plot(tmp_path):
    plot_bench([], tmp_path / "a.png", "nothing")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] > 100


def test_the_format_can_be_told_where_the_name_does_not(tmp_path):
    plot_bench(ROWS, tmp_path / "partial", "d16", form="png")
    assert (tmp_path / "partial").read_bytes().startswith(b"\x89PNG")


def test_what_would_fail_is_said_beforehand(monkeypatch):
    check_plot(Path("a.png"))
    with pytest.raises(RequestError, match=r"^a.jpg: unknown plot format '.jpg'; use .png, .svg, .pdf$"):
        check_plot(Path("a.jpg"))
    monkeypatch.setattr(plot, "find_spec", lambda name: None if name == "matplotlib" else util.find_spec(name))
    with pytest.raises(EngineError, match=r"^a plot needs matplotlib; pip install 'var-deploy\[plot\]'$"):
        check_plot(Path("a.png"))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def refusing(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}", name=name.split(".")[0])
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(EngineError, match=r"^a plot needs matplotlib; pip install"):
        plot_bench(ROWS, tmp_path / "a.png", "d16")
