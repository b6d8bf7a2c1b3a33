"""What a picture was made from, as text that a PNG file carries, so that it can be made again.

A recipe is JSON under one key of the PNG's text; a picture of several images, a grid, has a recipe for each. Tokens
that were given (an edit, coarser scales) are part of it, compressed.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from . import schedules
from .bundle import Bundle
from .errors import RequestError, printable
from .given import DRAWN
from .request import MAX_SEED
from .sampling import Settings
from .version import __version__

log = logging.getLogger("var_deploy")

#: Key of the PNG's text.
KEY = "var-deploy"

#: Of the JSON: counts up when an older program could not make the picture from it.
VERSION = 1

#: Characters of a text; Pillow's limit is 2²⁰.
_MAX_TEXT = 1_000_000

#: Positions of all scales that a text may give tokens for; published models have up to 2,240.
_MAX_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One image."""

    bundle: str  #: its digest
    label: int  #: class id; the null class's, where it was made without one
    seed: int
    settings: Settings
    engine: str  #: with a refiner both, as "onnx+torch"
    precision: str  #: likewise
    given: tuple[int, ...] | None = None  #: token of every position, −1 where it was drawn
    refiner: str | None = None  #: digest of the bundle that drew the finer scales
    draft_scales: int | None = None  #: scales that `bundle` drew for the refiner
    composite: bool = False  #: the original's pixels were put back, which the recipe does not hold

    def png_info(self) -> PngInfo:
        """For `Image.save(…, pnginfo=…)`."""
        return png_info([self])


def png_info(recipes: Sequence[Recipe]) -> PngInfo:
    """Of a picture that shows these images, row by row. What all have in common is stored once.

    Pillow opens no PNG with a longer text than `_MAX_TEXT`: some thousand images, or some hundred with given tokens. A
    picture of more carries no recipe, with a warning.
    """
    rows = [_data(recipe) for recipe in recipes]
    common = {name: value for name, value in rows[0].items() if all(row[name] == value for row in rows)}
    images = [{name: value for name, value in row.items() if name not in common} for row in rows]
    text = json.dumps({"version": VERSION, "made by": f"var_deploy {__version__}", **common, "images": images})
    info = PngInfo()
    if len(text) <= _MAX_TEXT:
        info.add_text(KEY, text, zip=True)
    else:
        log.warning("a picture of %d images cannot say how it was made; write them one by one", len(recipes))
    return info


def check_recipes(recipes: Sequence[Recipe], bundle: Bundle, refiner: Bundle | None) -> None:
    """Refuses recipes that do not belong together, or are of other bundles. Raises RequestError."""
    if not recipes:
        raise RequestError("recipes: got none, expected at least one")
    first = recipes[0]
    for recipe in recipes:
        if recipe.composite:
            raise RequestError("recipe: pixels of the original were put back, which it does not hold; edit that again")
        if _shared(recipe) != _shared(first):
            raise RequestError("recipes: made with different settings, expected the same; make them one by one")
    if first.refiner is None and refiner is not None:
        raise RequestError("recipe: drawn by one model, got two; leave the refiner out")
    if first.refiner is not None and refiner is None:
        raise RequestError(f"recipe: drawn by two models; name the refiner {first.refiner[:12]}… too")
    for role, made_by, found in (("bundle", first.bundle, bundle), ("refiner", first.refiner, refiner)):
        if found is not None and made_by is not None and found.digest != made_by:
            raise RequestError(
                f"recipe: {role} {made_by[:12]}… made it, {found.path} is {found.digest[:12]}…; use that one"
            )
    var, vqvae = bundle.manifest.var, bundle.manifest.vqvae
    for recipe in recipes:
        if recipe.label > var.num_classes:
            raise RequestError(f"recipe: class {recipe.label} is none of this bundle's; it is damaged")
        if recipe.given is None:
            continue
        tokens_L = np.array(recipe.given, dtype=np.int64)
        if tokens_L.shape != (var.num_tokens,) or tokens_L.min() < DRAWN or tokens_L.max() >= vqvae.vocab_size:
            raise RequestError("recipe: its given tokens are not those of this bundle; it is damaged")
    settings = schedules.settings(bundle.manifest, **schedules.options_of(first.settings))
    if settings != first.settings:
        raise RequestError("recipe: its settings are not those of this bundle; it is damaged")


