"""Bundles of the digits example → samples of each, judged beside real digits and beside those of the fp32 bundle.

The measures are those of `var-deploy evaluate` with the features of the digits' classifier instead of Inception's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from var_deploy.errors import RequestError
from var_deploy.evaluation.bootstrap import bootstrap_interval
from var_deploy.evaluation.metrics import FrechetDistance, Gaussian, precision_recall
from var_deploy.pipeline import Pipeline
from var_train.digits import GUIDANCE, TOP_K, TOP_P
from var_train.digits_data import DigitsSplit
from var_train.digits_quality import DigitsJudge, LabelledImages, features_NF

from .digits_fidelity import MAX_ACCURACY_LOSS, digits_split, engine_digits

#: Resamples of a confidence interval.
BOOTSTRAP = 50

#: Line of the table → what a set of samples has in it.
LINES: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("images", lambda found: f"{found['images']:,}"),
    ("accuracy", lambda found: "" if found["accuracy"] is None else f"{found['accuracy']:.1%}"),
    ("distance to real", lambda found: f"{found['distance']:.4f}"),
    ("its 95 % interval", lambda found: f"±{found['interval'][1] - found['distance']:.4f}"),
    ("precision", lambda found: f"{found['precision']:.3f}"),
    ("recall", lambda found: f"{found['recall']:.3f}"),
    ("distance to fp32", lambda found: "" if found["to_fp32"] is None else f"{found['to_fp32']:.4f}"),
    ("as good as fp32", lambda found: {None: "", True: "yes", False: "NO"}[found["passed"]]),
)


def evaluate_digits(
    bundles: Sequence[Path],
    load: Callable[[Path], Pipeline],
    *,
    count: int = 1000,
    progress: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> dict[str, Any]:
    """JSON-ready, in "rows": real training digits, samples of the fp32 bundle, twice, and of every other bundle.

    load opens a bundle; progress(what, done, total). Raises RequestError for other models than digits, and where there
    is not exactly one fp32 bundle to compare with.
    """
    pipes = [load(path) for path in bundles]
    exact = [pipe for pipe in pipes if pipe.engine.precision.exact]
    if len(exact) != 1:
        found = ", ".join(f"{path}: {pipe.engine.precision}" for path, pipe in zip(bundles, pipes, strict=True))
        raise RequestError(
            f"evaluate-digits: {len(exact)} fp32 bundles ({found}), expected one that the others are compared with"
        )
    split = _split(pipes)
    judge, real = DigitsJudge(split.train), split.held_out
    per_class = count // 10

    def samples(name: str, pipe: Pipeline, first_seed: int = 0) -> LabelledImages:
        return engine_digits(
            pipe, per_class, first_seed=first_seed, on_images=lambda done: progress(name, done, 10 * per_class)
        )

    others = [(f"{pipe.engine.precision}, {pipe.bundle.path.name}", pipe) for pipe in pipes if pipe is not exact[0]]
    reference = samples("fp32", exact[0])
    rows = [_row("real digits, training", split.train, real), _row("fp32", reference, real, judge)]
    again = samples("fp32, other seeds", exact[0], 10 * per_class)
    rows.append(_row("fp32, other seeds", again, real, judge, reference))
    rows += [_row(name, samples(name, pipe), real, judge, reference) for name, pipe in others]
    for row in rows[3:]:
        row["passed"] = bool(row["accuracy"] >= rows[1]["accuracy"] - MAX_ACCURACY_LOSS)
    return {
        "engine": exact[0].engine.name,
        "guidance": GUIDANCE,
        "top_k": TOP_K,
        "top_p": TOP_P,
        "held_out": len(real.labels_N),
        "max_accuracy_loss": MAX_ACCURACY_LOSS,
        "rows": rows,
    }


def _split(pipes: Sequence[Pipeline]) -> DigitsSplit:
    """The real digits, once every bundle was seen to make such images."""
    for pipe in pipes[1:]:
        own, first = ((m.var.num_classes, m.vqvae.image_size) for m in (p.bundle.manifest for p in (pipe, pipes[0])))
        if own != first:
            raise RequestError(
                f"{pipe.bundle.path}: makes {own[0]} classes at {own[1]} px, {pipes[0].bundle.path} {first[0]} at "
                f"{first[1]}; give bundles of one model"
            )
    return digits_split(pipes[0].bundle.manifest.var, pipes[0].bundle.manifest.vqvae)


def _row(
    name: str,
    images: LabelledImages,
    real: LabelledImages,
    judge: DigitsJudge | None = None,
    fp32: LabelledImages | None = None,
) -> dict[str, Any]:
    if not np.isfinite(images.images_N3RR).all():
        raise RequestError(f"{name}: samples hold NaN or infinity; check the bundle with verify")
    ours_NF, real_NF = features_NF(images), features_NF(real)
    distance_to_real = FrechetDistance(Gaussian.of_rows(real_NF))

    def measure(rows_N: np.ndarray) -> float:
        return distance_to_real(Gaussian.of_rows(ours_NF, rows_N))

    distance = measure(np.arange(len(ours_NF)))
    precision, recall = precision_recall(real_NF, ours_NF)
    to_fp32 = None
    if fp32 is not None:
        to_fp32 = FrechetDistance(Gaussian.of_rows(features_NF(fp32)))(Gaussian.of_rows(ours_NF))
    return {
        "name": name,
        "images": len(ours_NF),
        "accuracy": None if judge is None else float(judge.right_N(images).mean()),
        "distance": distance,
        "interval": list(bootstrap_interval(measure, len(ours_NF), distance, repeats=BOOTSTRAP)),
        "precision": precision,
        "recall": recall,
        "to_fp32": to_fp32,
        "passed": None,
    }


def layout(data: dict[str, Any]) -> None:
    """The table for a terminal."""
    head, *lines = _lines(data)
    table = Table(*(Column(title, justify="right" if title else "left") for title in head))
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.print(table)
    for text in _legend(data):
        console.print(text, soft_wrap=True)


def markdown(data: dict[str, Any]) -> str:
    """The table as a page."""
    head, *lines = _lines(data)
    rule = ["---", *["---:"] * (len(head) - 1)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))
    legend = "\n".join(f"* {line}" for line in _legend(data))
    return f"# Samples of the digits example, judged\n\n{table}\n\n{legend}\n"


def _lines(data: dict[str, Any]) -> list[list[str]]:
    """A column for every set of samples."""
    sets = data["rows"]
    return [["", *(found["name"] for found in sets)], *([title, *map(cell, sets)] for title, cell in LINES)]


def _legend(data: dict[str, Any]) -> list[str]:
    settings = f"guidance {data['guidance']:g}, top-k {data['top_k'] or 'off'}, top-p {data['top_p']:g}"
    return [
        f"Engine {data['engine']}, {settings}, as many images of every digit; every bundle draws with the same seeds.",
        "accuracy: share seen as their digit by a support vector machine fitted on the real training digits.",
        f"distance to real: Fréchet, to {data['held_out']} digits held out, in the 64 features that the machine sees; "
        "the interval is for new draws of the images.",
        "precision: share of images near a real one; recall: share of real ones near an image (third neighbours).",
        "distance to fp32: the same to the samples in column fp32; what other seeds give is chance.",
        f"as good as fp32: an accuracy at most {100 * data['max_accuracy_loss']:g} percentage point lower.",
    ]
