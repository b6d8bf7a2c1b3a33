"""Recipes in pictures: what is written comes back, pictures are made again, and damage is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import var_deploy
from var_deploy import Pipeline, Recipe
from var_deploy.errors import RequestError
from var_deploy.recipe import KEY, png_info, recipes_from_png
from var_deploy.sampling import Settings


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return var_deploy.load(tiny_bundle, engine="onnx")


def saved(path: Path, *recipes: Recipe) -> Path:
    Image.new("RGB", (4, 4)).save(path, pnginfo=png_info(recipes))
    return path


numbers = st.floats(0, 1000)
settings = st.builds(
    Settings,
    strengths=st.lists(numbers, min_size=2, max_size=3).map(tuple),
    temperatures=st.lists(numbers, min_size=2, max_size=3).map(tuple),
    top_ks=st.lists(st.integers(0, 9999), min_size=2, max_size=3).map(tuple),
    top_ps=st.lists(st.floats(0, 1), min_size=2, max_size=3).map(tuple),
    smooths=st.lists(st.booleans(), min_size=2, max_size=3).map(tuple),
)
recipes = st.builds(
    Recipe,
    bundle=st.text(min_size=1),
    label=st.integers(0, 1000),
    seed=st.integers(0, 2**64 - 1),
    settings=settings,
    engine=st.sampled_from(["onnx", "torch"]),
    precision=st.sampled_from(["fp32", "int8"]),
    given=st.none() | st.lists(st.integers(-1, 4095), min_size=1, max_size=40).map(tuple),
    refiner=st.none() | st.text(),
    draft_scales=st.none() | st.integers(1, 9),
    composite=st.booleans(),
)


@given(made=st.lists(recipes, min_size=1, max_size=3))
def test_what_is_written_comes_back(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "picture.png"
    assert recipes_from_png(saved(path, *made)) == made


@pytest.mark.parametrize("kind", ["generated", "smooth", "edited", "varied", "prefixed", "refined"])
def test_a_picture_is_made_again_from_its_file(pipe, tmp_path, kind):
    images = pipe.generate([1], seeds=3).pixels
    prefix = pipe.generate([4], seeds=9).tokens[:2]
    made = {
        "generated": lambda: pipe.generate([1, 2], seeds=2**63, guidance=[0, 0.1, 0.7, 1 / 3], temperature=0.9),
        "smooth": lambda: pipe.generate([1, 2], seeds=5, smooth=[False, True, True, False], preset="paper-visual"),
        "edited": lambda: pipe.edit(images, [3, 4], box=(0, 0, 0.5, 1), seeds=4, preset="paper-edit"),
        "varied": lambda: pipe.vary(images, from_scale=2, seeds=[7, 8]),
        "prefixed": lambda: pipe.generate([3], seeds=1, prefix_tokens=prefix),
        "refined": lambda: pipe.generate([3], seeds=1, refine=pipe, draft_scales=2, smooth=True),
    }[kind]()
    path = tmp_path / "picture.png"
    Image.new("RGB", (2, 2)).save(path, pnginfo=png_info(made.recipes))
    again = pipe.remake(recipes_from_png(path), refine=pipe if kind == "refined" else None)
    np.testing.assert_array_equal(again.pixels, made.pixels)
    assert again.recipes == made.recipes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); expected a PNG that var-deploy wrote"),
        (b"not a picture", "cannot be read (it is not a PNG file, or damaged); expected a PNG that var-deploy wrote"),
        ("", "does not say how it was made; expected a PNG that var-deploy wrote"),
        ("{", "its recipe is damaged (Expecting property name"),
        ("[]", "its recipe is damaged (list indices"),
        (
            '{"version": 2, "made by": "var_deploy 9"}',
            "its recipe is of version 2, expected 1; use the var_deploy that wrote it",
        ),
        ('{"version": 1, "images": []}', "its recipe is damaged (no image); make the picture anew"),
        ({"seed": "1"}, "its recipe is damaged (seed is '1'); make the picture anew"),
        ({"engine": None}, "its recipe is damaged (engine is None); make the picture anew"),
        ({"color": "red"}, "its recipe is damaged (unknown entry 'color'); make the picture anew"),
        ({"given": "?"}, "its recipe is damaged ("),
        ({"composite": 1}, "its recipe is damaged (refiner, draft_scales or composite is of another type)"),
    ],
    ids=str,
)
def test_a_file_without_a_whole_recipe_is_one_line(tmp_path, pipe, content, message):
    path = tmp_path / "picture.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        info = PngInfo()
        if isinstance(content, dict):
            saved(path, pipe.generate([1]).recipes[0])
            with Image.open(path) as image:
                data = json.loads(image.text[KEY])  # type: ignore[attr-defined]
            data["images"][0] |= content
            content = json.dumps(data)
        if content:
            info.add_text(KEY, content)
        Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    with pytest.raises(RequestError) as caught:
        recipes_from_png(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_text_that_swells_is_cut(tmp_path, pipe):
    """A few bytes may stand for gigabytes of zeros."""
    recipe = replace(pipe.generate([1]).recipes[0], given=(0,) * (1 << 21))
    with pytest.raises(RequestError, match="its recipe is damaged"):
        recipes_from_png(saved(tmp_path / "picture.png", recipe))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "0" * 64}, "recipe: bundle 000000000000… made it, {path} is {digest}…; use that one"),
        ({"refiner": "0" * 64, "draft_scales": 1}, "recipe: drawn by two models; name the refiner 000000000000… too"),
        ({"label": 11}, "recipe: class 11 or seed 0 is out of range; it is damaged"),
        ({"seed": -1}, "recipe: class 1 or seed -1 is out of range; it is damaged"),
        ({"given": (0,) * 29}, "recipe: its given tokens are not those of this bundle; it is damaged"),
        ({"given": (0,) * 29 + (10**6,)}, "recipe: its given tokens are not those of this bundle; it is damaged"),
        ({"composite": True}, "recipe: pixels of the original were put back, which it does not hold; edit that again"),
        (
            {"settings": Settings.constant((0.0,) * 3, top_k=1, top_p=0)},
            "guidance: 3 values, expected one, or one per scale (4)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recipe_of_something_else_is_refused(pipe, change, message):
    recipe = replace(pipe.generate([1]).recipes[0], **change)
    with pytest.raises(RequestError) as caught:
        pipe.remake([recipe])
    assert str(caught.value) == message.format(path=pipe.bundle.path, digest=pipe.bundle.digest[:12])


def test_recipes_of_different_settings_are_not_made_together(pipe):
    one, other = pipe.generate([1]).recipes[0], pipe.generate([1], guidance=3.0).recipes[0]
    with pytest.raises(RequestError, match="made with different settings, expected the same; make them one by one"):
        pipe.remake([one, other])
