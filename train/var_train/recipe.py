"""The published training recipe as functions of the iteration: rates, weight decay, optimiser groups, scales trained.

Nothing here holds state, so a run continues from the number of its iteration alone. Sources: the paper's appendix and
the public release's defaults. Axes: B images, L tokens of all scales, V codebook entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_deploy.config import VARConfig

#: Parts of parameter names that the published recipe excludes from weight decay, beside everything one-dimensional.
NO_DECAY = ("pos_", "lvl_embed", "ada_gss", "scale_mul")

#: After the warm-up the published linear schedule stays at its peak for this part of what is left.
FLAT = 0.05


def _recipe(epochs: int, *, batch: int, gamma_scale: float, large: bool, decay: float = 0.05) -> dict[str, Any]:
    optimiser = {"epochs": epochs, "base_rate": 8e-5 if large else 1e-4, "final": 0.01 if large else 0.1}
    return {
        "data": {"batch": batch},
        "optimiser": optimiser | {"final_weight_decay": decay},
        "model": {"gamma_scale": gamma_scale},
    }


#: How the published models were trained, by the keys of a run's configuration. d12 is of the paper's scaling study,
#: which does not tell its recipe; it takes d16's.
RECIPES: dict[str, dict[str, Any]] = {
    "d12": _recipe(200, batch=768, gamma_scale=1e-3, large=False),
    "d16": _recipe(200, batch=768, gamma_scale=1e-3, large=False),
    "d20": _recipe(250, batch=768, gamma_scale=1e-3, large=False),
    "d24": _recipe(350, batch=768, gamma_scale=1e-4, large=True),
    "d30": _recipe(350, batch=1024, gamma_scale=1e-5, large=True, decay=0.08),
    "d36-s": _recipe(350, batch=768, gamma_scale=5e-6, large=True, decay=0.08),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate and weight decay of a run."""

    iterations: int
    learning_rate: float  #: peak
    warmup: float = 0.02  #: part of the iterations over which the rate rises linearly
    warmup_from: float = 0.005  #: rate at the first iteration, as a part of the peak
    final: float = 0.1  #: rate at the last iteration, as a part of the peak; 0.01 for d24 and larger
    weight_decay: float = 0.05
    final_weight_decay: float = 0.05  #: a cosine leads there

    @property
    def warmup_iterations(self) -> int:
        return round(self.warmup * self.iterations)

    def rate_at(self, iteration: int) -> float:
        """Learning rate: linear warm-up, flat, then linear to the end."""
        warmup = self.warmup_iterations
        if iteration < warmup:
            return self.learning_rate * (self.warmup_from + (1 - self.warmup_from) * iteration / warmup)
        passed = (iteration - warmup) / max(1, self.iterations - 1 - warmup)
        part = 1.0 if passed < FLAT else self.final + (1 - self.final) * (1 - passed) / (1 - FLAT)
        return self.learning_rate * part

    def weight_decay_at(self, iteration: int) -> float:
        passed = iteration / max(1, self.iterations - 1)
        half_cosine = 0.5 + 0.5 * math.cos(math.pi * passed)
        return self.final_weight_decay + (self.weight_decay - self.final_weight_decay) * half_cosine

    def apply(self, optimizer: torch.optim.Optimizer, iteration: int) -> None:
        """Sets both on groups made by `parameter_groups`."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate_at(iteration)
            group["weight_decay"] = self.weight_decay_at(iteration) if group["decayed"] else 0.0


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """The published groups: decay on matrices and kernels, none on biases, 1-D tensors and `NO_DECAY`."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim == 1 or name.endswith("bias") or any(part in name for part in NO_DECAY)
        (plain if exempt else decayed).append(parameter)
    return [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False}]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progressive:
    """Progressive training: the coarsest scales first, the others added one by one at even distances."""

    first: int  #: scales trained from the start, at least 1
    until: float  #: part of the iterations after which all scales are trained
    ramp: float = 0.0  #: part of the iterations over which a new scale's loss grows to its full weight

    def at(self, iteration: int, *, scales: int, schedule: Schedule) -> tuple[int, float]:
        """Scales trained at an iteration, and the weight of the newest one's loss in (0, 1]."""
        begin, end = schedule.warmup_iterations, self.until * schedule.iterations
        added = scales - self.first
        if added <= 0:
            return scales, 1.0
        span = max(end - begin, 1.0)
        progress = min(max((iteration - begin) / span, 0.0), 1.0)
        newest = math.floor(progress * added + 0.5)  # the n-th is added at (n − ½)/added of the way
        if newest == 0:
            return self.first, 1.0
        since = iteration - (begin + (newest - 0.5) / added * span)
        ramp = self.ramp * schedule.iterations
        return self.first + newest, 1.0 if ramp <= since else max(since / ramp, 0.01)


def token_loss(logits_BlV: Tensor, tokens_Bl: Tensor, config: VARConfig, *, newest: float = 1.0) -> Tensor:
    """Cross-entropy in nats: every token weighs 1/L, those of the last scale at hand `newest`/L; mean over images.

    l tokens of the first scales may be given instead of all L; the weight of a token is the same.
    """
    nats_Bl = F.cross_entropy(logits_BlV.flatten(0, 1), tokens_Bl.flatten(), reduction="none").view(tokens_Bl.shape)
    scales = next(k for k in range(1, config.num_scales + 1) if config.span(k - 1)[1] == tokens_Bl.shape[1])
    begin, end = config.span(scales - 1)
    weight_l = torch.full((end,), 1 / config.num_tokens, device=nats_Bl.device)
    weight_l[begin:] *= newest
    return (nats_Bl * weight_l).sum(dim=1).mean()
