"""The quality report: what was found stands on the page, what failed is told, and every picture can be made again."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import var_deploy
from var_deploy.bundle import MANIFEST
from var_deploy.cli import app
from var_deploy.commands.options import EngineChoice, SamplingChoice
from var_deploy.commands.report import said
from var_deploy.errors import BundleError, CheckpointError, EngineError, RequestError, VarDeployError
from var_deploy.pipeline import Pipeline
from var_deploy.quality_report import again, gather, numbers, page, tables
from var_deploy.quality_report.facts import Edit, Facts, Shot
from var_deploy.recipe import recipes_from_png
from var_export.verify import verify_bundle

#: A class that would run a script, one with a quote for the shell, and one whose name is another's id.
NAMES = ["zero", "7", "it's two", "<script>alert('3')</script>", *(f"class & {i}" for i in range(4, 10))]
SETTINGS: dict[str, Any] = {"guidance": 2.5, "top_k": 60, "top_p": 0.9}
SAID = ("--guidance", "2.5", "--top-k", "60", "--top-p", "0.9")

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A page as a browser's parser would have it; anything that is not closed or not known is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.text: dict[str, str] = {}  # by section
        self.tables: dict[str, list[list[str]]] = {}  # by caption
        self.images: dict[str, list[dict[str, str]]] = {}  # by section
        self.style = ""
        self._section, self._caption = "", ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"{tag}: an attribute twice"
        self.tags.append((tag, values))
        if tag == "section":
            self._section = values["id"] or ""
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("th", "td"):
            self.tables[self._caption][-1].append("")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag == "img":
            self.images.setdefault(self._section, []).append({key: value or "" for key, value in attrs})
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + data
        if "style" in self.open:
            self.style += data
        if "caption" in self.open:
            self._caption += data
        if {"th", "td"} & set(self.open):
            self.tables[self._caption][-1][-1] += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)

    def pngs(self, section: str) -> list[bytes]:
        prefix = "data:image/png;base64,"
        sources = [image["src"] for image in self.images[section]]
        assert all(source.startswith(prefix) for source in sources)
        return [base64.b64decode(source.removeprefix(prefix), validate=True) for source in sources]

    def pairs(self, caption: str) -> dict[str, str]:
        return {row[0]: row[1] for row in self.tables[caption]}

    def under(self, caption: str, title: str) -> list[str]:
        (cells,) = [row[1:] for row in self.tables[caption] if row[0] == title]
        return cells


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def words(command: str) -> list[str]:
    """As a shell splits it."""
    return shlex.split(command.replace("\\\n", ""))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with names for its classes, in a directory whose name needs care too."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("report") / "tiny <i> & more"))
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    (path / MANIFEST).write_text(json.dumps(manifest | {"class_names": NAMES}), encoding="utf-8")
    return path


def load(path: Path) -> Pipeline:
    return var_deploy.load(path, engine="onnx", threads=1, cache=False, verify_digests=False)


@pytest.fixture(scope="module")
def facts(bundle: Path, tiny_pair) -> Facts:
    asked = gather.Asked(
        classes=[3, 2, "7"],
        per_class=2,
        seed=5,
        sampling=SETTINGS,
        batches=[2, 1],
        repeats=1,
        threads=1,
        spoken=again.Spoken(
            engine=("--threads", "1", "--no-cache"),
            sampling=SAID,
            bench=("--batch", "2", "--batch", "1", "--repeats", "1"),
            checkpoints=("--var", "var.safetensors", "--vae", "vae.safetensors"),
            report=("--class", "it's two"),
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("var_export.verify._ssim", lambda *_: 1.0)  # its library takes two seconds to import
        return gather.gather(
            bundle,
            load,
            asked,
            verify=lambda engine: verify_bundle(bundle, *tiny_pair[1:], engine=engine).to_dict(),
        )


@pytest.fixture(scope="module")
def text(facts: Facts) -> str:
    return page.html(facts)


@pytest.fixture(scope="module")
def shown(text: str) -> Page:
    return Page(text)


# ---- the page as HTML ------------------------------------------------------------------------------------------------


def test_headings_come_in_order_and_sections_are_those_linked(shown):
    levels = [level for level, _ in shown.headings]
    assert levels.count(1) == levels.index(1) + 1 == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [values["id"] for _, values in shown.tags if "id" in values]
    assert ids == ["bundle", "engine", "parity", "fidelity", "timing", "samples", "strips", "editing", "again"]
    links = [values["href"] or "" for _, values in shown.tags if "href" in values]
    assert {link.removeprefix("#") for link in links} == set(ids)


def test_nothing_is_requested_and_nothing_runs(shown):
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    attributes = {(tag, name) for tag, values in shown.tags for name in values}
    assert not [name for _, name in attributes if name.startswith("on")]
    assert {tag for tag, name in attributes if name in ("src", "srcset", "poster", "action", "background")} == {"img"}
    assert not re.search("url\\(|@import|expression", shown.style)
    (policy,) = [v["content"] or "" for _, v in shown.tags if v.get("http-equiv") == "Content-Security-Policy"]
    assert policy.split("; ")[:3] == ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"]


def test_tables_and_pictures_say_what_they_are(shown):
    tags = [tag for tag, _ in shown.tags]
    assert tags.count("table") == tags.count("caption") == len(shown.tables) > 8
    for caption, rows in shown.tables.items():
        assert caption
        assert len({len(row) for row in rows}) == 1, caption
    assert {values["scope"] for tag, values in shown.tags if tag == "th"} == {"row", "col"}
    images = [values for tag, values in shown.tags if tag == "img"]
    assert images
    assert all(values["alt"] for values in images)
    assert dict(shown.tags)["html"] == {"lang": "en"}


def test_a_class_name_is_text_and_never_markup(shown, text):
    assert NAMES[3] not in text
    assert NAMES[3] in shown.text["samples"]
    assert any(NAMES[3] in image["alt"] for image in shown.images["samples"])
    assert shown.headings[0] == (1, "tiny <i> & more")
    assert "generate 'tiny <i> & more' --like FILE" in shown.text["samples"]


def test_neither_the_machine_nor_its_directories_are_named(text, shown, bundle, tiny_pair):
    for private in (str(bundle.parent), str(tiny_pair[1].parent), f"{Path.home()}/"):
        assert private not in text
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", " ".join(shown.text.values()))


# ---- its numbers -----------------------------------------------------------------------------------------------------


def test_bundle_engine_and_settings(shown, facts, bundle):
    assert shown.pairs("Identity and origin")["Digest of its files"] == load(bundle).bundle.digest
    assert shown.pairs("Identity and origin")["Licence of the weights"] == "not stated"
    model = shown.pairs("Model")
    assert (model["Depth"], model["Scales, side in tokens"], model["Image"]) == ("2 blocks", "1, 2, 3, 4", "64 × 64 px")
    sizes = [path.stat().st_size for path in bundle.iterdir() if path.name != MANIFEST]
    assert shown.tables["Files by role"][-1] == ["All", str(len(sizes)), f"{sum(sizes):,}"]
    weights = (bundle / "weights.safetensors").stat().st_size
    assert shown.under("Files by role", "Weights") == ["1", f"{weights:,}"]
    total = sum(facts.inspection["parameters"].values())
    assert shown.tables["Parameters by stage"][-1] == ["All", f"{total:,}"]
    assert shown.pairs("What ran") == {
        "Engine": "onnx",
        "Device": "cpu",
        "Precision": "fp32",
        "Decoder": "graph",
        "Threads": "1",
    }
    assert shown.pairs("Versions")["onnxruntime"] == facts.bench["machine"]["onnxruntime"]
    assert shown.pairs("Machine")["Load before the start"] == f"{facts.load:.1f} processes"
    drawn = shown.pairs("Settings of all pictures here")
    assert drawn["Guidance strength by scale"] == "0, 0.833, 1.67, 2.5"
    assert (drawn["Top-k (0 is off)"], drawn["Top-p (0 is off)"]) == ("60", "0.9")


def test_parity_scale_by_scale(shown, facts):
    header, *rows = shown.tables["Scale by scale"]
    assert header[1:4] == ["static: logit error", "static: equal tokens", "static: mean KL"]
    assert [plain(row[0]) for row in rows] == [f"scale {k}, {k + 1} × {k + 1}" for k in range(4)]
    for k, row in enumerate(rows):
        found = [facts.parity["scales"][variant][k] for variant in ("static", "symbolic")]
        assert [float(row[1]), float(row[4])] == [float(f"{entry['logit_error']:.1e}") for entry in found]
        assert [plain(row[2]), plain(row[5])] == [f"{100 * entry['token_agreement']:.2f} %" for entry in found]
    assert "Passed: engine onnx in fp32" in " ".join(shown.text["parity"].split())
    assert "everything is computed in float32" in shown.text["fidelity"]


def test_latency_and_memory(shown, facts):
    rows = facts.bench["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    quick = min(row["seconds"]["median"] for row in rows) < 1
    form, unit, factor = ("{:,.1f}", "ms", 1e3) if quick else ("{:,.2f}", "s", 1.0)
    medians = [form.format(row["seconds"]["median"] * factor) for row in rows]
    assert shown.under("Whole images", f"A request, median ({unit})") == medians
    theirs = [form.format(row["reference"]["median"] * factor) for row in rows]
    assert shown.under("Whole images", f"Eager PyTorch, float32, median ({unit})") == theirs
    ratios = [f"{row['speedup']:.2f}" for row in rows]
    assert shown.under("Whole images", "Eager PyTorch, float32: times ours (×)") == ratios
    memory = [f"{row['pss_bytes'] / 1e6:,.1f}" for row in rows]
    assert shown.under("Whole images", "Memory of the process, PSS (MB)") == memory
    header, *stages = shown.tables["Median of every stage, and its share of their sum"]
    assert [plain(cell) for cell in header] == ["Stage", f"batch 1 ({unit})", "share", f"batch 2 ({unit})", "share"]
    assert [plain(row[0]).split(",")[0] for row in stages] == [
        "Condition",
        *(f"Scale {k}" for k in range(4)),
        "Draw",
        "Finish",
        "Decode",
    ]
    digits = 2 if quick else 3
    assert stages[-1][1] == f"{rows[0]['stages']['decode'] * factor:,.{digits}f}"
    shares = [float(plain(row[2]).removesuffix(" %")) for row in stages]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))  # each rounded to a tenth
    plan = [f"{entry['total'] / 1e6:,.1f}" for entry in facts.inspection["memory"]]
    assert shown.under("Memory as planned for guided images (MB)", "All") == plan


# ---- its pictures ----------------------------------------------------------------------------------------------------


def test_samples_are_those_of_class_and_seed_and_carry_their_recipe(shown, facts, bundle, tmp_path):
    asked = [(label, seed) for label in (3, 2, 1) for seed in (0, 3)]
    seeds = [5 + [3, 2, 1].index(label) + seed for label, seed in asked]
    made = load(bundle).generate([label for label, _ in asked], seeds=seeds, **SETTINGS)
    pngs = shown.pngs("samples")
    assert [shot.png for row in facts.samples for shot in row] == pngs
    for png, image, recipe, picture in zip(pngs, made.images, made.recipes, shown.images["samples"], strict=True):
        np.testing.assert_array_equal(pixels(png), np.asarray(image))
        (tmp_path / "saved.png").write_bytes(png)
        assert recipes_from_png(tmp_path / "saved.png") == [recipe]
        assert picture["alt"] == f"Sample of {NAMES[recipe.label]}, seed {recipe.seed}"


def test_strips_end_in_the_image(shown, facts):
    pngs = shown.pngs("strips")
    assert len(pngs) == 3 * 4
    for index, row in enumerate(facts.samples):
        strip = [pixels(png) for png in pngs[4 * index : 4 * index + 4]]
        np.testing.assert_array_equal(strip[-1], pixels(row[0].png))
        assert all((before != after).any() for before, after in pairwise(strip))
    assert plain(shown.images["strips"][1]["alt"]) == f"{NAMES[3]} after scale 1, 2 × 2"


def test_edits_mark_their_region_and_are_those_of_the_library(shown, facts, bundle):
    pipe, editing = load(bundle), facts.editing
    given = pipe.generate([3], seeds=5, **SETTINGS).images[0]
    np.testing.assert_array_equal(pixels(editing.given), np.asarray(given))
    again_B3RR = pipe.reconstruct([given])
    error = np.square(again_B3RR[0] - np.asarray(given, np.float32).transpose(2, 0, 1) / 255).mean()
    assert editing.psnr == pytest.approx(-10 * np.log10(error), abs=1e-3)  # float32 sums
    asked: dict[str, Any] = {"labels": [3, 2, 1], "seeds": 5, **SETTINGS}
    expected = [
        pipe.edit([given], box=(0.5, 0, 1, 1), **asked),
        pipe.edit([given], box=(0.25, 0.25, 0.75, 0.75), mode="outpaint", **asked),
        pipe.vary([given], from_scale=2, **asked),
    ]
    for edit, made in zip(editing.edits, expected, strict=True):
        for shot, image in zip(edit.shots, made.images, strict=True):
            np.testing.assert_array_equal(pixels(shot.png), np.asarray(image))
    regions = [values["style"] for _, values in shown.tags if (values.get("class") or "").startswith("region")]
    assert regions == ["top:50%;left:0%;bottom:0%;right:0%", "top:25%;left:25%;bottom:25%;right:25%"]
    assert len(shown.images["editing"]) == 2 + 3 * 4
    assert f"{editing.psnr:.1f} dB" in plain(shown.text["editing"])


# ---- its commands ----------------------------------------------------------------------------------------------------


def test_commands_make_the_pictures_again(shown, facts, bundle, tmp_path, monkeypatch):
    """As they stand on the page, in a directory that holds the bundle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / bundle.name).symlink_to(bundle)
    lines = {command.what: command.text for command in facts.commands}
    assert all(text in shown.text["again"] for text in lines.values())

    def run(line: str) -> None:
        program, *arguments = words(line)
        assert program == "var-deploy"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output or done.exception

    for what in ("The given picture", "Its reconstruction", "In-painting", "Variation", "Coarse to fine"):
        run(lines[what])
    loop = re.fullmatch("for seed in (.*); do\n(.*)\ndone", lines["Samples"], re.DOTALL)
    for seed in loop[1].split():
        run(loop[2].replace('"$seed"', seed))
    editing = facts.editing
    for name, png in (("given", editing.given), ("reconstructed", editing.reconstruction)):
        np.testing.assert_array_equal(pixels((tmp_path / f"{name}.png").read_bytes()), pixels(png))
    inpaint, _, vary = editing.edits
    made: list[tuple[str, tuple[Shot, ...]]] = [("inpaint", inpaint.shots), ("vary", vary.shots)]
    made += [("samples", tuple(row[column] for row in facts.samples)) for column in (0, 1)]
    for directory, shots in made:
        for shot in shots:
            (path,) = (tmp_path / directory).glob(f"*_seed{shot.seed}.png")
            np.testing.assert_array_equal(pixels(path.read_bytes()), pixels(shot.png))
    with Image.open("steps.gif") as steps:
        assert steps.n_frames == 4


