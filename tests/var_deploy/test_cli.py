"""The command line as its users run it: exit status, what is printed and what is left on disk.

Every command runs once or more as a process of its own; the many ways to ask for something run in this process, by the
same entry point, since a start takes seconds.
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from typer.testing import CliRunner

import var_deploy
from var_deploy.cli import app, main
from var_deploy.images import image_grid

FIXED = ["--guidance", "2.5", "--top-k", "60", "--top-p", "0.9"]
SETTINGS = {"guidance": 2.5, "top_k": 60, "top_p": 0.9}

Run = Callable[..., subprocess.CompletedProcess[str]]


def _process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The program, started."""
    command = [sys.executable, "-m", "var_deploy.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def _here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Its entry point, called; what else than SystemExit comes out of it fails the test, as a trace would."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    on_sigterm, handlers, level = signal.getsignal(signal.SIGTERM), list(logging.root.handlers), logging.root.level
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["var-deploy", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)
            logging.root.handlers[:] = handlers
            logging.root.setLevel(level)
    return subprocess.CompletedProcess(list(arguments), status, stdout.getvalue(), stderr.getvalue())


def _succeed(*arguments: object, run: Run = _here) -> str:
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "onnxruntime" not in result.stderr  # a warning would name it
    return result.stdout


def _fail(*arguments: object, run: Run = _here) -> str:
    """The one line on standard error of a command that fails."""
    result = run(*arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ---- export ----------------------------------------------------------------------------------------------------------


def test_export_writes_a_bundle_with_class_names_and_license(tiny_pair, tmp_path):
    _, var, vae = tiny_pair
    names = [f"cipher {i}" for i in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n", encoding="utf-8")
    out = tmp_path / "made" / "bundle"
    options = ["--classes", tmp_path / "names.txt", "--license", "CC0"]
    said = _succeed("export", "--var", var, "--vae", vae, "--out", out, *options, run=_process)
    assert said.startswith(f"{out}: {len(list(out.iterdir()))} files, ")
    pipe = var_deploy.load(out)
    assert pipe.bundle.manifest.class_names == tuple(names)
    assert pipe.bundle.manifest.license == "CC0"
    assert pipe.bundle.manifest.source["var"]["file"] == var.name
    assert {path.name for path in out.parent.iterdir()} == {"bundle"}


def test_export_over_something_is_refused_and_leaves_it(tiny_pair, tmp_path):
    _, var, vae = tiny_pair
    out = tmp_path / "there"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    line = _fail("export", "--var", var, "--vae", vae, "--out", out)
    assert line == f"error: {out}: exists already; nothing is overwritten, choose another name or remove it"
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "mine.txt"]


def test_export_of_a_truncated_checkpoint_leaves_nothing(golden_pair, tmp_path):
    var, vae = golden_pair(tmp_path / "in", "tiny")
    var.write_bytes(var.read_bytes()[:-1000])
    line = _fail("export", "--var", var, "--vae", vae, "--out", tmp_path / "out", run=_process)
    assert f"{var}: damaged or truncated safetensors file" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_of_a_bundle_as_json(tiny_bundle):
    data = json.loads(_succeed("inspect", tiny_bundle, "--json", "--batch", 1, "--batch", 3))
    assert (data["kind"], data["image_size"], data["precision"]) == ("bundle", 64, "fp32")
    assert (data["var"]["depth"], data["vqvae"]["vocab_size"]) == (2, 256)
    weights = load_file(tiny_bundle / "weights.safetensors")
    assert sum(data["parameters"].values()) == sum(weight.size for weight in weights.values())
    assert data["files"]["weights.safetensors"] == (tiny_bundle / "weights.safetensors").stat().st_size
    assert [plan["batch"] for plan in data["memory"]] == [1, 3]
    # keys and values × 2 blocks × rows × 2 heads × 30 tokens × 64 × 4 bytes
    assert [plan["caches"] for plan in data["memory"]] == [2 * 2 * rows * 2 * 30 * 64 * 4 for rows in (2, 6)]


def test_inspect_plans_for_the_batch_that_runs_and_the_options_that_are_given(tiny_bundle):
    def plan(*options: object) -> dict[str, Any]:
        data = json.loads(_succeed("inspect", tiny_bundle, "--json", "--batch", 3, "--batch", 4, *options))
        found: dict[str, Any] = data["torch"]
        return found

    three, four = plan()["memory"]
    assert (three["batch"], three["runs_as"], four["runs_as"]) == (3, 4, 4)
    assert {**three, "batch": 4} == four
    sliced = plan("--decode-slice", 2)["memory"][0]
    assert sliced["decoder"] * 2 == three["decoder"]
    assert sliced["launches"]["decode"] == 2 * three["launches"]["decode"]
    smooth = plan("--smooth")
    assert smooth["smooth"] is True
    # weights of 16 tokens of the last scale × 256 entries × 4 bytes × 4 images
    assert smooth["memory"][0]["buffers"] - three["buffers"] == 16 * 256 * 4 * 4
    assert smooth["memory"][0]["launches"]["draw"] == 2 * three["launches"]["draw"]


@pytest.mark.parametrize("option", [["--smooth"], ["--decode-slice", "1"], ["--precision", "fp8"]], ids=lambda o: o[0])
def test_a_plan_that_needs_a_bundle_is_refused_for_a_checkpoint(tiny_pair, option):
    said = _fail("inspect", tiny_pair[1], *option)
    assert f"the torch engine's plan needs a bundle; export first, or leave out {option[0]}" in said


def test_inspect_of_a_bundle_for_people(tiny_bundle):
    said = _succeed("inspect", tiny_bundle, run=_process)
    for word in ("patch_nums", "weights.safetensors", "caches", "not stated", "runs here", "whole"):
        assert word in said


def test_inspect_of_a_checkpoint_as_json(shared_aln_pair):
    golden, var, _ = shared_aln_pair
    data = json.loads(_succeed("inspect", var, "--json"))
    assert data["kind"] == "checkpoint"
    assert data["size"] == var.stat().st_size
    assert data["var"]["patch_nums"] == golden.config["patch_nums"]
    assert data["var"]["shared_aln"] is True


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_one_picture_equals_python(tiny_bundle, tmp_path):
    out = tmp_path / "new" / "three.png"
    said = _succeed("generate", tiny_bundle, "--class", 3, "--seed", 17, *FIXED, "--out", out, run=_process)
    assert said.splitlines() == [str(out)]
    expected = var_deploy.load(tiny_bundle).generate([1, 3], seeds=[0, 17], **SETTINGS).images[1]
    np.testing.assert_array_equal(_pixels(out), np.asarray(expected))
    assert [path.name for path in out.parent.iterdir()] == ["three.png"]


@pytest.mark.parametrize(("graphs", "images_at_once"), [("static", 3), ("symbolic", 2)])
def test_generate_a_grid_and_an_animation_of_its_scales(tiny_bundle, tmp_path, graphs, images_at_once):
    out, gif = tmp_path / "grid.png", tmp_path / "steps.gif"
    classes = ["--class", 3, "--class", 7, "--class", 0]
    options = ["--guidance", "0,0.5,1,2.5", "--top-k", 60, "--top-p", 0.9, "--graphs", graphs, "--threads", 1]
    pipe = var_deploy.load(tiny_bundle, graphs=graphs, threads=1)
    options += ["--memory-limit", f"{pipe.engine.memory_plan(images_at_once, True).total / 1e3}K"]
    _succeed("generate", tiny_bundle, *classes, "--seed", 5, *options, "--out", out, "--steps-gif", gif)
    expected = pipe.generate([3, 7, 0], seeds=5, guidance=[0, 0.5, 1, 2.5], top_k=60, top_p=0.9).images
    np.testing.assert_array_equal(_pixels(out), np.asarray(image_grid(expected)))
    with Image.open(gif) as animation:
        assert (animation.n_frames, animation.size) == (4, image_grid(expected).size)
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "steps.gif"}


def test_generate_into_a_directory_names_class_and_seed(tiny_bundle, tmp_path):
    out = tmp_path / "pictures"
    _succeed("generate", tiny_bundle, "--class", 3, "--class", 7, "--seed", 5, "--smooth", "--out", out)
    expected = var_deploy.load(tiny_bundle).generate([3, 7], seeds=5, smooth=True).images
    assert sorted(path.name for path in out.iterdir()) == ["000_3_seed5.png", "001_7_seed6.png"]
    for path, image in zip(sorted(out.iterdir()), expected, strict=True):
        np.testing.assert_array_equal(_pixels(path), np.asarray(image))


def test_the_torch_engine_writes_the_picture_of_the_onnx_engine(tiny_bundle, tmp_path):
    options = ["--class", 3, "--class", 5, "--seed", 17, *FIXED, "--temperature", 1.5, "--device", "cpu"]
    torch_options = ["--engine", "torch", "--precision", "fp32", "--decode-slice", 1]
    gif = tmp_path / "steps.gif"
    for name, more in (("onnx", ["--engine", "onnx"]), ("torch", [*torch_options, "--steps-gif", gif])):
        _succeed("generate", tiny_bundle, *options, *more, "--out", tmp_path / f"{name}.png")
    pictures = [_pixels(tmp_path / f"{name}.png").astype(int) for name in ("onnx", "torch")]
    # Pixels differ by rounding, which may move one across half a step.
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    pipe = var_deploy.load(tiny_bundle, engine="onnx")
    expected = image_grid(pipe.generate([3, 5], seeds=17, temperature=1.5, **SETTINGS).images)
    np.testing.assert_array_equal(pictures[0], np.asarray(expected))
    other = image_grid(pipe.generate([3, 5], seeds=17, **SETTINGS).images)
    assert np.abs(pictures[0] - np.asarray(other)).max() > 10  # the temperature was heard
    with Image.open(gif) as animation:
        assert (animation.n_frames, animation.size) == (4, expected.size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "onnx", "--device", "cuda", "--threads", "1"], "engine 'onnx' on a GPU has no option threads"),
        (["--device", "tpu"], "unknown device 'tpu'; known: auto, cpu, cuda, cuda:N"),
        (["--precision", "fp4"], "unknown precision 'fp4'; known: auto, fp32, fp16, bf16, int8, fp8"),
        (["--engine", "onnx", "--precision", "bf16"], "engine 'onnx': the bundle is fp32, got precision 'bf16'; "),
        (["--engine", "onnx", "--compile-decoder"], "engine 'onnx' has no option compile_decoder; leave it out"),
        (["--engine", "onnx", "--decode-slice", 2], "engine 'onnx' has no option decode_slice; leave it out"),
        (["--engine", "torch", "--threads", 2], "engine 'torch' has no option threads; leave it out"),
        (["--engine", "onnx", "--threads", 99999], "threads: got 99999, this process may use "),
        (["--engine", "onnx", "--memory-limit", "2 GBs"], "memory limit: got '2 GBs', expected megabytes or a size"),
        (["--engine", "onnx", "--memory-limit", 7], "7 MB are allowed by memory_limit; raise memory_limit, set gui"),
        (["--engine", "onnx", "--temperature", 0], "temperature: got 0.0, expected a number from 0.001 to 1000"),
        (["--engine", "onnx", "--temperature", "nan"], "temperature: got nan, expected a number from 0.001 to 1000"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "_".join(map(str, value)).replace("--", ""),
)
def test_a_wrong_engine_option_is_one_line_and_leaves_nothing(tiny_bundle, tmp_path, options, message):
    assert message in _fail("generate", tiny_bundle, "--class", 1, *options, "--out", tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_one_line(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # there is none, wherever this runs
    for options in (["--engine", "torch", "--device", "cuda"], ["--device", "cuda:1"]):
        line = _fail("generate", tiny_bundle, "--class", 1, *options, "--out", tmp_path / "x.png", run=_process)
        assert line.endswith(" sees no GPU; use device 'cpu'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class", 10, "--out", "x.png"], "class 10 is out of range; expected an id from 0 to 9"),
        (["--class", "²", "--out", "x.png"], "class '²' is unknown; this bundle knows ids only (ids 0 to 9)"),
        (["--class", 1, "--seed", -1, "--out", "x.png"], "seeds: got -1, expected integers from 0 to 2⁶⁴ − 1"),
        (["--class", 1, "--guidance", "1,2", "--out", "x"], "guidance: 2 values, expected one, or one per scale (4)"),
        (
            ["--class", 1, "--guidance", "much", "--out", "x"],
            "guidance: got 'much', expected numbers like 0,0.5,1",
        ),
        (
            ["--class", 1, "--engine", "warp", "--out", "x.png"],
            "unknown engine 'warp'; known: auto, onnx, torch, tens",
        ),
        (
            ["--class", 1, "--out", "x.docx"],
            "x.docx: unknown picture format '.docx'; use .png, .jpg, .jpeg, .webp, or a directory name",
        ),
        (
            ["--class", 1, "--out", "x.png", "--steps-gif", "steps.mov"],
            "steps.mov: an animation is written as GIF; give a name that ends in .gif",
        ),
        (
            ["--class", 1, "--out", "occupied/x.png"],
            "occupied/x.png: cannot write (",
        ),
        (
            ["--class", 1, "--out", f"new/deeper/{'x' * 300}.png"],
            "cannot write (File name too long)",
        ),
    ],
    ids=[
        "class",
        "digit",
        "seed",
        "guidance-list",
        "guidance",
        "engine",
        "format",
        "gif",
        "not-a-directory",
        "too-long",
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(tiny_bundle, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").write_text("mine")
    assert message in _fail("generate", tiny_bundle, *options)
    assert [path.name for path in tmp_path.rglob("*")] == ["occupied"]


def test_a_changed_bundle_is_one_line_and_leaves_nothing(tiny_copy, tmp_path):
    (tiny_copy / "finish.onnx").unlink()
    line = _fail("generate", tiny_copy, "--class", 1, "--out", tmp_path / "x.png")
    assert line == f"error: {tiny_copy}: changed since export: finish.onnx is missing; copy or export it again"
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "b"],
        ["paint"],
        ["bench", "b", "--repeats", "0"],
        ["generate", "b", "--class", "1", "--out", "x.png", "--decode-slice", "0"],
        ["generate", "b", "--class", "1", "--out", "x.png", "--seed", "warm"],
    ],
    ids=lambda arguments: "_".join(arguments[:1] + arguments[-2:]).replace("--", ""),
)
def test_wrong_usage_exits_with_two(arguments):
    result = _here(*arguments)
    assert result.returncode == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.stderr