def _shared(recipe: Recipe) -> tuple[object, ...]:
    """What has to be the same for images to be made together."""
    return recipe.settings, recipe.bundle, recipe.refiner, recipe.draft_scales, recipe.given is None


def recipes_from_png(path: Path) -> list[Recipe]:
    """Of all images that a picture shows. Raises RequestError for a file without, or with damaged ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a grid of many images is large
            with Image.open(path, formats=("PNG",)) as image:
                assert isinstance(image, PngImageFile)
                text = image.text.get(KEY)  # may come after the pixels, which are read then
    except Exception as error:  # a decoder of files from anywhere raises many kinds
        reason = getattr(error, "strerror", None) or "it is not a PNG file, or damaged, or too large"
        raise RequestError(f"{path}: cannot be read ({reason}); expected a PNG that var-deploy wrote") from error
    if text is None:
        raise RequestError(f"{path}: does not say how it was made; expected a PNG that var-deploy wrote")
    try:
        return recipes_from_text(text)
    except ValueError as error:
        raise RequestError(
            f"{path}: its recipe is damaged, or of another var_deploy ({error}); make the picture anew"
        ) from None


def recipes_from_text(text: str) -> list[Recipe]:
    """Of the text that a PNG has under `KEY`. Raises ValueError with what is wrong, short and harmless to print."""
    try:
        data = json.loads(text)
        version, images = data.pop("version"), data.pop("images", [])
        data.pop("made by", None)
        if version != VERSION:
            raise ValueError(f"version {printable(version)}, expected {VERSION}")
        if not images:
            raise ValueError("no image")
        return [_recipe(data | entry) for entry in images]
    except RecursionError:
        raise ValueError("too deep") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, binascii.Error, zlib.error) as error:
        raise ValueError(printable(str(error) if isinstance(error, ValueError) else error)) from error


def _data(recipe: Recipe) -> dict[str, Any]:
    data = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    data["settings"] = {field.name: list(getattr(recipe.settings, field.name)) for field in fields(recipe.settings)}
    if recipe.given is not None:
        data["given"] = base64.b64encode(zlib.compress(np.array(recipe.given, "<i4").tobytes(), 9)).decode()
    return data


#: Entries of a recipe that are of one type.
_TYPES = {"bundle": str, "label": int, "seed": int, "engine": str, "precision": str, "composite": bool}
_SETTINGS = {"strengths": float, "temperatures": float, "top_ks": int, "top_ps": float, "smooths": bool}


def _recipe(data: dict[str, Any]) -> Recipe:
    """Checked; what it means for a bundle is checked where it is used. Raises ValueError, KeyError and the like."""
    if unknown := data.keys() - {field.name for field in fields(Recipe)}:
        raise ValueError(f"unknown entry {sorted(unknown)[0]!r}")
    for name, kind in _TYPES.items():
        if type(data[name]) is not kind:
            raise ValueError(f"{name} is {data[name]!r}")
    if not 0 <= data["seed"] <= MAX_SEED or data["label"] < 0:
        raise ValueError("its class or seed is out of range")
    refiner, scales, given = data["refiner"], data["draft_scales"], data["given"]
    for digest in (data["bundle"], refiner):
        if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise ValueError(f"{digest!r} is no digest")
    if (refiner is None) != (scales is None) or (refiner is not None and given is not None):
        raise ValueError("refiner, draft_scales and given do not belong together")
    if scales is not None and (type(scales) is not int or scales < 1):
        raise ValueError(f"draft_scales is {scales!r}")
    entries = {}
    for name, kind in _SETTINGS.items():
        values = data["settings"][name]
        if not all(type(value) is kind or (kind is float and type(value) is int) for value in values):
            raise ValueError(f"{name} is {values!r}")
        entries[name] = tuple(map(kind, values))
    given = None if given is None else _tokens(given)
    return Recipe(**(data | {"settings": Settings(**entries), "given": given}))


def _tokens(packed: str) -> tuple[int, ...]:
    """A few bytes may stand for gigabytes of zeros, so no more is unpacked than a model has positions."""
    decompressor = zlib.decompressobj()
    tokens = decompressor.decompress(base64.b64decode(packed, validate=True), 4 * _MAX_TOKENS)
    if not decompressor.eof:
        raise ValueError("given is cut off, or of more tokens than a model has")
    return tuple(np.frombuffer(tokens, "<i4").tolist())