def test_commands_say_the_options_that_were_given(facts, bundle):
    lines = {command.what: words(command.text) for command in facts.commands}
    engine = ["--engine", "onnx", "--threads", "1", "--no-cache"]
    timed = ["--batch", "2", "--batch", "1", "--repeats", "1"]
    files = ["--var", "var.safetensors", "--vae", "vae.safetensors"]
    program = ["var-deploy", "report", bundle.name, "--class", "it's two"]
    assert lines["This page"] == [*program, *files, *timed, *SAID, *engine, "--out", "report.html"]
    assert lines["Latency and memory"] == ["var-deploy", "bench", bundle.name, *timed, *engine]
    assert lines["Parity and fidelity"] == ["var-deploy", "verify", bundle.name, *files, "--engine", "onnx"]
    # Class 7 is said by its name: "7" is what class 1 is called.
    manifest = load(bundle).bundle.manifest
    assert again.class_options([7, 1, 3], manifest) == ["--class", "class & 7", "--class", "1", "--class", "3"]
    assert max(len(line) for command in facts.commands for line in command.text.splitlines()) <= again.WIDTH + 4


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (EngineChoice(), ""),
        (EngineChoice(cache=False, threads=2, memory_limit="4GB"), "--no-cache --threads 2 --memory-limit 4GB"),
        (EngineChoice(engine="torch", compile_decoder=True), "--engine torch --compile-decoder"),
        (SamplingChoice(guidance="0,0.5,1", smooth=True, smooth_scales=None), "--guidance 0,0.5,1 --smooth"),
    ],
)
def test_options_are_said_as_they_were_given(choice, expected):
    assert " ".join(said(choice)) == expected