def test_inspecting_weights_that_are_no_safetensors_is_one_line(tiny_copy, reseal):
    (tiny_copy / "weights.safetensors").write_bytes(b"garbage of some length")
    reseal(tiny_copy, "weights.safetensors")
    assert f"{tiny_copy / 'weights.safetensors'}: " in _fail("inspect", tiny_copy)


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_verify_passes_for_the_checkpoints_a_bundle_came_from(tiny_bundle, tiny_pair):
    _, var, vae = tiny_pair
    data = json.loads(_succeed("verify", tiny_bundle, "--var", var, "--vae", vae, "--json", run=_process))
    assert data["passed"] is True
    assert data["labels"] == [0, 9]
    assert data["scales"].keys() == {"symbolic", "static"}
    for rows in data["scales"].values():
        assert [row["scale"] for row in rows] == [0, 1, 2, 3]
        assert max(row["logit_error"] for row in rows) < 1e-4  # as the golden vectors
        assert {row["token_agreement"] for row in rows} == {1.0}
    assert max(*data["pixel_error"].values(), data["reconstruction_error"]) < 1e-4
    assert data["encoded_token_agreement"] == 1.0


def test_verify_fails_for_one_nudged_weight_though_it_was_sealed_again(tiny_copy, tiny_pair, reseal):
    weights = tiny_copy / "weights.safetensors"
    with safe_open(weights, framework="np") as file:
        bias = file.get_tensor("head.bias")
    content = bytearray(weights.read_bytes())
    at = content.find(bias.tobytes())
    assert at > 0
    content[at : at + 4] = (bias[0] + np.float32(0.01)).tobytes()
    weights.write_bytes(content)
    reseal(tiny_copy, weights.name)
    _, var, vae = tiny_pair
    result = _here("verify", tiny_copy, "--var", var, "--vae", vae)
    assert result.returncode == 1
    assert "parity FAILED: logits 1.0e-02" in result.stdout


