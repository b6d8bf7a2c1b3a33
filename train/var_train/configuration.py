"""A training run's configuration: one TOML file and options, checked as a whole before anything starts.

    [data]        path = "images"
    [model]       preset = "d16"      vqvae = "vae.safetensors"
    [optimiser]   epochs = 20

Unknown keys are errors. A preset's published recipe fills in what is not said, other defaults the rest; what came out
is stored with the run.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from var_deploy.config import HEAD_DIM, ConfigError, VARConfig, VQVAEConfig

from .presets import PRESETS
from .recipe import RECIPES, Progressive, Schedule

RunT = TypeVar("RunT", bound="Run")

#: Processes that decode images, where nothing is said.
WORKERS = min(4, os.cpu_count() or 1)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Data(_Section):
    """Images, and how they become batches."""

    path: str  #: a folder with a sub-folder per class, or WebDataset's tar shards, or tokens that were stored
    validation: str | None = None  #: the same, to measure on; None: the images of `path`'s own split `val`, if any
    batch: int = Field(ge=1)  #: images of one optimiser step, in all processes together
    workers: int = Field(default=WORKERS, ge=0)  #: that decode, per process; left out: at most 4, and one per core
    resolution: int | None = Field(default=None, ge=1)  #: of the square images; None: what scales and VQVAE make
    enlarge: float = Field(default=1.125, ge=1)  #: of the shorter side before the crop
    flip: bool = False


class Optimiser(_Section):
    """AdamW, its rates and its numbers; defaults are the published recipe's."""

    iterations: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)  #: peak; None: base_rate for every 256 images of a batch
    base_rate: float = Field(default=1e-4, gt=0)
    warmup: float = Field(default=0.02, ge=0, lt=1)  #: part of the run
    final: float = Field(default=0.1, ge=0, le=1)  #: rate at the end, as a part of the peak
    weight_decay: float = Field(default=0.05, ge=0)
    final_weight_decay: float | None = Field(default=None, ge=0)  #: None: the same
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(default=2.0, gt=0)  #: largest norm of the whole gradient
    accumulate: int = Field(default=1, ge=1)  #: parts of a batch that run one after the other
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    ema: float = Field(default=0.0, ge=0, lt=1)  #: decay of the averaged weights; 0: none
    nonfinite: int = Field(default=5, ge=1)  #: losses in a row that may be NaN or infinite; the run ends with the last

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.iterations is None) == (self.epochs is None):
            got = "neither" if self.epochs is None else "both"
            raise ValueError(f"got {got}, expected either iterations or epochs")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("expected betas from 0 to 1, without 1")
        return self


class Keeping(_Section):
    """What is written while the run goes on; in iterations."""

    checkpoint_every: int = Field(default=1000, ge=1)
    checkpoints: int = Field(default=2, ge=1)  #: kept beside the best
    log_every: int = Field(default=10, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)  #: validation and pictures; None: once per epoch
    pictures: int = Field(default=16, ge=1)  #: in a grid
    finished: Literal["fp32", "bf16", "fp16"] = "fp32"  #: numbers in the file of finished weights


class Execution(_Section):
    """How the work is done; changes nothing of the result but rounding."""

    parallel: Literal["ddp", "fsdp"] = "ddp"  #: several processes hold whole copies, or share the weights out
    attention: Literal["auto", "flex", "dense"] = "auto"  #: of VAR; auto: FlexAttention on CUDA
    compile: bool = False  #: transformer blocks, or encoder and decoder, by torch.compile
    checkpoint_blocks: bool = False  #: keep no activations within VAR's blocks but compute them again


