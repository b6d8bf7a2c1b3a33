"""The command line of training: `python -m var_train` and `var-deploy train`, from images to a bundle with class names.

Most commands run in this process; some in one of their own, where what a user sees is all that there is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("pydantic")
pytest.importorskip("tensorboard")

import var_deploy.cli
from var_deploy.bundle import Bundle
from var_deploy.config import ConfigError
from var_deploy.errors import DataError, EngineError
from var_train import command
from var_train.checkpoint import load_vqvae
from var_train.image_data import Crop, GlobalBatches
from var_train.image_files import open_images
from var_train.setup import frozen_vqvae
from var_train.token_files import open_tokens
from var_train.token_sources import EncodedImages

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
CLASSES = ["across", "down", "slanting"]
COMMANDS = ("vqvae", "var", "tokens", "scaling-law")
QUICK = {"optimiser.iterations": 2, "keeping.checkpoint_every": 2, "keeping.pictures": 1}


def invoked(app: Any, *arguments: object) -> str:
    """What a command that succeeds prints."""
    options = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, options, catch_exceptions=False, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.output


def started(*arguments: object) -> subprocess.Popen[str]:
    """Python in a process of its own."""
    places = os.pathsep.join(str(ROOT / folder) for folder in ("", "export", "kernels", "train"))
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def trained(vqvae_toml: Any, var_toml: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a VQVAE run and of a VAR run on it; read only."""
    folder = tmp_path_factory.mktemp("trained")
    toml = vqvae_toml(folder, **QUICK)
    assert invoked(command.app, "vqvae", toml, "--out", folder / "vqvae") == f"{folder}/vqvae/vqvae.safetensors\n"
    toml = var_toml(folder, **QUICK, **{"model.vqvae": str(folder / "vqvae" / "vqvae.safetensors")})
    assert invoked(command.app, "var", toml, "--out", folder / "var") == f"{folder}/var/var.safetensors\n"
    return folder / "vqvae", folder / "var"


