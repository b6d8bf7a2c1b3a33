"""What `--precision auto` measures with: tokens that the model sees in use, and what its activations reach on them.

From classes: images drawn by the reference with the default sampling. From images, a folder per class: the tokens that
the VQVAE gives them. Axes: B images of the calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from var_deploy.bundle import SamplingDefaults
from var_deploy.errors import RequestError
from var_deploy.images import pixels_from_images
from var_train import VAR, VQVAE, Generation, generate
from var_train.checkpoint import CheckpointPair
from var_train.image_data import decode
from var_train.image_files import open_images

from .smoothing import smoothed_products

#: Images that are drawn where nothing is said, and that are taken from a folder at most.
DRAWN, TAKEN = 4, 8


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Calibration:
    """Labels, the reference's logits for given tokens, and the largest inputs of the smoothed products."""

    labels: list[int]
    guidance: float
    reference: Generation
    peaks: dict[str, Tensor]  #: product → largest |x| of every input channel, [D]
    source: str  #: for the report


def calibration(
    pair: CheckpointPair,
    given: str | None,
    class_names: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """given: class ids like "0,5,9", or a folder with a folder of images per class; None draws a few classes.

    class_names: of the model, to know its classes by their folders' names. Raises RequestError.
    """
    progress("reference model")
    var, vqvae = pair.models()
    sampling = SamplingDefaults()
    classes = pair.var.num_classes
    if given is None:
        labels = sorted({round(i * (classes - 1) / max(DRAWN - 1, 1)) for i in range(DRAWN)})
        tokens, source = None, f"classes {labels}"
    elif given and Path(given).is_dir():
        labels, tokens = _of_images(Path(given), vqvae, classes, class_names)
        source = f"{len(labels)} images"
    else:
        labels, tokens = _class_ids(given, classes), None
        source = f"classes {labels}"
    labels_B = torch.tensor(labels)
    with torch.no_grad():
        if tokens is None:
            progress(f"drawing {source}")
            generator = torch.Generator().manual_seed(0)
            tokens = generate(
                var,
                vqvae,
                labels_B,
                guidance=sampling.guidance,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                generator=generator,
            ).tokens
        progress(f"reference on {source}")
        with _peaks_of(var) as peaks:
            reference = generate(var, vqvae, labels_B, guidance=sampling.guidance, forced_tokens=tokens)
    return Calibration(labels=labels, guidance=sampling.guidance, reference=reference, peaks=peaks, source=source)


@contextmanager
def _peaks_of(var: VAR) -> Iterator[dict[str, Tensor]]:
    """Fills a dictionary with the largest inputs while the model runs."""
    peaks: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            peak_D = inputs[0].detach().abs().flatten(0, -2).amax(0)
            peaks[name] = torch.maximum(peaks[name], peak_D) if name in peaks else peak_D

        return hear

    handles = []
    for i in range(var.config.depth):
        block = var.get_submodule(f"blocks.{i}")
        for name, module in zip(smoothed_products(i), (block.attn, block.ffn), strict=True):
            assert isinstance(module, nn.Module)
            handles.append(module.register_forward_pre_hook(listen(name)))
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def _class_ids(text: str, classes: int) -> list[int]:
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        labels = [-1]
    if not all(0 <= label < classes for label in labels):
        raise RequestError(
            f"calibration: got {text!r}, expected class ids from 0 to {classes - 1}, like 0,5,9, or a folder with a "
            "folder of images per class"
        )
    return labels


def _of_images(
    folder: Path, vqvae: VQVAE, classes: int, class_names: Sequence[str] | None
) -> tuple[list[int], list[Tensor]]:
    """Labels and tokens of some images, evenly spread over the folder's."""
    images = open_images(folder)
    found = images.class_names
    if list(found) == [str(i) for i in range(len(found))] and len(found) <= classes:  # shards carry ids
        class_ids = list(range(len(found)))
    elif class_names is not None and set(found) <= set(class_names):
        class_ids = [list(class_names).index(name) for name in found]
    elif len(found) == classes:  # in the order that training gave them
        class_ids = list(range(classes))
    else:
        raise RequestError(
            f"calibration: {folder} has {len(found)} classes ({found[0]}, …), of which the model's {classes} are not "
            "told by name; give a folder for every class, or class names"
        )
    count = min(TAKEN, len(images))
    chosen = [i * len(images) // count for i in range(count)]
    pictures = []
    for i in chosen:
        try:
            pictures.append(decode(images.read(i)))
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise RequestError(f"calibration: {images.name(i)} cannot be read ({error}); take it out") from error
    pixels_B3RR = torch.from_numpy(pixels_from_images(pictures, vqvae.config.image_size))
    with torch.no_grad():
        return [class_ids[images.labels_N[i]] for i in chosen], vqvae.tokens(2 * pixels_B3RR - 1)
