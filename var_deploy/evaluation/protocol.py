"""How samples were made, as far as they say it → whether their numbers may stand beside published ones.

`samples.json` is what `var-deploy sample` writes beside its images; it is read as it is: what is missing is not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import RequestError, printable
from ..samples.folder import ARCHIVE, NOTES
from ..schedules import PRESETS
from .samples import ImageSet

#: What is copied from it, in this order.
KNOWN = ("bundle", "precision", "engine", "seed", "settings", "count", "balanced", "classes", "num_classes")
#: Images of the paper's tables, as many of every class, drawn with these settings (arXiv 2404.02905, and
#: the published code's notes on FID).
PAPER_IMAGES, PAPER_CLASSES = 50_000, 1000
#: Precisions of a bundle or engine whose images are not those of the published weights.
INEXACT = ("int8", "fp8")
PAPER_SETTINGS = PRESETS["paper-fid"] | {"temperature": 1.0}


def read_notes(images: ImageSet) -> dict[str, Any]:
    """What `samples.json` says; nothing where there is none. Raises RequestError for samples that are not complete."""
    if images.path.is_dir():
        path = images.path / NOTES
    elif images.path.name == ARCHIVE:
        path = images.path.with_name(NOTES)
    else:
        return {}
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: cannot be read ({error}); sample again, or remove the file") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path}: got {type(found).__name__}, expected an object; sample again, or remove the file")
    count = found.get("count")
    if isinstance(count, int) and count != images.count:
        raise RequestError(
            f"{images.path}: {images.count} images, {NOTES} says {count}; let sampling finish, or take away what is "
            "not part of it"
        )
    return {key: found[key] for key in KNOWN if key in found}


def describe(images: ImageSet, notes: Mapping[str, Any]) -> dict[str, Any]:
    """Count, size, form and class balance of the samples, and what is known of their making."""
    height, width = images.size
    return {
        "path": str(images.path),
        "images": images.count,
        "size": f"{width}×{height}",
        "form": images.form,
        "balance": _balance(images, notes),
        **{key: notes[key] for key in KNOWN if key in notes and key != "count"},
    }


def _balance(images: ImageSet, notes: Mapping[str, Any]) -> dict[str, int] | None:
    """How many classes there are among the samples, and how many images the rarest and the commonest one have."""
    labels_N = images.labels()
    if labels_N is not None:
        counts = np.unique(labels_N, return_counts=True)[1]
        return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}
    taken, classes = notes.get("classes"), notes.get("num_classes")
    if isinstance(taken, list):
        classes = len(taken)
    if notes.get("balanced") is True and isinstance(classes, int) and classes > 0:
        fewest, more = divmod(images.count, classes)
        return {"classes": min(classes, images.count), "fewest": fewest, "most": fewest + (more > 0)}
    return None


def differences_from_paper(samples: Mapping[str, Any]) -> list[str]:
    """What in `describe`'s account is not as in the paper's tables, or not known; nothing: it is the same protocol."""
    found = []
    if samples["images"] != PAPER_IMAGES:
        found.append(f"{samples['images']:,} images, not {PAPER_IMAGES:,}")
    balance = samples["balance"]
    if balance is None:
        found.append("balance of classes not known")
    else:
        if balance["fewest"] != balance["most"]:
            found.append(f"{balance['fewest']} to {balance['most']} images of a class, not as many of each")
        if balance["classes"] != PAPER_CLASSES:
            found.append(f"{balance['classes']:,} classes, not {PAPER_CLASSES:,}")
    if samples.get("precision") in INEXACT:
        found.append(f"precision {samples['precision']}, which is approximate")
    if isinstance(taken := samples.get("classes"), list):
        found.append(f"{len(taken)} chosen classes, not all")
    settings = samples.get("settings")
    if not isinstance(settings, Mapping):
        return [*found, "sampling settings not known"]
    for name, wanted in PAPER_SETTINGS.items():
        if name not in settings:
            found.append(f"{name} not known")
        elif not _same(name, settings[name], wanted):
            found.append(f"{name} {printable(str(settings[name]))}, not {wanted}")
    return found


def _same(name: str, value: Any, wanted: Any) -> bool:
    """Whether an option, which may be given per scale, is the paper's: guidance a ramp from 0, the others constant."""
    if not isinstance(value, list):
        return bool(value == wanted)
    if not value:
        return False
    if name != "guidance":
        return all(entry == wanted for entry in value)
    if not all(isinstance(entry, float) or (isinstance(entry, int) and abs(entry) < 1e9) for entry in value):
        return False
    return bool(np.allclose(value, np.linspace(0, wanted, len(value)), rtol=1e-6, atol=0))
