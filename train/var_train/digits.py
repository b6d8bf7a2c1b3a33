"""The digits example: a data set for the trainer, and the judgement of what a model trained on it draws.

`python -m var_train.digits images OUT` writes the data set, `… quality` measures checkpoints; `make digits` trains the
ones that the repository ships, from `train/configs`.
Axes: N images, B images of a batch, R image side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from var_deploy.config import config_to_dict
from var_deploy.errors import run_command

from .checkpoint import load_pair
from .digits_data import DigitsSplit, load_split, moved, write_digits
from .digits_quality import LabelledImages, distance_summary, quality_report, rms, save_grid
from .generate import generate
from .recipe import token_loss
from .var import VAR
from .vqvae import VQVAE

VQVAE_FILE, VAR_FILE = "digits_vqvae.safetensors", "digits_var.safetensors"

AUGMENTED_REFERENCES = 16  # augmented variants of each training image that the copy check compares with
#: Sampling that the shipped checkpoints are judged at; 0 turns top-k off.
GUIDANCE, TOP_K, TOP_P = 2.0, 0, 0.95


def generate_digits(
    vqvae: VQVAE,
    var: VAR,
    *,
    per_class: int,
    guidance: float = GUIDANCE,
    top_k: int = TOP_K,
    top_p: float = TOP_P,
    seed: int = 0,
) -> LabelledImages:
    """`per_class` images of every digit from the reference sampler."""
    labels_N = torch.arange(var.config.num_classes).repeat_interleave(per_class)
    generator = torch.Generator().manual_seed(seed)
    images = [
        generate(var, vqvae, labels_B, guidance=guidance, top_k=top_k, top_p=top_p, generator=generator).image_B3RR
        for labels_B in labels_N.split(100)
    ]
    return LabelledImages(torch.cat(images).numpy(), labels_N.numpy())


@torch.no_grad()
def reconstruct(vqvae: VQVAE, images: LabelledImages) -> LabelledImages:
    """What the VQVAE makes of the images' tokens."""
    image_N3RR = vqvae.reconstruct(torch.from_numpy(images.images_N3RR) * 2 - 1).add(1).mul(0.5)
    return LabelledImages(image_N3RR.numpy(), images.labels_N)


def copy_check(vqvae: VQVAE, generated: LabelledImages, split: DigitsSplit) -> dict[str, dict[str, float]]:
    """Distance to the nearest training image or one of its augmentations, for generated and two yardsticks.

    `held_out` is what a model that generalises would show, `moved_copies` what one would that learnt the training
    images by heart under augmentation; both went through the VQVAE, as generated images do.
    """
    augmented = moved(split.train, seed=1, passes=AUGMENTED_REFERENCES)
    references = LabelledImages(
        np.concatenate([split.train.images_N3RR, augmented.images_N3RR]),
        np.concatenate([split.train.labels_N, augmented.labels_N]),
    )
    return {
        "generated": distance_summary(generated, references),
        "held_out": distance_summary(reconstruct(vqvae, split.held_out), references),
        "moved_copies": distance_summary(reconstruct(vqvae, moved(split.train, seed=2)), references),
    }


@torch.no_grad()
def cross_entropy(vqvae: VQVAE, var: VAR, images: LabelledImages) -> float:
    """Nats per token of images as they are."""
    image_N3RR, labels_N = torch.from_numpy(images.images_N3RR), torch.from_numpy(images.labels_N).long()
    tokens = vqvae.tokens(image_N3RR * 2 - 1)
    logits_NLV = var(labels_N, vqvae.quantize.teacher_forcing_input(tokens))
    return token_loss(logits_NLV, torch.cat(tokens, dim=1), var.config).item()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def images(
    out: Annotated[Path, typer.Argument(help="New directory for the data set.")],
    variants: Annotated[int, typer.Option(help="Times that every training digit is there, augmented.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the augmentation.")] = 0,
) -> None:
    """Writes the digits as a data set for `var-deploy train`."""
    train, held_out = write_digits(out, variants=variants, seed=seed)
    typer.echo(f"wrote {out}: {train} training and {held_out} validation images")


@app.command()
def quality(
    vae: Annotated[Path, typer.Option(help="VQVAE checkpoint.")],
    var: Annotated[Path, typer.Option(help="VAR checkpoint.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here, too.")] = None,
    per_class: Annotated[int, typer.Option(min=1, help="Images per digit.")] = 100,
    guidance: Annotated[float, typer.Option(help="Guidance strength at the last scale.")] = GUIDANCE,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = TOP_K,
    top_p: Annotated[float, typer.Option(help="0 keeps all tokens.")] = TOP_P,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    grid: Annotated[Path | None, typer.Option(help="Write a PNG with 20 images of each digit.")] = None,
) -> None:
    """Generates images and compares them with real ones."""
    split = load_split()
    sampling: dict[str, Any] = {
        "per_class": per_class,
        "guidance": guidance,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    pair = load_pair(var, vae)
    var_model, vqvae_model = pair.models()
    generated = generate_digits(vqvae_model, var_model, **sampling)
    report = {
        "config": {"vqvae": config_to_dict(pair.vqvae), "var": config_to_dict(pair.var)},
        "sampling": sampling,
        "file_bytes": {"vqvae": vae.stat().st_size, "var": var.stat().st_size},
        "reconstruction_rms": rms(reconstruct(vqvae_model, split.held_out), split.held_out),
        "cross_entropy": {
            "train": cross_entropy(vqvae_model, var_model, split.train),
            "held_out": cross_entropy(vqvae_model, var_model, split.held_out),
        },
        "copy_check": copy_check(vqvae_model, generated, split),
        **quality_report(generated, split.train, split.held_out),
    }
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if grid is not None:
        save_grid(generated, grid)
    _print_report(report)


def _print_report(report: dict[str, Any]) -> None:
    generated, held_out, copies = report["generated"], report["held_out"], report["copy_check"]
    table = Table("measure", "generated", "real, held out", "copies, moved")
    table.add_row("images", str(generated["images"]), str(held_out["images"]), "")
    table.add_row("distinct images", str(generated["distinct"]), str(held_out["distinct"]), "")
    table.add_row("SVM accuracy", f"{generated['accuracy']:.1%}", f"{held_out['accuracy']:.1%}", "")
    for key in ("min", "p5", "median"):
        near = f"{generated['distance'][key]:.4f}", f"{held_out['distance'][key]:.4f}"
        table.add_row(f"distance to the nearest training image, {key}", *near, "")
    for key in ("min", "p5", "median"):
        name = f"the same, training images moved as well, {key}"
        table.add_row(name, *(f"{copies[part][key]:.4f}" for part in ("generated", "held_out", "moved_copies")))
    console = Console()
    console.print(table)
    nats = report["cross_entropy"]
    console.print(f"cross-entropy per token: training {nats['train']:.3f}, held out {nats['held_out']:.3f} nats")


def main() -> None:
    """The command line; errors that a user can mend end it in one line."""
    run_command(app)


if __name__ == "__main__":
    main()