def test_verify_judges_a_lower_precision_by_the_fidelity_gate(tiny_bundle, tiny_pair):
    _, var, vae = tiny_pair
    options = ["--var", var, "--vae", vae, "--engine", "torch", "--device", "cpu", "--precision", "bf16"]
    said = _succeed("verify", tiny_bundle, *options)
    assert "torch engine, bf16, against the reference" in said
    (line,) = [line for line in said.splitlines() if "fidelity gate" in line]
    number = r"\d\.\de-\d\d"
    assert re.fullmatch(
        rf"fidelity gate passed: largest mean KL of a scale {number} \(limit 0\.01\), decoder [\d.]+ dB \(limit 40\), "
        r"SSIM [01]\.\d{4}, "
        r"reconstruction \d\.\d\d dB worse \(limit 0\.5\); whole images: [\d.]+% of tokens the best, 0 clearly not, "
        rf"pictures [\d.]+ dB; bf16 is approximate: logits {number}, encoder tokens [\d.]+% equal",
        line.strip(),
    )
    assert "parity" not in said


# ---- bench -----------------------------------------------------------------------------------------------------------


def test_bench_prints_one_json_object_with_the_reference_of_the_same_run(tiny_bundle, tmp_path):
    out = tmp_path / "new" / "bench.json"
    data = json.loads(_succeed("bench", tiny_bundle, "--repeats", 2, "--threads", 1, "--json", "--out", out))
    (row,) = data["rows"]
    assert row["batch"] == 1
    assert row["speedup"] > 0
    quantiles = {"median", "minimum", "maximum", "p10", "p90", "p99", "count"}
    assert row["reference"].keys() == row["seconds"].keys() == quantiles
    assert row["images_per_second"] == pytest.approx(1 / row["seconds"]["median"])
    assert {"condition", "scale_00", "draw", "finish", "decode"} <= row["stages"].keys()
    assert row["pss_bytes"] > 0
    assert data["machine"]["onnxruntime"]
    assert json.loads(out.read_text(encoding="utf-8")) == data
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]