class Run(_Section):
    """What both kinds of training have."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    data: Data
    optimiser: Optimiser
    keeping: Keeping = Keeping()
    execution: Execution = Execution()

    def iterations(self, images: int) -> int:
        """Optimiser steps of the whole run, for a data set of so many images."""
        if self.optimiser.iterations is not None:
            return self.optimiser.iterations
        assert self.optimiser.epochs is not None
        return max(1, round(self.optimiser.epochs * (images // self.data.batch)))

    def schedule(self, images: int) -> Schedule:
        """Rates over the run."""
        asked = self.optimiser
        return Schedule(
            iterations=self.iterations(images),
            learning_rate=asked.learning_rate or asked.base_rate * self.data.batch / 256,
            warmup=asked.warmup,
            final=asked.final,
            weight_decay=asked.weight_decay,
            final_weight_decay=asked.weight_decay if asked.final_weight_decay is None else asked.final_weight_decay,
        )

    def evaluate_every(self, images: int) -> int:
        """Iterations from one evaluation to the next."""
        return self.keeping.evaluate_every or max(1, images // self.data.batch)


class Transformer(_Section):
    """The VAR: a published preset, or sizes of one's own; scales and codes are those of the VQVAE."""

    vqvae: str  #: checkpoint file whose tokens it learns
    patch_nums: tuple[int, ...] | None = Field(
        default=None, min_length=2
    )  #: scales; None: those that the VQVAE's file says, or the preset's
    preset: str | None = None  #: d12, d16 … as in the paper
    depth: int | None = Field(default=None, ge=1)  #: without a preset
    heads: int | None = Field(default=None, ge=1)  #: of 64 channels each; None: as many as blocks
    shared_aln: bool = False
    drop_path: float | None = Field(default=None, ge=0, lt=1)  #: of the last block; None: 0.1·depth/24
    label_dropout: float = Field(default=0.1, ge=0, lt=1)
    gamma_scale: float = Field(default=1e-3, gt=0)  #: of the initial AdaLN weights for the gammas, `alng` as published
    using_znorm: bool = False  #: the VQVAE picks codes by cosine
    start_from: str | None = None  #: checkpoint file to fine-tune

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.preset is None) == (self.depth is None):
            raise ValueError("expected either preset or depth")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; known: {', '.join(PRESETS)}")
        if self.preset is not None and self.heads is not None:
            raise ValueError("expected no heads with a preset, which has as many as blocks")
        if self.preset is not None and self.shared_aln and not PRESETS[self.preset][2]:
            raise ValueError(f"got shared_aln with preset {self.preset}, which has an AdaLN projection in every block")
        return self

    @property
    def preset_scales(self) -> tuple[int, ...] | None:
        """For a VQVAE whose file does not say its own, as the published one."""
        return PRESETS[self.preset][1] if self.preset is not None else None

    def config(self, vqvae: VQVAEConfig, num_classes: int) -> VARConfig:
        """The model's configuration over a VQVAE's tokens."""
        depth, shared_aln = self.depth, self.shared_aln
        if self.preset is not None:
            depth, _, shared_aln = PRESETS[self.preset]
        assert depth is not None
        width = HEAD_DIM * (self.heads or depth)
        return VARConfig(
            patch_nums=vqvae.patch_nums,
            vocab_size=vqvae.vocab_size,
            z_channels=vqvae.z_channels,
            num_classes=num_classes,
            depth=depth,
            embed_dim=width,
            ffn_dim=4 * width,
            shared_aln=shared_aln,
        )


class ProgressiveScales(_Section):
    """The coarsest scales first; see `recipe.Progressive`."""

    first: int = Field(ge=1)
    until: float = Field(gt=0, le=1)
    ramp: float = Field(default=0.0, ge=0, lt=1)

    def schedule(self) -> Progressive:
        return Progressive(first=self.first, until=self.until, ramp=self.ramp)


class VARRun(Run):
    """`var-deploy train var`."""

    model: Transformer
    progressive: ProgressiveScales | None = None

    @model_validator(mode="before")
    @classmethod
    def _filled_by_recipe(cls, data: Any) -> Any:
        """What a preset's recipe says and the data do not."""
        model = data.get("model") if isinstance(data, dict) else None
        recipe = RECIPES.get(str(model.get("preset")), {}) if isinstance(model, dict) else {}
        for section, values in recipe.items():
            said = data.get(section, {})
            if isinstance(said, dict):
                drop = {"epochs"} if said.get("iterations") is not None else set()
                data = data | {section: {k: v for k, v in values.items() if k not in drop} | said}
        return data

    @model_validator(mode="after")
    def _one_scale_for_all(self) -> Self:
        if self.execution.parallel == "fsdp" and self.optimiser.precision == "fp16":
            raise ValueError(
                "execution.parallel: got 'fsdp' with fp16, expected bf16 or fp32: processes that hold parts of the "
                "gradient would not agree on its overflow"
            )
        return self


