"""Single-process training loops: batches of images and labels in, a trained VQVAE or VAR out, in place.

The optimiser follows the published recipe: AdamW β = (0.9, 0.95), no decay on biases and embeddings, warm-up, gradient
clip 2. Axes: B images, R image side, N vectors, C code width, S scales, V codebook entries, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from .codebook import record_usage, revive_unused
from .recipe import parameter_groups
from .var import VAR
from .vqvae import VQVAE

#: Endless training data: images [B, 3, R, R] in [−1, 1] and int64 labels [B].
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """One training run."""

    steps: int
    learning_rate: float
    weight_decay: float
    warmup: float = 0.02  #: part of the steps over which the rate rises linearly
    final: float = 0.01  #: rate at the last step, as a part of the peak; a cosine leads there
    clip: float = 2.0  #: largest norm of the whole gradient

    def rate(self, step: int) -> float:
        """Factor on the learning rate at a step, in (0, 1]."""
        warmup_steps = max(1, round(self.warmup * self.steps))
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, self.steps - 1 - warmup_steps)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


def train_vqvae(
    vqvae: VQVAE, batches: Batches, settings: LoopSettings, *, revive_every: int = 50, revive_until: float = 0.7
) -> list[float]:
    """Trains on L1 + L2 reconstruction + quantiser loss; returns the loss of every step.

    The codebook starts from residuals of the first batch. Until `revive_until` of the run, entries that almost no
    residual falls on are put onto residuals of the current batch every `revive_every` steps.
    """

    def step_loss(step: int, image_B3RR: Tensor) -> Tensor:
        if step == 0:
            nn.init.zeros_(vqvae.quantize.embedding.weight)
        if step % revive_every == 0 and step <= revive_until * settings.steps:
            f_BChh = vqvae.encode(image_B3RR).detach()
            revive_unused(vqvae.quantize, f_BChh, seed=step, first_row=0, rows=len(f_BChh))
        reconstruction_B3RR, quantizer_loss, tokens = vqvae(image_B3RR)
        record_usage(vqvae.quantize, tokens)
        difference_B3RR = reconstruction_B3RR - image_B3RR
        return difference_B3RR.abs().mean() + difference_B3RR.square().mean() + quantizer_loss

    return _optimise(vqvae, settings, "VQVAE", lambda step: step_loss(step, next(batches)[0]))


def train_var(var: VAR, vqvae: VQVAE, batches: Batches, settings: LoopSettings) -> list[float]:
    """Trains on the tokens that a frozen VQVAE gives the images; returns the cross-entropy (nats) of every step.

    The loss is the mean over all L positions. `var` carries its own label dropout and stochastic depth.
    """
    vqvae.eval()
    return _optimise(var, settings, "VAR", lambda _: token_cross_entropy(var, vqvae, *next(batches)))


def token_cross_entropy(var: VAR, vqvae: VQVAE, image_B3RR: Tensor, labels_B: Tensor) -> Tensor:
    """Mean over images and all L positions of −log p(token), in nats; differentiable in `var` alone."""
    with torch.no_grad():
        tokens = vqvae.tokens(image_B3RR)
        features_BlC = vqvae.quantize.teacher_forcing_input(tokens)
    logits_BLV = var(labels_B, features_BlC)
    return F.cross_entropy(logits_BLV.flatten(0, 1), torch.cat(tokens, dim=1).flatten())


def _optimise(model: nn.Module, settings: LoopSettings, name: str, step_loss: Callable[[int], Tensor]) -> list[float]:
    """`settings.steps` AdamW steps on `step_loss(step)`; leaves the model in evaluation mode."""
    decayed, plain = parameter_groups(model)
    groups = [{**decayed, "weight_decay": settings.weight_decay}, {**plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
    losses: list[float] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    model.train()
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=settings.steps, loss=math.nan)
        for step in range(settings.steps):
            loss = step_loss(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=losses[-1])
    model.eval()
    return losses