# ---- help, usage, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_the_commands(arguments):
    for app, before in ((command.app, []), (var_deploy.cli.app, ["train"])):
        result = CliRunner().invoke(app, [*before, *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
        for name in COMMANDS:
            assert name in result.output
        assert "Train a VQVAE and a VAR on images of your own." in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_lists_its_options(name):
    options = {
        "tokens": (
            "--vqvae",
            "--out",
            "--patch-nums",
            "--passes",
            "--split",
            "--flip",
            "--centre",
            "--enlarge",
            "--seed",
        ),
        "scaling-law": ("--plot", "--json"),
    }.get(name, ("--out", "--set", "CONFIG", "NAME=VALUE"))
    outputs = [
        invoked(command.app, name, "--help"),
        invoked(var_deploy.cli.app, "train", name, "--help"),
    ]
    for output in outputs:
        for option in options:
            assert option in output
    assert "var-deploy train " + name in outputs[1]


def test_var_deploy_names_the_command():
    assert "vqvae, var, tokens, scaling-law" in invoked(var_deploy.cli.app, "--help")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["diffusion"], "No such command 'diffusion'"),
        (["var", "x.toml", "--out", "run", "--epochs", "3"], "No such option: --epochs"),
        (["vqvae", "x.toml"], "Missing option '--out'"),
        (["tokens", "images", "--vqvae", "x", "--out", "y", "--passes", "0"], "'--passes'"),
    ],
)
def test_wrong_usage_ends_with_2(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for app, before in ((command.app, []), (var_deploy.cli.app, ["train"])):
        result = CliRunner().invoke(app, [*before, *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 2
        assert said in result.output
    assert list(tmp_path.iterdir()) == []


def said_by_main(main: Callable[[], None], arguments: list[str], monkeypatch: Any, capsys: Any) -> str:
    """The only line of a command that ends with 1."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return str(line)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "optimiser.epoch=3",
            "optimiser.epoch: got 3, unknown key; known: iterations, epochs, learning_rate, base",
        ),
        ("optimiser.clip", "option 'optimiser.clip': expected NAME=VALUE, like optimiser.epochs=10; write it so"),
        ("data.batch=0", "data.batch: got 0, Input should be greater than or equal to 1; mend the file or the option"),
        ("data.batch=100", "got 72 images, expected at least the 100 of a global batch; add images or make the batch"),
    ],
)
@pytest.mark.parametrize("kind", ["var", "vqvae"])
def test_a_mistake_is_one_line(var_toml, vqvae_toml, tmp_path, monkeypatch, capsys, kind, option, message):
    toml, out = (var_toml if kind == "var" else vqvae_toml)(tmp_path), tmp_path / "run"
    arguments = [kind, str(toml), "--out", str(out), "--set", option]
    line = said_by_main(command.main, arguments, monkeypatch, capsys)
    assert message in line
    assert said_by_main(var_deploy.cli.main, ["train", *arguments], monkeypatch, capsys) == line
    assert not out.exists()


def test_several_options_win_over_the_file(vqvae_toml, small_images, tmp_path):
    toml = vqvae_toml(tmp_path, **{"data.path": "nowhere", **QUICK})
    options = ["--set", f"data.path={small_images}", "--set", "optimiser.iterations=1", "--set", "loss.adversarial=0"]
    invoked(var_deploy.cli.app, "train", "vqvae", toml, "--out", tmp_path / "run", *options)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["iterations"], record["configuration"]["data"]["path"]) == (1, str(small_images))


def test_in_processes_of_their_own_mistakes_are_one_line_too(warm, var_toml, tmp_path):
    toml, out = var_toml(tmp_path, **{"model.depht": 2}), tmp_path / "run"
    by_var_deploy = started("-m", "var_deploy.cli", "train", "var", toml, "--out", out)
    without = "import runpy, sys; sys.modules['pydantic'] = None; runpy.run_module('var_train', run_name='__main__')"
    missing = started("-c", without)
    by_torchrun = warm.run("var", toml, "--out", out)
    line = (
        f"error: {toml}: model.depht: got 2, unknown key; known: vqvae, patch_nums, preset, depth, heads, shared_aln, "
        "drop_path, label_dropout, gamma_scale, using_znorm, start_from; mend the file or the option\n"
    )
    assert (by_torchrun.status, by_torchrun.stdout, by_torchrun.stderr) == (1, "", line)
    assert by_var_deploy.communicate(timeout=240) == ("", line)
    assert by_var_deploy.returncode == 1
    assert not out.exists()
    assert missing.communicate(timeout=240) == ("", "error: training needs pydantic; pip install 'var-deploy[train]'\n")
    assert missing.returncode == 1


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    for name in ("command", "configuration"):
        monkeypatch.delitem(sys.modules, f"var_train.{name}")
    with pytest.raises(EngineError, match=r"^this command needs pydantic; pip install 'var-deploy\[train\]'$"):
        CliRunner().invoke(var_deploy.cli.app, ["train", "--help"], catch_exceptions=False)


# ---- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_are_stored_as_asked(small_images, small_vqvae, tmp_path):
    out = tmp_path / "deeper" / "tokens"
    options = ["--passes", 3, "--flip", "--enlarge", 1.5, "--batch", 7, "--workers", 0, "--seed", 5]
    said = invoked(command.app, "tokens", small_images, "--vqvae", small_vqvae, "--out", out, *options)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert said == (f"{out}: 72 images, 3 pass(es), 3 shard(s), {size / 1e6:.1f} MB, 0 images that cannot be decoded\n")
    tokens, vqvae = open_tokens(out), frozen_vqvae(small_vqvae, None, CPU)
    assert (tokens.passes, tokens.seed, tokens.class_names) == (3, 5, tuple(CLASSES))
    assert tokens.crop == Crop(side=8, random=True, flip=True, enlarge=1.5)
    assert tokens.config == load_vqvae(small_vqvae)[0]
    images = open_images(small_images)
    source = EncodedImages(images, tokens.crop, vqvae, device=CPU, at_once=8, workers=0, seed=5)
    batches = GlobalBatches(count=72, size=8, seed=5)
    for iteration in (0, 10, 25):  # of the first, second and third epoch
        batch = next(source.training(batches, slice(0, 8), iteration))
        epoch, indices_B = batches.indices(iteration)
        assert epoch == iteration // 9
        stored_BL, labels_B = tokens.read(epoch, indices_B)
        assert torch.equal(batch.tokens_BL, stored_BL)
        assert torch.equal(batch.labels_B, labels_B)


def test_tokens_of_validation_images_are_cropped_in_the_middle(small_images, small_vqvae, tmp_path):
    options = ["--split", "val", "--centre", "--workers", 0]
    invoked(command.app, "tokens", small_images, "--vqvae", small_vqvae, "--out", tmp_path / "val", *options)
    tokens, vqvae = open_tokens(tmp_path / "val"), frozen_vqvae(small_vqvae, None, CPU)
    assert tokens.crop == Crop(side=8, random=False, flip=False, enlarge=1.125)
    source = EncodedImages(
        open_images(small_images, split="val"), tokens.crop, vqvae, device=CPU, at_once=18, workers=0, seed=0
    )
    (batch,) = source.evaluation(18)
    assert torch.equal(batch.tokens_BL, tokens.read(0, np.arange(18))[0])


def test_images_that_cannot_be_decoded_are_counted_and_named(small_images, small_vqvae, tmp_path):
    images = Path(shutil.copytree(small_images / "val", tmp_path / "images"))
    damaged = [images / "across" / "05.png", images / "down" / "02.png"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    options = ["--vqvae", small_vqvae, "--out", tmp_path / "tokens", "--passes", 2, "--workers", 0]
    assert "2 images that cannot be decoded" in invoked(command.app, "tokens", images, *options)
    tokens = open_tokens(tmp_path / "tokens")
    assert (len(tokens), tokens.corrupt) == (18, tuple(map(str, damaged)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            ["--patch-nums", "1,two"],
            ConfigError,
            r"^--patch-nums: got '1,two', expected sides of the scales, like 1,2,3,4$",
        ),
        (["--split", "test"], DataError, r"got no split 'test', expected a folder of this name beside train; add it$"),
        (["--out", "taken"], DataError, r"^taken: exists, expected a new name; choose another, or remove it$"),
    ],
)
def test_mistakes_in_storing_tokens_are_one_line(
    small_images, small_vqvae, tmp_path, monkeypatch, options, error, message
):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    arguments = ["tokens", small_images, "--vqvae", small_vqvae, "--out", "tokens", "--workers", "0", *options]
    with pytest.raises(error, match=message):
        CliRunner().invoke(command.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# ---- scaling law, bundles --------------------------------------------------------------------------------------------


def test_one_run_has_no_scaling_law(trained, monkeypatch, capsys):
    line = said_by_main(command.main, ["scaling-law", str(trained[1])], monkeypatch, capsys)
    assert line == "error: got 1 runs, expected at least 3 of different sizes; train or name more"


@pytest.mark.parametrize("from_checkpoints", [False, True], ids=["finished files", "checkpoints"])
def test_runs_become_bundles_with_class_names(trained, tmp_path, from_checkpoints):
    pytest.importorskip("onnx_ir")
    vqvae, var = trained
    paths = [var / "var.safetensors", vqvae / "vqvae.safetensors"]
    if from_checkpoints:
        paths = [folder / "checkpoints" / "step_00000002" for folder in (var, vqvae)]
    out = tmp_path / "bundle"
    assert str(out) in invoked(var_deploy.cli.app, "export", "--var", paths[0], "--vae", paths[1], "--out", out)
    manifest = Bundle.open(out).manifest
    assert manifest.class_names == tuple(CLASSES)
    assert manifest.var.patch_nums == manifest.vqvae.patch_nums == (1, 2, 4)
