"""Samples of several bundles side by side, judged; real digits stand for what engines would draw."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from var_deploy.cli import app
from var_deploy.commands.options import EngineChoice
from var_deploy.errors import RequestError
from var_deploy.precision import Precision
from var_export import digits_evaluation
from var_export.digits_evaluation import evaluate_digits
from var_train.digits_quality import LabelledImages, feature_distance

pytest.importorskip("sklearn")


def pipe(path: Path, classes: int = 10, side: int = 32):
    """`<precision>_…` → as far as a pipeline is looked at here."""
    manifest = SimpleNamespace(var=SimpleNamespace(num_classes=classes), vqvae=SimpleNamespace(image_size=side))
    engine = SimpleNamespace(name="onnx", precision=Precision(path.name.split("_")[0]))
    return SimpleNamespace(bundle=SimpleNamespace(path=path, manifest=manifest), engine=engine)


@pytest.fixture(scope="module")
def split():
    return digits_evaluation.digits_split(*vars(pipe(Path("fp32")).bundle.manifest).values())


@pytest.fixture
def drawn(split, monkeypatch):
    """Real training digits, of which every seed takes others; `int8_bad` draws what it was not asked for."""
    monkeypatch.setattr(digits_evaluation, "digits_split", lambda *_: split)
    train = split.train

    def draw(pipe, per_class: int, *, first_seed: int = 0, on_images=lambda done: None) -> LabelledImages:
        start = first_seed // 10
        index = np.concatenate([np.flatnonzero(train.labels_N == c)[start : start + per_class] for c in range(10)])
        on_images(10 * per_class)
        labels_N = train.labels_N[index]
        wrong = pipe.bundle.path.name.endswith("bad")
        return LabelledImages(train.images_N3RR[index], (labels_N + wrong) % 10)

    monkeypatch.setattr(digits_evaluation, "engine_digits", draw)
    monkeypatch.setattr(digits_evaluation, "BOOTSTRAP", 5)
    return draw


def test_fp32_stands_beside_every_other_bundle(drawn, split):
    heard: list[tuple[str, int, int]] = []
    paths = [Path("int8_good"), Path("fp32"), Path("int8_bad")]
    found = evaluate_digits(paths, pipe, count=400, progress=lambda *heard_of: heard.append(heard_of))
    real, fp32, again, good, bad = found["rows"]
    names = ["real digits, training", "fp32", "fp32, other seeds", "int8, int8_good", "int8, int8_bad"]
    assert [row["name"] for row in found["rows"]] == names
    assert [row["images"] for row in found["rows"]] == [1297, 400, 400, 400, 400]
    assert [row["passed"] for row in found["rows"]] == [None, None, None, True, False]
    assert real["accuracy"] is None
    assert fp32["accuracy"] == good["accuracy"] > 0.98 > 0.05 > bad["accuracy"]
    assert (
        good["distance"]
        == fp32["distance"]
        == pytest.approx(feature_distance(split.held_out, drawn(pipe(paths[1]), 40)))
    )
    assert good["to_fp32"] == pytest.approx(0, abs=1e-9)
    assert again["to_fp32"] > 0.01
    for row in found["rows"]:
        low, high = row["interval"]
        assert low < row["distance"] < high
        assert min(row["precision"], row["recall"]) > 0.5
    assert heard == [(name, 400, 400) for name in names[1:]]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["int8_a"],
            r"evaluate-digits: 0 fp32 bundles \(int8_a: int8\), expected one that the others are compared with",
        ),
        (["fp32_a", "fp32_b"], r"evaluate-digits: 2 fp32 bundles \(fp32_a: fp32, fp32_b: fp32\), expected one"),
    ],
)
def test_exactly_one_bundle_is_what_others_are_compared_with(names, said):
    with pytest.raises(RequestError, match=said):
        evaluate_digits([Path(name) for name in names], pipe)


def test_bundles_of_several_models_are_refused(drawn):
    with pytest.raises(RequestError, match="int8: makes 3 classes at 32 px, fp32 10 at 32; give bundles of one model"):
        evaluate_digits([Path("fp32"), Path("int8")], lambda path: pipe(path, 3 if path.name == "int8" else 10))


def test_samples_that_are_no_numbers_are_refused(drawn, monkeypatch):
    def draw(*arguments, **options):
        images = drawn(*arguments, **options)
        images.images_N3RR[0] = np.nan
        return images

    monkeypatch.setattr(digits_evaluation, "engine_digits", draw)
    with pytest.raises(RequestError, match="fp32: samples hold NaN or infinity; check the bundle with verify"):
        evaluate_digits([Path("fp32")], pipe, count=100)


def test_the_command_writes_a_page_and_its_numbers(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(EngineChoice, "load", lambda self, path: pipe(path))
    out = tmp_path / "page.md"
    result = CliRunner().invoke(
        app, ["evaluate-digits", "fp32", "int8", "--count", "100", "--out", str(out)], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    page = out.read_text()
    assert "|  | real digits, training | fp32 | fp32, other seeds | int8, int8 |\n| --- | ---: | ---: |" in page
    distances = " | ".join(f"{row['distance']:.4f}" for row in rows)
    assert f"| distance to real | {distances} |" in page
    assert f"| accuracy |  | {rows[1]['accuracy']:.1%} | " in page
    assert "| as good as fp32 |  |  |  | yes |" in page
    assert "int8, int8" in result.output
    result = CliRunner().invoke(app, ["evaluate-digits", "fp32", "--out", str(tmp_path / "page.txt")])
    assert isinstance(result.exception, RequestError)
    assert "page.txt: got .txt, expected .md; the JSON object goes beside it" in str(result.exception)