# ---- what may be missing ---------------------------------------------------------------------------------------------


def test_a_part_that_fails_is_a_sentence_and_the_rest_is_there(bundle, monkeypatch):
    def failing(error: VarDeployError) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        return fail

    def request(self: Pipeline, labels: Any, **options: Any) -> Any:
        raise EngineError(f"loading {bundle / 'decoder.onnx'}: failed\nfor good")

    monkeypatch.setattr(gather, "bench", failing(RequestError("half_reference: for a CPU")))
    monkeypatch.setattr(Pipeline, "generate", request)
    var = bundle.parent / "private" / "var.pth"
    found = gather.gather(
        bundle,
        load,
        gather.Asked(sampling={}, private=[var]),
        verify=failing(CheckpointError(f"{var}: damaged or truncated")),
    )
    drawing = "loading tiny <i> & more/decoder.onnx: failed for good"
    assert found.missing == {
        "timing": "half_reference: for a CPU",
        "samples": drawing,
        "strips": drawing,
        "editing": drawing,
        "parity": "var.pth: damaged or truncated",
    }
    shown = Page(page.html(found))
    for part, why in found.missing.items():
        assert why in shown.text[part]
    assert shown.images == {}
    assert shown.pairs("What ran")["Engine"] == "onnx"
    assert [command.what for command in found.commands] == [
        "This page",
        "Configuration and memory plan",
        "Latency and memory",
    ]


