"""What a picture was made from, as text that a PNG file carries, so that it can be made again.

A recipe is JSON under one key of the PNG's text; a picture of several images, a grid, has a recipe for each. Tokens
that were given (an edit, coarser scales) are part of it, compressed.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

from . import schedules
from .bundle import Bundle
from .errors import RequestError
from .given import DRAWN
from .request import MAX_SEED
from .sampling import Settings
from .version import __version__

#: Key of the PNG's text.
KEY = "var-deploy"

#: Of the JSON: counts up when an older program could not make the picture from it.
VERSION = 1

#: Positions of all scales that a text may give tokens for; published models have up to 2,240.
_MAX_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One image."""

    bundle: str  #: its digest
    label: int  #: class id; the null class's, where it was made without one
    seed: int
    settings: Settings
    engine: str
    precision: str
    given: tuple[int, ...] | None = None  #: token of every position, −1 where it was drawn
    refiner: str | None = None  #: digest of the bundle that drew the finer scales
    draft_scales: int | None = None  #: scales that `bundle` drew for the refiner
    composite: bool = False  #: the original's pixels were put back, which the recipe does not hold

    def png_info(self) -> PngInfo:
        """For `Image.save(…, pnginfo=…)`."""
        return png_info([self])


def png_info(recipes: Sequence[Recipe]) -> PngInfo:
    """Of a picture that shows these images, row by row."""
    info = PngInfo()
    text = json.dumps({"version": VERSION, "made by": f"var_deploy {__version__}", "images": list(map(_data, recipes))})
    info.add_text(KEY, text, zip=True)
    return info


def check_recipes(recipes: Sequence[Recipe], bundle: Bundle, refiner: Bundle | None) -> None:
    """Refuses recipes that do not belong together, or are of other bundles. Raises RequestError."""
    first = recipes[0]
    if any(
        (r.settings, r.bundle, r.refiner, r.draft_scales, r.given is None)
        != (first.settings, first.bundle, first.refiner, first.draft_scales, first.given is None)
        for r in recipes
    ):
        raise RequestError("recipes: made with different settings, expected the same; make them one by one")
    if first.composite:
        raise RequestError("recipe: pixels of the original were put back, which it does not hold; edit that again")
    for role, made_by, found in (("bundle", first.bundle, bundle), ("refiner", first.refiner, refiner)):
        if found is None and made_by is not None:
            raise RequestError(f"recipe: drawn by two models; name the {role} {made_by[:12]}… too")
        if found is not None and found.digest != made_by:
            expected = "none" if made_by is None else f"{made_by[:12]}…"
            raise RequestError(f"recipe: {role} {expected} made it, {found.path} is {found.digest[:12]}…; use that one")
    var, vqvae = bundle.manifest.var, bundle.manifest.vqvae
    for recipe in recipes:
        tokens_L = np.array(recipe.given or [DRAWN] * var.num_tokens)
        if not 0 <= recipe.label <= var.num_classes or not 0 <= recipe.seed <= MAX_SEED:
            raise RequestError(f"recipe: class {recipe.label} or seed {recipe.seed} is out of range; it is damaged")
        if tokens_L.shape != (var.num_tokens,) or tokens_L.min() < DRAWN or tokens_L.max() >= vqvae.vocab_size:
            raise RequestError("recipe: its given tokens are not those of this bundle; it is damaged")
    settings = schedules.settings(bundle.manifest, **schedules.options_of(first.settings))
    if settings != first.settings or not 1 <= (first.draft_scales or 1) < var.num_scales:
        raise RequestError("recipe: its settings are not those of this bundle; it is damaged")


def recipes_from_png(path: Path) -> list[Recipe]:
    """Of all images that a picture shows. Raises RequestError for a file without, or with damaged ones."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            assert isinstance(image, PngImageFile)
            image.load()  # text may come after the pixels
            text = image.text.get(KEY)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or "it is not a PNG file, or damaged"
        raise RequestError(f"{path}: cannot be read ({reason}); expected a PNG that var-deploy wrote") from error
    if text is None:
        raise RequestError(f"{path}: does not say how it was made; expected a PNG that var-deploy wrote")
    try:
        data = json.loads(text)
        if data["version"] != VERSION:
            raise RequestError(
                f"{path}: its recipe is of version {data['version']}, expected {VERSION}; use the var_deploy that "
                f"wrote it ({data.get('made by', 'not said')})"
            )
        recipes = [_recipe(entry) for entry in data["images"]]
        if not recipes:
            raise ValueError("no image")
    except (ValueError, TypeError, KeyError, AttributeError, binascii.Error, zlib.error) as error:
        raise RequestError(f"{path}: its recipe is damaged ({error}); make the picture anew") from error
    return recipes


def _data(recipe: Recipe) -> dict[str, Any]:
    data = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    data["settings"] = {field.name: getattr(recipe.settings, field.name) for field in fields(recipe.settings)}
    if recipe.given is not None:
        data["given"] = base64.b64encode(zlib.compress(np.array(recipe.given, "<i4").tobytes())).decode()
    return data


def _recipe(data: dict[str, Any]) -> Recipe:
    """Checked; what it means for a bundle is checked where it is used. Raises ValueError, KeyError or TypeError."""
    if unknown := data.keys() - {field.name for field in fields(Recipe)}:
        raise ValueError(f"unknown entry {sorted(unknown)[0]!r}")
    entries = {field.name: data["settings"][field.name] for field in fields(Settings)}
    kinds = {"strengths": float, "temperatures": float, "top_ks": int, "top_ps": float, "smooths": bool}
    for name, kind in kinds.items():
        if not all(type(value) is kind or (kind is float and type(value) is int) for value in entries[name]):
            raise ValueError(f"{name} is {entries[name]!r}")
    for name, kind in (("bundle", str), ("label", int), ("seed", int), ("engine", str), ("precision", str)):
        if type(data[name]) is not kind:
            raise ValueError(f"{name} is {data[name]!r}")
    given = data.get("given")
    if given is not None:
        decompressor = zlib.decompressobj()
        tokens = decompressor.decompress(base64.b64decode(given, validate=True), 4 * _MAX_TOKENS)
        if decompressor.unconsumed_tail:
            raise ValueError("more tokens than a model has")
        given = tuple(np.frombuffer(tokens, "<i4").tolist())
    refiner, scales, composite = data.get("refiner"), data.get("draft_scales"), data.get("composite", False)
    if not isinstance(refiner, str | None) or type(scales) not in (int, type(None)) or type(composite) is not bool:
        raise ValueError("refiner, draft_scales or composite is of another type")
    settings = Settings(**{name: tuple(map(kinds[name], values)) for name, values in entries.items()})
    return Recipe(**(data | {"settings": settings, "given": given}))
