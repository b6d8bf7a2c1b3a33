"""A run's configuration → its data and models on a device, checked, and trained.

Whatever is wrong with the configuration, the data or a checkpoint is said before the run's directory is made.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from var_deploy.config import ConfigError, VQVAEConfig, config_to_dict
from var_deploy.errors import CheckpointError

from . import run_folder
from .adversarial import PatchDiscriminator
from .checkpoint import load_vqvae, patch_nums_of
from .configuration import Data, Run, VARRun, VQVAERun
from .fine_tune import start_from
from .image_data import Crop
from .image_files import ImageFiles, open_images, splits_in
from .parallel import shared_out
from .perceptual import PerceptualDistance, load_perceptual
from .processes import by_first_process, rank
from .run_loop import Training, run_training
from .token_files import TokenFiles, is_token_folder, open_tokens
from .token_sources import EncodedImages, StoredTokens, TokenSource
from .train_var import VARTraining
from .train_vqvae import VQVAETraining
from .var import VAR
from .vqvae import VQVAE

log = logging.getLogger("var_train")


def train_var(run: VARRun, folder: Path, device: torch.device) -> Path:
    """Trains a VAR, or goes on with it, and returns the file of finished weights. Raises VarDeployError."""
    vqvae = frozen_vqvae(
        Path(run.model.vqvae),
        run.model.patch_nums,
        device,
        otherwise=run.model.preset_scales,
        using_znorm=run.model.using_znorm,
    )
    _check_resolution(run.data, vqvae.config)
    source, validation = _token_sources(run, vqvae, device)
    config = run.model.config(vqvae.config, len(source.class_names))
    torch.manual_seed(run.seed)
    var = VAR(config, label_dropout=run.model.label_dropout, drop_path=run.model.drop_path)
    var.init_weights(gamma_scale=run.model.gamma_scale)
    if run.model.start_from is not None:
        for line in start_from(var, Path(run.model.start_from), class_names=source.class_names):
            _say("%s: %s", run.model.start_from, line)
    training = VARTraining(run, var.to(device), vqvae, source, validation, device)
    return _run(training, run, folder)


def train_vqvae(run: VQVAERun, folder: Path, device: torch.device) -> Path:
    """Trains a VQVAE, or goes on with it, and returns the file of finished weights. Raises VarDeployError."""
    config = run.model.config()
    _check_resolution(run.data, config)
    images, validation = opened_images(run.data)
    torch.manual_seed(run.seed)
    vqvae = VQVAE(config)
    discriminator = None
    if run.loss.adversarial:
        discriminator = PatchDiscriminator(width=run.loss.discriminator_width, layers=run.loss.discriminator_layers)
        discriminator.to(device)
        _check_patches(discriminator, run.loss.discriminator_layers, config.image_size, device)
    if run.model.start_from is not None:
        there, state = load_vqvae(Path(run.model.start_from), config.patch_nums)
        if there != config:
            raise CheckpointError(
                f"{run.model.start_from}: got a VQVAE with {there}, expected {config}; give its sizes in [model]"
            )
        vqvae.load_state_dict(state)
    training = VQVAETraining(run, vqvae.to(device), discriminator, _perceptual(run, device), images, validation, device)
    return _run(training, run, folder)


def _run(training: VARTraining | VQVAETraining, run: Run, folder: Path) -> Path:
    kept: Training = training
    with ExitStack() as stack:
        by_first_process(lambda: stack.enter_context(run_folder.locked(folder)))
        by_first_process(lambda: run_folder.begin(folder, description(kept, run)))
        return run_training(kept, run, folder)


def description(training: Training, run: Run) -> dict[str, Any]:
    """What a run is, for its `run.json`."""
    return {
        "kind": training.kind,
        "configuration": run.model_dump(mode="json"),
        "model": config_to_dict(training.config),
        "classes": training.state.values["class_names"],
        "images": training.data.count,
        "iterations": run.iterations(training.data.count),
        "batch": training.data.size,
        "parameters": training.parameters,
    }


def frozen_vqvae(
    path: Path,
    patch_nums: tuple[int, ...] | None,
    device: torch.device,
    *,
    otherwise: tuple[int, ...] | None = None,
    using_znorm: bool = False,
) -> VQVAE:
    """A trained VQVAE; `patch_nums` None: the scales that its file says, `otherwise` where it says none.

    Raises CheckpointError, ConfigError.
    """
    patch_nums = patch_nums or patch_nums_of(path) or otherwise
    if patch_nums is None:
        raise ConfigError(f"{path}: does not say its scales; give them as patch_nums, or a preset that has them")
    config, state = load_vqvae(path, patch_nums, using_znorm=using_znorm)
    vqvae = VQVAE(config)
    vqvae.load_state_dict(state)
    return vqvae.to(device).eval().requires_grad_(False)


def digest_of(vqvae: VQVAE) -> str:
    """sha256 over all that decides which tokens an image gets."""
    digest = hashlib.sha256(repr(vqvae.config).encode())
    for key, tensor in sorted(vqvae.state_dict().items()):
        if not key.startswith(("decoder.", "post_quant_conv.", "quantize.ema_")):
            digest.update(key.encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def opened_images(data: Data) -> tuple[ImageFiles, ImageFiles | None]:
    """The training images, and those kept apart. Raises DataError, ConfigError."""
    root = Path(data.path)
    images = open_images(root)
    validation = None
    if data.validation is not None:
        kept = Path(data.validation)
        if is_token_folder(kept):
            raise ConfigError(
                f"data.validation: got stored tokens in {kept}, expected images, as in data.path; give those"
            )
        validation = open_images(kept, split="val" if "val" in splits_in(kept) else "train")
    elif "val" in splits_in(root):
        validation = open_images(root, split="val")
    if validation is not None:
        _check_classes(data, images.class_names, validation.class_names)
    return images, validation


def _check_resolution(data: Data, config: VQVAEConfig) -> None:
    if data.resolution is None:
        return
    if data.resolution % config.downsampling:
        raise ConfigError(
            f"data.resolution: got {data.resolution}, expected a multiple of {config.downsampling}, by which the VQVAE "
            "reduces images; change one of them"
        )
    if data.resolution != config.image_size:
        raise ConfigError(
            f"data.resolution: got {data.resolution}, expected {config.image_size}: the last scale's side "
            f"{config.latent_size} times {config.downsampling}; change the scales or the resolution"
        )


def _token_sources(run: VARRun, vqvae: VQVAE, device: torch.device) -> tuple[TokenSource, TokenSource | None]:
    data = run.data

    def stored(path: Path) -> TokenFiles:
        tokens = open_tokens(path)
        if tokens.vqvae_sha256 != digest_of(vqvae):
            raise ConfigError(
                f"{path}: these tokens are of another VQVAE than {run.model.vqvae}; give that one, or store them anew"
            )
        return tokens

    def encoded(images: ImageFiles) -> TokenSource:
        at_once = max(1, (shared_out(data.batch, 1).stop - shared_out(data.batch, 1).start) // run.optimiser.accumulate)
        crop = Crop(side=vqvae.config.image_size, random=True, flip=data.flip, enlarge=data.enlarge)
        return EncodedImages(images, crop, vqvae, device=device, at_once=at_once, workers=data.workers, seed=run.seed)

    if not is_token_folder(Path(data.path)):
        images, kept = opened_images(data)
        return encoded(images), encoded(kept) if kept is not None else None
    tokens = stored(Path(data.path))
    _check_crops(data, tokens)
    source: TokenSource = StoredTokens(tokens, device)
    if data.validation is None:
        return source, None
    path = Path(data.validation)
    if is_token_folder(path):
        validation: TokenSource = StoredTokens(stored(path), device)
    else:
        validation = encoded(open_images(path, split="val" if "val" in splits_in(path) else "train"))
    _check_classes(data, source.class_names, validation.class_names)
    return source, validation


def _check_classes(data: Data, ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    if ours != theirs:
        different = sorted(set(ours) ^ set(theirs)) or ["their order"]
        raise ConfigError(
            f"data.validation: got {len(theirs)} classes, expected the {len(ours)} of {data.path} (first difference: "
            f"{different[0]}); give images of the same classes"
        )


def _check_crops(data: Data, tokens: TokenFiles) -> None:
    """Stored tokens were cropped when they were stored."""
    for name, was in (("enlarge", tokens.crop.enlarge), ("flip", tokens.crop.flip)):
        if name in data.model_fields_set and getattr(data, name) != was:
            raise ConfigError(
                f"data.{name}: got {getattr(data, name)}, but the tokens in {data.path} were stored with {was}; leave "
                "it out, or store tokens anew"
            )


def _check_patches(discriminator: PatchDiscriminator, layers: int, side: int, device: torch.device) -> None:
    try:
        with torch.no_grad():
            discriminator(torch.zeros(1, 3, side, side, device=device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"loss.discriminator_layers: got {layers}, for which images of {side} pixels are too small; lower it, or "
            "set loss.adversarial to 0"
        ) from error


def _perceptual(run: VQVAERun, device: torch.device) -> PerceptualDistance | None:
    if not run.loss.perceptual:
        return None
    if run.loss.perceptual_weights is None:
        _say("loss.perceptual_weights is not given, so the perceptual term is off")
        return None
    return load_perceptual(Path(run.loss.perceptual_weights)).to(device)


def _say(message: str, *values: object) -> None:
    """A warning, once and not by every process."""
    if rank() == 0:
        log.warning(message, *values)