def test_without_checkpoints_and_reference_the_page_says_so(facts):
    rows = [{**row, "reference": None, "reference_how": None, "speedup": None} for row in facts.bench["rows"]]
    bare = replace(facts, parity=None, load=0.2, bench={**facts.bench, "rows": rows})
    shown = Page(page.html(bare))
    assert "Other work shared the machine" not in shown.text["timing"]
    busy = Page(page.html(replace(bare, load=2.34)))
    assert "Other work shared the machine (load 2.3 before the start)" in busy.text["timing"]
    assert "Not checked: give --var and --vae." in shown.text["parity"]
    assert "not checked" in shown.text[""]
    assert "PyTorch is not installed here" in shown.text["timing"]
    assert not any("PyTorch" in row[0] for row in shown.tables["Whole images"])
    asked_without = Page(page.html(replace(bare, reference_asked=False)))
    assert "PyTorch" not in asked_without.text["timing"]
    rows = [{**row, "failed": {"half_reference": "OutOfMemoryError: <much>"}} for row in rows]
    failed = Page(page.html(replace(bare, bench={**facts.bench, "rows": rows})))
    assert "Batch 2: half reference not timed: OutOfMemoryError: <much>" in failed.text["timing"]


def inexact(facts: Facts) -> Facts:
    return replace(facts, engine=replace(facts.engine, precision="int8", exact=False))


