"""Gradients → new weights: loss scaling, clipping, AdamW, and the running average of the weights.

An update whose gradients are not finite is left out, so one bad batch spoils nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from .configuration import Optimiser
from .parallel import bare, local, whole
from .recipe import parameter_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def adamw(model: nn.Module, settings: Optimiser) -> torch.optim.AdamW:
    """The optimiser of a run; its rate and decay are set at every iteration."""
    return torch.optim.AdamW(parameter_groups(bare(model)), lr=0.0, betas=settings.betas)


def loss_scaler(settings: Optimiser, device: torch.device) -> GradScaler:
    """Scales losses so that small gradients survive fp16; does nothing in the other precisions."""
    return GradScaler(device.type, enabled=settings.precision == "fp16")


def mixed_precision(settings: Optimiser, device: torch.device) -> torch.autocast:
    """Around forward passes: matrix products and convolutions in the run's precision."""
    return torch.autocast(device.type, DTYPES[settings.precision], enabled=settings.precision != "fp32")


def update(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: GradScaler, clip: float) -> float:
    """Applies the gradients that were accumulated, and drops them; returns the norm they had before clipping.

    Where the norm is not finite the weights stay as they are. The norm is of the whole gradient, the same in all
    processes, so all decide alike.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(parameters, clip)).item()
    if math.isfinite(norm) or scaler.is_enabled():  # a scaler leaves the update out by itself
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def is_finite(loss: float, norm: float, scaler: GradScaler) -> bool:
    """Whether a step was sound. A gradient that overflows under a loss scaler is: the scale is lowered for the next.

    A scale that has come below 1 cured nothing.
    """
    return math.isfinite(loss) and (math.isfinite(norm) or (scaler.is_enabled() and scaler.get_scale() >= 1))


class Average:
    """Exponential moving average of a model's weights, shared out as they are; empty with a decay of 0.

    The decay grows to its value as (1 + t)/(10 + t), so that the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = bare(model), decay
        #: By name; part of a checkpoint.
        self.weights: dict[str, Tensor] = {}
        if decay:
            self.weights = {name: p.detach().clone() for name, p in self._model.named_parameters()}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Takes in the weights after `iteration` (from 0)."""
        if self.weights:
            ours = [local(tensor) for tensor in self.weights.values()]
            theirs = [local(p.detach()) for p in self._model.parameters()]
            torch._foreach_lerp_(ours, theirs, 1 - min(self._decay, (1 + iteration) / (10 + iteration)))

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights within the context."""
        kept = {name: local(p).clone() for name, p in self._model.named_parameters() if name in self.weights}
        parameters = dict(self._model.named_parameters())
        for name in kept:
            local(parameters[name]).copy_(local(self.weights[name]))
        try:
            yield
        finally:
            for name, tensor in kept.items():
                local(parameters[name]).copy_(tensor)
