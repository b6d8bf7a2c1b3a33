"""Commands that make pictures: files in, files out, and what is refused in one line."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import var_deploy
from var_deploy.cli import app
from var_deploy.errors import VarDeployError
from var_deploy.images import image_grid
from var_deploy.recipe import recipes_from_png

Run = Callable[..., str]


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> var_deploy.Pipeline:
    return var_deploy.load(tiny_bundle)


@pytest.fixture(scope="module")
def picture(pipe, tmp_path_factory) -> Path:
    """A wide PNG."""
    path = tmp_path_factory.mktemp("picture") / "wide.png"
    pipe.generate([2], seeds=6).images[0].resize((90, 64)).save(path)
    return path


@pytest.fixture
def run(tiny_bundle: Path) -> Run:
    """A command on the bundle in this process: what it prints."""

    def invoke(command: str, *arguments: object) -> str:
        done = CliRunner().invoke(app, [command, str(tiny_bundle), *map(str, arguments)], catch_exceptions=True)
        if isinstance(done.exception, VarDeployError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    return invoke


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_an_edit_in_a_process_of_its_own_equals_python(pipe, tiny_bundle, picture, tmp_path):
    out = tmp_path / "edits"
    options = ["--box", "0,0,0.5,1", "--class", "3", "--class", "5", "--seed", "4", "--preset", "paper-edit"]
    command = [sys.executable, "-m", "var_deploy.cli", "edit", tiny_bundle, picture, "--out", out, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["000_3_seed4.png", "001_5_seed5.png"]
    with Image.open(picture) as source:
        made = pipe.edit(source, [3, 5], box=(0, 0, 0.5, 1), seeds=4, preset="paper-edit")
    for file, image, recipe in zip(files, made.images, made.recipes, strict=True):
        np.testing.assert_array_equal(pixels(file), np.asarray(image))
        assert recipes_from_png(file) == [recipe]


def test_an_edit_by_a_mask_file(run, pipe, picture, tmp_path):
    mask = Image.new("L", (90, 64))
    mask.paste(255, (0, 0, 45, 64))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "out.png"
    run(
        "edit",
        picture,
        "--mask",
        tmp_path / "mask.png",
        "--mode",
        "outpaint",
        "--count",
        2,
        "--composite",
        "--out",
        out,
    )
    with Image.open(picture) as source:
        made = pipe.edit(source, mask=mask, mode="outpaint", seeds=[0, 1], composite=True)
    np.testing.assert_array_equal(pixels(out), np.asarray(image_grid(made.images)))
    with pytest.raises(VarDeployError, match="pixels of the original were put back"):
        run("generate", "--like", out, "--out", tmp_path / "again.png")


def test_variations(run, pipe, picture, tmp_path):
    out = tmp_path / "out.png"
    run("vary", picture, "--from-scale", 2, "--class", 3, "--count", 3, "--seed", 8, "--out", out)
    with Image.open(picture) as source:
        made = pipe.vary(source, 3, from_scale=2, seeds=[8, 9, 10])
    np.testing.assert_array_equal(pixels(out), np.asarray(image_grid(made.images)))


def test_tokens_of_pictures_and_what_they_decode_to(run, pipe, picture, tmp_path):
    tokens, out, direct = tmp_path / "tokens.npz", tmp_path / "from_tokens.png", tmp_path / "pictures"
    run("encode", picture, picture, "--out", tokens)
    run("reconstruct", tokens, "--out", out)
    run("reconstruct", picture, picture, "--out", direct)
    with Image.open(picture) as source:
        expected = pipe.encode([source] * 2)
    with np.load(tokens) as stored:
        assert sorted(stored.files) == ["scale_00", "scale_01", "scale_02", "scale_03"]
        for k, tokens_Bn in enumerate(expected):
            np.testing.assert_array_equal(stored[f"scale_{k:02d}"], tokens_Bn)
    files = sorted(direct.iterdir())
    assert [file.name for file in files] == ["000_wide.png", "001_wide.png"]
    np.testing.assert_array_equal(pixels(out)[:64, :64], pixels(files[0]))


@pytest.mark.parametrize("several", [False, True], ids=["one", "grid"])
def test_any_picture_is_made_again_from_itself(run, tmp_path, several):
    classes = ["--class", 3, "--class", 7] if several else ["--class", 3]
    schedules = ["--guidance", "0,0.5,1,2", "--top-k", "900,60,60,20", "--top-p", 0.9, "--smooth-scales", "1,2"]
    run("generate", *classes, "--seed", 2**64 - 2, *schedules, "--out", tmp_path / "one.png")
    run("generate", "--like", tmp_path / "one.png", "--out", tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_two_models_on_the_command_line(run, pipe, tiny_bundle, tmp_path):
    options = ["--refine", tiny_bundle, "--draft-scales", 2]
    run("generate", "--class", 3, *options, "--out", tmp_path / "both.png")
    run("generate", "--like", tmp_path / "both.png", "--refine", tiny_bundle, "--out", tmp_path / "again.png")
    assert (tmp_path / "both.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    np.testing.assert_array_equal(pixels(tmp_path / "both.png"), np.asarray(pipe.generate([3]).images[0]))
    with pytest.raises(VarDeployError, match="drawn by two models; name the refiner"):
        run("generate", "--like", tmp_path / "both.png", "--out", tmp_path / "alone.png")


# ---- files that are odd ----------------------------------------------------------------------------------------------


def odd(path: Path, kind: str) -> Path:
    """A picture that is not an upright 8-bit RGB one, of the same content: half dark, half bright."""
    grey = np.full((32, 64), 40, np.uint8)
    grey[:, 32:] = 200
    base = Image.fromarray(grey)
    exif = Image.Exif()
    exif[274] = 6
    saves: dict[str, Any] = {
        "grey": lambda: base.save(path),
        "sixteen": lambda: Image.fromarray(grey.astype(np.uint16) * 257).save(path),
        "alpha": lambda: Image.merge("LA", [base, Image.new("L", base.size, 255)]).save(path),
        "palette": lambda: base.convert("RGB").quantize(4).save(path),
        "turned": lambda: base.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(path, exif=exif),
    }
    saves[kind]()
    return path


@pytest.mark.parametrize("kind", ["grey", "sixteen", "alpha", "palette", "turned"])
def test_odd_pictures_are_read_for_what_they_show(run, tmp_path, kind):
    run("encode", odd(tmp_path / f"{kind}.png", kind), "--out", tmp_path / "odd.npz")
    run("encode", odd(tmp_path / "plain.png", "grey"), "--out", tmp_path / "plain.npz")
    with np.load(tmp_path / "odd.npz") as got, np.load(tmp_path / "plain.npz") as expected:
        for name in expected.files:
            np.testing.assert_array_equal(got[name], expected[name])


def test_a_photograph_with_another_beside_it_is_a_picture(run, tmp_path):
    """As telephones write them, with a map of depths or brightness."""
    first, second = Image.new("RGB", (64, 64), (9, 99, 199)), Image.new("RGB", (32, 32))
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    first.save(tmp_path / "plain.jpg")
    for name in ("phone", "plain"):
        run("encode", tmp_path / f"{name}.jpg", "--out", tmp_path / f"{name}.npz")
    with np.load(tmp_path / "phone.npz") as got, np.load(tmp_path / "plain.npz") as expected:
        np.testing.assert_array_equal(got["scale_03"], expected["scale_03"])


def test_metadata_that_cannot_be_read_turns_nothing(pipe, tmp_path):
    picture = Image.new("RGB", (64, 32), (9, 99, 199))
    picture.save(tmp_path / "bad.png", exif=b"not a header at all")
    with Image.open(tmp_path / "bad.png") as image:
        for ours, theirs in zip(pipe.encode([image]), pipe.encode([picture]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_smoothness_of_a_preset_can_be_switched_off(run, pipe, tmp_path):
    for options, smooth in (([], True), (["--no-smooth"], False)):
        run("generate", "--class", 3, "--preset", "paper-edit", *options, "--out", tmp_path / "out.png")
        expected = pipe.generate([3], preset="paper-edit", smooth=smooth).images[0]
        np.testing.assert_array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))


def test_a_recipe_says_who_drew_what(run, tiny_bundle, tmp_path):
    """A note on rounding only where an engine is another one."""
    options = ["--refine", tiny_bundle, "--draft-scales", 2]
    run("generate", "--class", 3, *options, "--out", tmp_path / "both.png")
    (recipe,) = recipes_from_png(tmp_path / "both.png")
    assert (recipe.engine, recipe.precision) == ("onnx+onnx", "fp32+fp32")
    for engine, noted in (("onnx", False), ("torch", True)):
        again = ["--like", tmp_path / "both.png", "--refine", tiny_bundle, "--engine", engine, "--device", "cpu"]
        done = CliRunner().invoke(app, ["generate", *map(str, [tiny_bundle, *again, "--out", tmp_path / "again.png"])])
        assert done.exit_code == 0
        assert ("made by engine 'onnx+onnx' in 'fp32+fp32', now by" in done.stderr.replace("\n", " ")) is noted


def test_what_is_transparent_lies_on_white(pipe):
    clear, white = Image.new("RGBA", (64, 64), (0, 0, 0, 0)), Image.new("RGB", (64, 64), "white")
    for ours, theirs in zip(pipe.encode([clear]), pipe.encode([white]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_wrong_files_and_options_are_one_line(run, picture, tmp_path):
    text, animation, floats = tmp_path / "text.png", tmp_path / "two.gif", tmp_path / "floats.tiff"
    text.write_text("no picture")
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(animation, save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(floats)
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, scale_01=np.zeros((1, 4), int))
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, scale_00=np.array([object()]))
    array, huge, pages, postscript = (tmp_path / name for name in ("a.npz", "b.npz", "two.tiff", "eps.png"))
    with array.open("wb") as file:
        np.save(file, np.zeros((1, 1), int))
    with zipfile.ZipFile(huge, "w") as archive:
        header = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 1), }".ljust(117) + "\n"
        archive.writestr("scale_00.npy", b"\x93NUMPY\x01\x00v\x00" + header.encode())
    frames[0].save(pages, save_all=True, append_images=frames[1:])
    frames[0].save(postscript, format="EPS")
    out, box = ["--out", tmp_path / "out.png"], ["--box", "0,0,1,1"]
    for command, arguments, message in [
        ("edit", [text, *box, *out], f"{text}: no picture format that is read; give PNG, JPEG or WebP"),
        (
            "edit",
            [tmp_path / "none.png", *box, *out],
            "none.png: cannot be read as a picture (No such file or directory)",
        ),
        (
            "edit",
            [animation, *box, *out],
            "images: an animation of 2 frames, expected a still picture; save one of them",
        ),
        ("edit", [floats, *box, *out], "images: a picture of floats, expected 8 or 16 bits; give an array in [0, 1]"),
        ("edit", [picture, *out], "edit: got neither, expected either a box or a mask"),
        ("edit", [picture, "--box", "0,0,1", *out], "box: got [0.0, 0.0, 1.0], expected (y0, x0, y1, x1)"),
        ("edit", [picture, "--box", "a,b", *out], "box: got 'a,b', expected numbers like 0,0.5,1"),
        ("edit", [picture, "--mask", animation, *out], "mask: an animation of 2 frames"),
        (
            "edit",
            [picture, "--mask", floats, *out],
            "mask: a picture of floats, expected 8 or 16 bits; give an array in [0, 1]",
        ),
        (
            "edit",
            [picture, *box, "--class", 1, "--class", 2, "--count", 3, *out],
            "--count: 3 for 2 classes; leave it out",
        ),
        ("vary", [picture, "--from-scale", 4, *out], "from_scale: got 4, expected a scale from 1 to 3"),
        ("encode", [picture, "--out", tmp_path / "a.pt"], "a.pt: tokens are written as NumPy's .npz"),
        ("reconstruct", [tokens, *out], f"{tokens}: holds 'scale_01', expected scale_00, scale_01, …"),
        ("reconstruct", [pickled, *out], f"{pickled}: cannot be read as tokens (Object arrays cannot be loaded"),
        ("reconstruct", [array, *out], f"{array}: cannot be read as tokens (File is not a zip file); write it with"),
        ("reconstruct", [huge, *out], f"{huge}: cannot be read as tokens ("),
        ("edit", [pages, *box, *out], "images: a file of 2 pages, expected a still picture; save one of them"),
        ("edit", [postscript, *box, *out], f"{postscript}: no picture format that is read; give PNG, JPEG or WebP"),
        ("edit", [picture, "--box", "0.4,0,0.6,1", *out], "which covers no token of 4×4; make it larger"),
        ("reconstruct", [tokens, picture, *out], "2 files, expected pictures, or one .npz alone"),
        ("generate", [*out], "generate: got no class; give --class, once per image, or --like"),
        ("generate", ["--like", picture, *out], f"{picture}: does not say how it was made"),
        ("generate", ["--class", 1, "--smooth-scales", "4", *out], "smooth-scales: got 4, expected scales from 0 to 3"),
        ("generate", ["--class", 1, "--preset", "best", *out], "preset 'best' is unknown; known: paper-fid"),
        ("generate", ["--class", 1, "--draft-scales", 2, *out], "generate: refine and draft_scales belong together"),
    ]:
        with pytest.raises(VarDeployError) as caught:
            run(command, *arguments)
        assert message in str(caught.value)
        assert not (tmp_path / "out.png").exists()
    run("generate", "--class", 1, *out)
    with pytest.raises(VarDeployError, match="--like: the picture says classes, seeds and settings"):
        run("generate", "--like", tmp_path / "out.png", "--seed", 3, *out)