def test_the_gate_of_the_manifest_where_nothing_was_compared(facts):
    noted = {"passed": False, "mean_kl": 0.02, "token_agreement": 0.987, "decoder_psnr": None, "decoder_ssim": "high"}
    noted["digits"] = {"accuracy": 0.981, "reference_accuracy": 0.999}
    shown = Page(page.html(replace(inexact(facts), parity=None, fidelity=noted)))
    assert [[plain(cell) for cell in row] for row in shown.tables["Fidelity gate"][1:]] == [
        ["Largest mean KL of a scale (nats)", "2.0e-2", "not noted"],
        ["Least share of equal tokens", "98.70 %", "not noted"],
        ["Samples seen as their digit", "98.1 %", "reference 99.9 %"],
    ]
    assert "by an earlier verify: not passed." in shown.text["fidelity"]
    assert "Not compared in this call" in shown.text["parity"]
    unknown = Page(page.html(replace(inexact(facts), parity=None)))
    assert "Not measured: int8 is approximate" in unknown.text["fidelity"]


def test_the_gate_that_was_measured_here_with_its_limits(facts):
    parity = {**facts.parity, "exact": False, "passed": False, "precision": "int8", "reconstruction_loss": 0.75}
    parity["decoder_psnr"] = {"static": 50.0, "symbolic": float("nan")}
    shown = Page(page.html(replace(inexact(facts), parity=parity)))
    gate = {row[0]: row[1:] for row in shown.tables["Fidelity gate"]}
    largest = max(row["mean_kl"] for rows in parity["scales"].values() for row in rows)
    assert float(gate["Largest mean KL of a scale (nats)"][0]) == float(f"{largest:.1e}")
    assert gate["Reconstruction worse by (dB)"] == ["0.75", "at most 0.5"]
    assert gate["Decoder (dB)"] == ["nan", "at least 40"]
    assert "FAILED, measured in this call" in " ".join(shown.text["fidelity"].split())
    assert "FAILED" in shown.text[""]


