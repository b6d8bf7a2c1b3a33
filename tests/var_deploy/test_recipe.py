"""Recipes in pictures: what is written comes back, pictures are made again, and damage is told."""

from __future__ import annotations

import base64
import json
import zlib
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
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
recipes = st.builds(
    Recipe,
    bundle=digests,
    label=st.integers(0, 1000),
    seed=st.integers(0, 2**64 - 1),
    settings=settings,
    engine=st.sampled_from(["onnx", "torch"]),
    precision=st.sampled_from(["fp32", "int8"]),
    given=st.none() | st.lists(st.integers(-1, 4095), min_size=1, max_size=40).map(tuple),
    composite=st.booleans(),
) | st.builds(
    Recipe,
    bundle=digests,
    label=st.integers(0, 1000),
    seed=st.integers(0, 2**64 - 1),
    settings=settings,
    engine=st.text(),
    precision=st.text(),
    refiner=digests,
    draft_scales=st.integers(1, 9),
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
        (
            b"not a picture",
            "cannot be read (it is not a PNG file, or damaged, or too large); expected a PNG that var-deploy wrote",
        ),
        ("", "does not say how it was made; expected a PNG that var-deploy wrote"),
        ("{", "its recipe is damaged, or of another var_deploy (Expecting property name"),
        ("[]", "its recipe is damaged, or of another var_deploy ("),
        ("[" * 100_000, "its recipe is damaged, or of another var_deploy (too deep)"),
        (
            '{"version": 2}',
            "its recipe is damaged, or of another var_deploy (version 2, expected 1); make the picture anew",
        ),
        ('{"version": "\\u001b[31m"}', "its recipe is damaged, or of another var_deploy (version ?[31m, expected 1)"),
        (
            '{"version": 1, "images": []}',
            "its recipe is damaged, or of another var_deploy (no image); make the picture anew",
        ),
        ({"seed": "1"}, "its recipe is damaged, or of another var_deploy (seed is '1'); make the picture anew"),
        ({"seed": 2**64}, "its recipe is damaged, or of another var_deploy (its class or seed is out of range)"),
        ({"label": -1}, "its recipe is damaged, or of another var_deploy (its class or seed is out of range)"),
        ({"engine": None}, "its recipe is damaged, or of another var_deploy (engine is None); make the picture anew"),
        ({"bundle": "../x"}, "its recipe is damaged, or of another var_deploy ('../x' is no digest)"),
        (
            {"color": "red"},
            "its recipe is damaged, or of another var_deploy (unknown entry 'color'); make the picture anew",
        ),
        ({"given": "?"}, "its recipe is damaged, or of another var_deploy ("),
        (
            {"given": base64.b64encode(zlib.compress(bytes(120))[:-4]).decode()},
            "its recipe is damaged, or of another var_deploy (given is cut off",
        ),
        ({"composite": 1}, "its recipe is damaged, or of another var_deploy (composite is 1)"),
        (
            {"draft_scales": 1},
            "its recipe is damaged, or of another var_deploy (refiner, draft_scales and given do not belong together)",
        ),
        (
            {"refiner": "0" * 64},
            "its recipe is damaged, or of another var_deploy (refiner, draft_scales and given do not belong together)",
        ),
        (
            {"refiner": "0" * 64, "draft_scales": 0},
            "its recipe is damaged, or of another var_deploy (draft_scales is 0)",
        ),
        ({"settings": {"strengths": [10**400]}}, "its recipe is damaged, or of another var_deploy ("),
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
            data["images"][0] |= content  # what all have in common stands beside the images
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
        ({"label": 11}, "recipe: class 11 is none of this bundle's; it is damaged"),
        ({"given": (0,) * 29}, "recipe: its given tokens are not those of this bundle; it is damaged"),
        ({"given": ()}, "recipe: its given tokens are not those of this bundle; it is damaged"),
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


def test_recipes_that_do_not_belong_together_or_to_two_models(pipe):
    plain = pipe.generate([1]).recipes[0]
    for made, refiner, message in [
        ([], None, "recipes: got none, expected at least one"),
        ([plain, replace(plain, composite=True)], None, "pixels of the original were put back"),
        ([plain], pipe, "recipe: drawn by one model, got two; leave the refiner out"),
    ]:
        with pytest.raises(RequestError, match=message):
            pipe.remake(made, refine=refiner)


@pytest.mark.parametrize("count", [600, 80_000])
def test_a_picture_of_many_images_opens_with_its_recipes_or_without(pipe, tmp_path, caplog, count):
    """Pillow opens no PNG whose text is too long."""
    given_ = tuple(np.random.default_rng(0).integers(-1, 4096, 680).tolist())
    recipe = replace(pipe.generate([1]).recipes[0], given=given_ if count == 600 else None)
    made = [replace(recipe, seed=seed) for seed in range(count)]
    path = saved(tmp_path / "picture.png", *made)
    if count == 600:
        assert recipes_from_png(path) == made
        return
    assert f"a picture of {count} images cannot say how it was made" in caplog.text
    with Image.open(path) as image:
        image.load()


def test_recipes_of_different_settings_are_not_made_together(pipe):
    one, other = pipe.generate([1]).recipes[0], pipe.generate([1], guidance=3.0).recipes[0]
    with pytest.raises(RequestError, match="made with different settings, expected the same; make them one by one"):
        pipe.remake([one, other])