class Autoencoder(_Section):
    """The VQVAE's sizes; see `VQVAEConfig`."""

    patch_nums: tuple[int, ...]
    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_phi: int = 4
    start_from: str | None = None  #: checkpoint file to go on from, with new optimisers

    def config(self) -> VQVAEConfig:
        """Raises ConfigError where the sizes do not fit together."""
        return VQVAEConfig(**{name: value for name, value in self if name != "start_from"})


class ReconstructionLoss(_Section):
    """Weights of the terms; a weight of 0 leaves a term out."""

    l1: float = Field(default=1.0, ge=0)
    l2: float = Field(default=1.0, ge=0)
    quantizer: float = Field(default=1.0, ge=0)
    perceptual: float = Field(default=1.0, ge=0)
    perceptual_weights: str | None = None  #: file with VGG-16's weights; None: the term is left out, and said so
    adversarial: float = Field(default=0.5, ge=0)
    adversarial_start: float = Field(default=0.5, ge=0, le=1)  #: part of the run
    discriminator_width: int = Field(default=64, ge=8, multiple_of=8)
    discriminator_layers: int = Field(default=3, ge=1)  #: that halve the sides
    discriminator_rate: float = Field(default=1.0, gt=0)  #: learning rate as a part of the VQVAE's
    revive_every: int = Field(default=50, ge=1)  #: iterations after which entries that nothing falls on are placed anew
    revive_until: float = Field(default=0.7, ge=0, le=1)  #: part of the run


class VQVAERun(Run):
    """`var-deploy train vqvae`."""

    model: Autoencoder
    loss: ReconstructionLoss = ReconstructionLoss()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.model.config()
        if self.execution.parallel == "fsdp":
            raise ValueError(
                "execution.parallel: got 'fsdp', expected 'ddp': the weight of the adversarial term needs whole layers"
            )
        return self


def read_run(kind: type[RunT], path: Path, options: Sequence[str] = ()) -> RunT:
    """A file and options like `optimiser.epochs=10`, which win over it. Raises ConfigError, on one line."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error}); mend or name another file") from error
    for option in options:
        _set(data, option)
    try:
        return kind.model_validate(_tuples(data))
    except ConfigError as error:  # sizes that do not fit together
        raise ConfigError(f"{path}: model.{error}; mend the file or the option") from error
    except ValidationError as error:
        first, more = error.errors()[0], error.error_count() - 1
        place = ".".join(str(part) for part in first["loc"]) or "the file as a whole"
        got = "" if first["type"] in ("missing", "value_error") else f"got {first['input']!r}, "
        others = f" (and {more} more)" if more else ""
        raise ConfigError(f"{path}: {place}: {got}{_said(kind, first)}{others}; mend the file or the option") from error


def _said(kind: type[Run], problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        section: Any = kind
        for part in problem["loc"][:-1]:
            annotation = section.model_fields[part].annotation
            section = next(iter(get_args(annotation)), annotation)  # the section of one that may be left out
        return f"unknown key; known: {', '.join(section.model_fields)}"
    return str(problem["msg"]).removeprefix("Value error, ")


def _tuples(value: Any) -> Any:
    """TOML's arrays as the tuples that the sections hold."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _set(data: dict[str, Any], option: str) -> None:
    name, equals, text = option.partition("=")
    if not equals or not name:
        raise ConfigError(f"option {option!r}: expected NAME=VALUE, like optimiser.epochs=10; write it so")
    *sections, key = name.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"option {option!r}: {section!r} is not a section; see the file's sections")
    try:
        data[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        data[key] = text  # a word without quotes