def test_a_device_has_lines_of_its_own(facts):
    spread = facts.bench["rows"][0]["seconds"]
    rows = [
        {**row, "device_seconds": spread, "device_peak_bytes": 2_500_000, "joules_per_image": 1.25, "parts": 2}
        for row in facts.bench["rows"]
    ]
    gpu = {"name": "GPU <x>", "driver": "1.2", "cuda_runtime": None, "memory_bytes": 80_000_000_000}
    on_gpu = replace(facts.engine, name="torch", device="cuda:0", decoder=None, threads=None)
    shown = Page(page.html(replace(facts, engine=on_gpu, bench={**facts.bench, "rows": rows, "gpu": gpu})))
    assert {key: plain(value) for key, value in shown.pairs("Machine").items()}["GPU memory"] == "80.0 GB"
    assert shown.pairs("Machine")["GPU"] == "GPU <x>"
    assert shown.under("Whole images", "Memory on the device, peak (MB)") == ["2.5", "2.5"]
    assert shown.under("Whole images", "Energy of the GPU for an image (J)") == ["1.25", "1.25"]
    assert shown.under("Whole images", "Parts that the batch ran in") == ["2", "2"]
    assert "CUDA events around the replayed graph" in shown.text["timing"]
    launched = facts.inspection["torch"]["memory"]
    planned = [f"{entry['total'] / 1e6:,.1f}" for entry in launched]
    assert shown.under("Memory as planned for guided images (MB)", "All") == planned
    assert tables.memory_plan(replace(facts, engine=replace(on_gpu, name="tensorrt"))) is None


def test_a_picture_of_the_user_is_edited_and_named(bundle, facts):
    picture = Image.linear_gradient("L").resize((90, 70)).convert("RGB")
    asked = gather.Asked(classes=[3], per_class=1, sampling=SETTINGS, picture=picture, picture_name="my <photo>.jpg")
    parts = gather._Parts(load(bundle), asked, [3], lambda _: None)
    editing = parts.editing()
    assert pixels(editing.given).shape == (64, 64, 3)
    assert abs(int(pixels(editing.given)[32, 32, 0]) - int(np.asarray(picture)[35, 45, 0])) < 4  # its middle square
    own = replace(facts, editing=editing)
    assert "my <photo>.jpg" in Page(page.html(own)).text["editing"]
    said_again = again.commands(
        "b",
        load(bundle).bundle.manifest,
        again.Spoken(),
        engine="onnx",
        samples=None,
        strips=None,
        editing=editing,
    )
    assert "The given picture" not in [command.what for command in said_again]
    (line,) = [command.text for command in said_again if command.what == "Out-painting"]
    assert words(line)[:5] == ["var-deploy", "edit", "b", "my <photo>.jpg", "--box"]