def test_bench_for_people_names_machine_and_ratio(tiny_bundle, tmp_path):
    options = ["--repeats", 1, "--no-reference", "--batch", 2, "--threads", 1]
    said = _succeed("bench", tiny_bundle, *options, "--plot", tmp_path / "bench.png", run=_process)
    for word in ("images/s", "not run", "per stage: condition", "machine: processor"):
        assert word in said
    with Image.open(tmp_path / "bench.png") as image:
        assert image.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["bench.png"]


def test_bench_of_a_preset_makes_its_weights_and_sweeps_precisions(monkeypatch):
    from var_deploy.config import VARConfig, VQVAEConfig
    from var_export import random_bundle
    from var_train.presets import PRESETS

    both = {"patch_nums": (1, 2), "vocab_size": 61}
    var = VARConfig(**both, num_classes=5, depth=1, embed_dim=64, ffn_dim=256)
    monkeypatch.setitem(PRESETS, "small", (1, both["patch_nums"], False))
    monkeypatch.setattr(random_bundle, "preset_configs", lambda _: (var, VQVAEConfig(**both, ch=32, ch_mult=(1,))))
    options = ["--precision", "fp32", "--precision", "int8", "--repeats", "2", "--no-reference", "--no-stages"]
    done = CliRunner().invoke(app, ["bench", "--preset", "small", "--device", "cpu", *options, "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [(row["engine"], row["precision"]) for row in data["rows"]] == [("torch", "fp32"), ("torch", "int8")]
    assert (data["model"]["depth"], data["rows"][0]["stages"]) == (1, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench: got neither, expected either a bundle directory or --preset NAME"),
        (["b", "--preset", "d16"], "bench: got both, expected either a bundle directory or --preset NAME"),
        (["--preset", "d17"], "unknown preset 'd17'; known: d12, d16, d20, d24, d30, d36-s"),
        (["--preset", "d16", "--engine", "onnx"], "engine 'onnx' runs graphs from files, random weights have none"),
        (["--preset", "d16", "--threads", "1"], "a preset runs on engine 'torch', without options graphs, decoder,"),
        (["--preset", "d16", "--precision", "fp12"], "unknown precision 'fp12'; known: auto, fp32, fp16, bf16, int8"),
        (["b", "--plot", "x.jpg"], "x.jpg: unknown plot format '.jpg'; use .png, .svg, .pdf"),
    ],
    ids=["neither", "both", "preset", "onnx", "threads", "precision", "plot"],
)
def test_a_wrong_bench_is_one_line(arguments, message):
    assert message in _fail("bench", *arguments)


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_a_result_that_could_not_be_written_is_refused_before_anything_is_timed(tmp_path, option):
    """The bundle does not exist, which would be noticed next."""
    (tmp_path / "file").touch()
    (tmp_path / "dir.png").mkdir()
    refusals = {
        "dir.png": "got a directory, expected a file name; add one",
        "file/x.png": f"cannot write (Not a directory: {tmp_path / 'file'}); choose another place",
    }
    for name, message in refusals.items():
        assert f"{tmp_path / name}: {message}" in _fail("bench", tmp_path / "none", option, tmp_path / name)


def test_the_installed_program_is_the_same_command_line():
    program = Path(sys.executable).with_name("var-deploy")
    found = shutil.which(str(program)) or shutil.which("var-deploy")
    assert found, "var-deploy is not installed beside this Python"
    result = subprocess.run([found, "--help"], capture_output=True, text=True, check=True)
    for command in ("export", "triton-repo", "inspect", "generate", "verify", "bench"):
        assert command in result.stdout


# ---- cache -----------------------------------------------------------------------------------------------------------


def test_the_cache_is_listed_and_cleared(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = tmp_path / "var-deploy"
    assert _succeed("cache", run=_process) == f"{directory}: 0 entries, 0.0 MB\n"
    entry = directory / "scales-1234"
    entry.mkdir(parents=True)
    (entry / "weights").write_bytes(bytes(1_234_567))
    assert _succeed("cache") == f"scales-1234: 1.2 MB\n{directory}: 1 entries, 1.2 MB\n"
    assert entry.is_dir()
    assert _succeed("cache", "--clear").endswith("1 entries, 1.2 MB\ndeleted\n")
    assert not entry.exists()
