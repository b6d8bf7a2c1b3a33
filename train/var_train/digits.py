"""A small VAR on scikit-learn's handwritten digits: the two configurations, and the command line around them.

`python -m var_train.digits train` makes the checkpoints that the repository ships, `… quality` measures them.
Axes: N images, B images of a batch, R image side.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from var_deploy.config import VARConfig, VQVAEConfig, config_to_dict
from var_deploy.errors import CheckpointError, VarDeployError

from .digits_data import DigitsSplit, batches, load_split, moved
from .digits_quality import (
    LabelledImages,
    distance_summary,
    quality_report,
    rms,
    save_grid,
)
from .generate import generate
from .loops import LoopSettings, token_cross_entropy, train_var, train_vqvae
from .var import VAR
from .vqvae import VQVAE

PATCH_NUMS = (1, 2, 3, 4)
VQVAE_CONFIG = VQVAEConfig(
    patch_nums=PATCH_NUMS, vocab_size=256, z_channels=32, ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1
)
VAR_CONFIG = VARConfig(
    patch_nums=PATCH_NUMS,
    vocab_size=VQVAE_CONFIG.vocab_size,
    z_channels=VQVAE_CONFIG.z_channels,
    num_classes=10,
    depth=6,
    embed_dim=192,
    ffn_dim=768,
)
VQVAE_FILE, VAR_FILE = "digits_vqvae.safetensors", "digits_var.safetensors"

BATCH_SIZE = 64
VQVAE_SETTINGS = LoopSettings(steps=1200, learning_rate=1e-3, weight_decay=0.01)
VAR_SETTINGS = LoopSettings(steps=1400, learning_rate=1e-3, weight_decay=0.05)
DROP_PATH = 0.1
AUGMENTED_REFERENCES = 16  # augmented variants of each training image that the copy check compares with
#: Sampling that the shipped checkpoints are judged at; 0 turns top-k off.
GUIDANCE, TOP_K, TOP_P = 2.0, 0, 0.95


def save_half(model: nn.Module, path: Path) -> None:
    """Writes the plain state dict with floats as float16, half the size."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, path)


def load_models(vqvae_file: Path, var_file: Path) -> tuple[VQVAE, VAR]:
    """The digits models in float32 from files that `train` wrote."""
    vqvae, var = VQVAE(VQVAE_CONFIG).eval(), VAR(VAR_CONFIG).eval()
    for model, path in ((vqvae, vqvae_file), (var, var_file)):
        model.load_state_dict(_checked_state(path, model))
    return vqvae, var


def _checked_state(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors with floats as float32, after comparing names and shapes with the model's."""
    advice = "give the file that `python -m var_train.digits train` wrote for it"
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {advice}") from error
    expected = {(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    differing = sorted(expected ^ {(name, tuple(tensor.shape)) for name, tensor in stored.items()})
    if differing:
        raise CheckpointError(
            f"{path}: not the {type(model).__name__} of the digits example, {len(differing)} names or shapes differ, "
            f"the first is {differing[0]}; {advice}"
        )
    return {k: v.float() if v.is_floating_point() else v for k, v in stored.items()}


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
    labels_N = torch.arange(VAR_CONFIG.num_classes).repeat_interleave(per_class)
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
    return token_cross_entropy(var, vqvae, image_N3RR * 2 - 1, labels_N).item()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the two checkpoints and training.json.")],
    seed: Annotated[int, typer.Option(help="Of initial weights, batches, augmentation and dropout.")] = 0,
) -> None:
    """Trains the VQVAE, then the VAR on its tokens."""
    out.mkdir(parents=True, exist_ok=True)
    images = load_split().train
    torch.manual_seed(seed)
    vqvae = VQVAE(VQVAE_CONFIG)
    var = VAR(VAR_CONFIG, drop_path=DROP_PATH)
    var.init_weights()
    started = time.perf_counter()
    vqvae_losses = train_vqvae(vqvae, batches(images, BATCH_SIZE, seed), VQVAE_SETTINGS)
    save_half(vqvae, out / VQVAE_FILE)
    between = time.perf_counter()
    var_losses = train_var(var, vqvae, batches(images, BATCH_SIZE, seed + 1), VAR_SETTINGS)
    save_half(var, out / VAR_FILE)
    ended = time.perf_counter()
    entries_used = int((vqvae.quantize.ema_vocab_hit_SV.sum(dim=0) > 0.1).sum())
    record = {
        "seed": seed,
        "vqvae": {
            **_training_record(vqvae, vqvae_losses, between - started),
            "codebook_entries_used": entries_used,
        },
        "var": _training_record(var, var_losses, ended - between),
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    Console().print(f"wrote {out / VQVAE_FILE}, {out / VAR_FILE} in {ended - started:.0f} s")


def _training_record(model: nn.Module, losses: list[float], seconds: float) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": len(losses),
        "seconds": round(seconds, 1),
        "mean_loss_of_last_50_steps": float(np.mean(losses[-50:])),
    }


@app.command()
def quality(
    vae: Annotated[Path, typer.Option(help="VQVAE checkpoint.")],
    var: Annotated[Path, typer.Option(help="VAR checkpoint.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here, too.")] = None,
    training: Annotated[Path | None, typer.Option(help="training.json to copy into the report.")] = None,
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
    vqvae_model, var_model = load_models(vae, var)
    generated = generate_digits(vqvae_model, var_model, **sampling)
    report = {
        "config": {"vqvae": config_to_dict(VQVAE_CONFIG), "var": config_to_dict(VAR_CONFIG)},
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
    if training is not None:
        report["training"] = json.loads(training.read_text())
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
    try:
        app()
    except VarDeployError as error:
        Console(stderr=True).print(f"error: {error}", markup=False)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