def test_a_region_on_odd_tokens_is_told_in_whole_tokens():
    region_hh = np.zeros((5, 5), dtype=np.float32)
    region_hh[1:4, 2:] = 1
    assert gather._bounds(region_hh) == (0.2, 0.4, 0.8, 1.0)
    edit = Edit(kind="inpaint", box=gather._bounds(region_hh), from_scale=None, shots=())
    assert edit.box == (0.2, 0.4, 0.8, 1.0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (numbers.seconds(7.2567), "7.26 s"),
        (numbers.seconds(0.0575), "57.5 ms"),
        (numbers.seconds(0.00431), "4.31 ms"),
        (numbers.size(999), "999 bytes"),
        (numbers.size(21_264_468), "21.3 MB"),
        (numbers.small(4.84e-6), "4.8e-6"),
        (numbers.small(0.0), "0"),
        (numbers.small(float("nan")), "not finite"),
        (numbers.share(0.98765), "98.77 %"),
        (numbers.by_scale([0.9, 0.9]), "0.9"),
        (numbers.by_scale([0.0, 1.25, 900]), "0, 1.25, 900"),
    ],
)
def test_numbers_have_their_unit(value, expected):
    assert plain(value) == expected


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_one_page(bundle, tmp_path):
    out = tmp_path / "new" / "page.html"
    options = [
        "--class",
        "0",
        "--per-class",
        1,
        "--batch",
        1,
        "--repeats",
        1,
        "--no-reference",
        "--seed",
        4,
        "--no-cache",
    ]
    command = [sys.executable, "-m", "var_deploy.cli", "report", bundle, *options, *SAID, "--threads", 1, "--out", out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert "missing" not in done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    shown = Page(out.read_text(encoding="utf-8"))
    expected = load(bundle).generate([0], seeds=4, **SETTINGS).images[0]
    (sample,) = shown.pngs("samples")
    np.testing.assert_array_equal(pixels(sample), np.asarray(expected))
    said_again = " ".join(shown.text["again"].replace("\\\n", "").split())
    assert "--class 0 --per-class 1 --seed 4 --batch 1 --repeats 1 --no-reference --guidance" in said_again
    assert "Not checked: give --var and --vae." in shown.text["parity"]


def test_the_command_compares_as_verify_does_and_tells_what_failed(bundle, facts, tmp_path, monkeypatch):
    """How it asks, without running anything again."""
    heard: list[Any] = []

    class Found:
        def to_dict(self) -> dict[str, Any]:
            return {**facts.parity, "passed": False}

    def verify(*paths: Path, **options: Any) -> Found:
        heard.append((paths, {key: value for key, value in options.items() if key != "progress"}))
        return Found()

    def instead(path: Path, load: Any, asked: gather.Asked, *, verify: Any, progress: Any) -> Facts:
        assert asked.spoken.checkpoints == ("--var", "v.pth", "--vae", "a.pth")
        assert asked.spoken.verify == ("--device", "cpu")
        return replace(facts, parity=verify("onnx"), missing={"timing": "why [not]"})

    monkeypatch.setattr("var_export.verify.verify_bundle", verify)
    monkeypatch.setattr(gather, "gather", instead)
    for name in ("v.pth", "a.pth"):
        (tmp_path / name).touch()
    files = ["--var", str(tmp_path / "v.pth"), "--vae", str(tmp_path / "a.pth")]
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(bundle), "--out", str(out), "--device", "cpu", *files])
    assert done.exit_code == 0, done.exception
    asked = {"engine": "onnx", "device": "cpu", "precision": "auto"}
    assert heard == [((bundle, tmp_path / "v.pth", tmp_path / "a.pth"), asked)]
    assert "timing is missing: why [not]" in done.stderr
    assert "comparison with the checkpoints FAILED" in done.stderr
    assert "FAILED" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (["--var", "x"], RequestError, "report: got --var alone; give --var and --vae, or neither"),
        (["--var", "x", "--vae", "y"], RequestError, "x: is not there; give a checkpoint file, or neither --var nor"),
        (["--picture", "words.txt"], RequestError, "words.txt: no picture format"),
        (["--class", "10"], RequestError, "class 10 is out of range; expected an id from 0 to 9"),
        (["--class", "none"], RequestError, "class 'none' is unknown; this bundle knows zero, 7,"),
        (["--class", "1", "--per-class", "61"], RequestError, "samples: 61 of 1 classes, expected from 1 to 60 in all"),
        (["--seed", "-1"], RequestError, "seeds: got -1, expected integers from 0 to 2⁶⁴ − 1"),
        (["--top-p", "2"], RequestError, "top_p: got 2.0, expected a number from 0 to 1"),
        (["--engine", "warp"], EngineError, "unknown engine 'warp'; known: auto, onnx, torch, tensorrt"),
    ],
    ids=lambda value: "_".join(value[:1]).replace("--", "") if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_line_and_nothing_is_written(bundle, tmp_path, monkeypatch, options, kind, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("no picture")
    done = CliRunner().invoke(app, ["report", str(bundle), "--out", "new/page.html", *options])
    assert type(done.exception) is kind
    assert str(done.exception).startswith(message)
    assert [path.name for path in tmp_path.rglob("*")] == ["words.txt"]


def test_a_place_that_cannot_be_written_and_a_bundle_that_is_none(tmp_path, monkeypatch):
    done = CliRunner().invoke(app, ["report", "none", "--out", str(tmp_path)])
    assert str(done.exception) == f"{tmp_path}: got a directory, expected a file name; add one"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--out", str(tmp_path / "x.html")])
    assert type(done.exception) is BundleError
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "var_deploy.quality_report.page")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "none"), "--out", str(tmp_path / "x.html")])
    assert str(done.exception) == "this command needs jinja2; pip install 'var-deploy[report]'"
    assert list(tmp_path.iterdir()) == []
