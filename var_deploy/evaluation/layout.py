"""What `evaluate` measured, as a table for people with the protocol under it."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..errors import printable

#: Name of a measure → (title, digits after the point, which way is better).
MEASURES = {
    "fid": ("FID", 3, "lower"),
    "sfid": ("sFID", 3, "lower"),
    "inception_score": ("Inception score", 2, "higher"),
    "precision": ("precision", 4, "higher"),
    "recall": ("recall", 4, "higher"),
}


def evaluation(data: dict[str, Any]) -> None:
    """Measures, what they were measured on, and what sets them apart from the paper's protocol."""
    console = Console()
    table = Table("measure", Column("value", justify="right"), Column("95 % interval", justify="right"), "better")
    for name, (title, digits, better) in MEASURES.items():
        if name in data["measures"]:
            table.add_row(title, *_cells(data["measures"][name], digits), better)
    console.print(table)
    lines = [f"{MEASURES[name][0]} left out: {why}" for name, why in data["left_out"].items()]
    lines += [
        "samples: " + _account(data["samples"]),
        "reference: " + _reference(data["reference"]),
        "features: " + _features(data["features"]),
        "intervals: new draws of as many samples, the reference fixed; "
        + (f"{data['bootstrap']} resamples" if data["bootstrap"] else "off"),
    ]
    differences = data["differences_from_paper"]
    lines.append("not the paper's protocol: " + "; ".join(differences) if differences else "the paper's protocol")
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def _cells(found: dict[str, Any], digits: int) -> tuple[str, str]:
    ends = found["interval"]
    interval = "" if ends is None else "–".join(f"{end:.{digits}f}" for end in ends)
    return f"{found['value']:.{digits}f}", interval


def _account(samples: dict[str, Any]) -> str:
    parts = [f"{samples['path']}, {samples['images']:,} images of {samples['size']}, {samples['form']}"]
    balance = samples["balance"]
    if balance is None:
        parts.append("classes not known")
    else:
        fewest, most = balance["fewest"], balance["most"]
        each = f"{fewest} each" if fewest == most else f"{fewest} to {most} each"
        parts.append(f"{balance['classes']} classes, {each}")
    for key in ("bundle", "precision", "engine", "seed"):
        if key in samples:
            parts.append(f"{key} {printable(samples[key])}")
    settings = samples.get("settings")
    if isinstance(settings, dict):
        parts += [f"{printable(name)} {printable(json.dumps(value))}" for name, value in settings.items()]
    else:
        parts.append("settings not known")
    return ", ".join(parts)


def _reference(reference: dict[str, Any]) -> str:
    images, manifold = reference["images"], reference["manifold"]
    parts = [reference["path"], "no images" if images is None else f"{images:,} images"]
    parts.append(f"statistics {reference['statistics']}")
    if reference.get("features") == "kept":
        parts.append("features kept from an earlier run")
    if manifold:
        parts.append(f"precision and recall against {manifold:,}")
    return ", ".join(parts)


def _features(features: dict[str, Any]) -> str:
    kind = (
        "the published weights"
        if features["published"]
        else ("NOT the published weights: no number here compares with the literature")
    )
    return f"{features['path']}, sha256 {features['sha256']}, {kind}"
