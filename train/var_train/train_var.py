"""VAR training: tokens of the finer scales from those of the coarser ones, by the published recipe.

Axes: B images of this process, G images of a global batch, L tokens of all scales, l tokens of the scales trained, K
scales, C code width, V codebook entries, U random numbers of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from var_deploy.config import ConfigError, VARConfig

from .configuration import VARRun
from .generate import generate
from .image_data import ROWS, GlobalBatches
from .parallel import bare, ddp, fsdp, gradients_stay, reshard, shared_out, whole_state
from .pictures import picture_grid
from .processes import average_over_processes, rank, sum_over_processes
from .recipe import Progressive, token_loss
from .run_loop import Evaluation, Step, Values
from .run_state import RunState
from .token_sources import Tokens, TokenSource
from .updates import Average, adamw, is_finite, loss_scaler, mixed_precision, update
from .var import VAR, flex_attention_fails
from .vqvae import VQVAE

log = logging.getLogger("var_train")

#: An entry counts as used where it is the likeliest token this often, in units of what all would be if used evenly.
USED = 1e-3

#: Sampling of the pictures: the paper's settings.
GUIDANCE, TOP_K, TOP_P = 1.5, 900, 0.96


class VARTraining:
    """A run of `var-deploy train var`; see `run_loop.Training`."""

    kind = "var"

    def __init__(
        self,
        run: VARRun,
        var: VAR,
        vqvae: VQVAE,
        source: TokenSource,
        validation: TokenSource | None,
        device: torch.device,
    ) -> None:
        """Both models are on the device; `var` with its initial weights, the same in all processes, `vqvae` frozen."""
        self._run, self._vqvae, self._device = run, vqvae, device
        self._source, self._validation = source, validation
        self.config = config = var.config
        self.data = GlobalBatches(count=len(source), size=run.data.batch, seed=run.seed)
        self._rows = shared_out(run.data.batch, run.optimiser.accumulate)
        self._schedule = run.schedule(len(source))
        if run.progressive is not None and run.progressive.first > config.num_scales:
            raise ConfigError(
                f"progressive.first: got {run.progressive.first}, expected at most {config.num_scales}, all of them"
            )
        self._progressive = (
            run.progressive.schedule() if run.progressive else Progressive(first=config.num_scales, until=1)
        )
        var.flex_attention = _takes_flex_attention(run, device)
        var.checkpoint_blocks = run.execution.checkpoint_blocks
        if run.execution.compile:
            for block in var.blocks:
                block.compile()
        self.parameters = sum(p.numel() for p in var.parameters())
        self._model = fsdp(var, var.blocks, device) if run.execution.parallel == "fsdp" else ddp(var)
        self._optimizer = adamw(self._model, run.optimiser)
        self._scaler = loss_scaler(run.optimiser, device)
        self._average = Average(self._model, run.optimiser.ema)
        self.state = RunState(
            models={"var": self._model},
            optimizers={"var": self._optimizer},
            ema=self._average.weights,
            scaler=self._scaler,
            values={"class_names": list(source.class_names)},
        )

    def batches(self, start: int) -> Iterator[Tokens]:
        return self._source.training(self.data, self._rows, start)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def step(self, batch: Tokens, *, measure: bool) -> Step:
        settings, iteration = self._run.optimiser, batch.iteration
        self._model.train()
        self._schedule.apply(self._optimizer, iteration)
        scales, newest = self._progressive.at(iteration, scales=self.config.num_scales, schedule=self._schedule)
        uniforms_UB = row_uniforms(self._run.seed, iteration, bare(self._model).num_uniforms, self.data.size)[
            :, self._rows
        ]
        parts = zip(
            batch.labels_B.chunk(settings.accumulate),
            batch.tokens_BL.chunk(settings.accumulate),
            uniforms_UB.to(self._device).chunk(settings.accumulate, dim=1),
            strict=True,
        )
        total = torch.zeros((), device=self._device)
        measured = _Sums(self.config, self._device)
        for number, (labels_B, tokens_BL, of_part_UB) in enumerate(parts, 1):
            with gradients_stay(self._model, last=number == settings.accumulate):
                logits_BlV = self._logits(labels_B, tokens_BL, scales, of_part_UB)
                tokens_Bl = tokens_BL[:, : logits_BlV.shape[1]]
                loss = token_loss(logits_BlV, tokens_Bl, self.config, newest=newest) / settings.accumulate
                self._scaler.scale(loss).backward()
            total += loss.detach()
            if measure:
                measured.add(logits_BlV.detach(), tokens_Bl)
        average_over_processes([total])
        norm = update(self._model, self._optimizer, self._scaler, settings.clip)
        objective = total.item()
        finite = is_finite(objective, norm, self._scaler)
        if finite:
            self._average.update(iteration)
        values: dict[str, float | list[float]] = {}
        if measure:
            values = {
                **measured.values(),
                "loss": objective,  # as optimised: a newest scale may count for less
                "gradient_norm": norm,
                "learning_rate": self._schedule.rate_at(iteration),
                "weight_decay": self._schedule.weight_decay_at(iteration),
                "scales": float(scales),
            }
            if self._scaler.is_enabled():
                values["loss_scale"] = self._scaler.get_scale()
        return Step(loss=objective, gradient_norm=norm, finite=finite, values=values)

    def _logits(self, labels_B: Tensor, tokens_BL: Tensor, scales: int, uniforms_UB: Tensor | None) -> Tensor:
        """Teacher forcing of the first scales: [B, l, V] in float32."""
        per_scale = tokens_BL.split(self.config.tokens_per_scale, dim=1)
        with torch.no_grad():
            features_BLC = self._vqvae.quantize.teacher_forcing_input(list(per_scale))
        length = self.config.span(scales - 1)[1] - self.config.tokens_per_scale[0]
        with mixed_precision(self._run.optimiser, self._device):
            logits_BlV: Tensor = self._model(labels_B, features_BLC[:, :length], uniforms_UB)
        return logits_BlV

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        self._model.eval()
        values: Values = {}
        score = None
        corrupt: tuple[str, ...] = ()
        if self._validation is not None:
            sums = _Sums(self.config, self._device)
            with self._average.in_place():
                for batch in self._validation.evaluation(self._run.data.batch // self._run.optimiser.accumulate):
                    corrupt += batch.corrupt
                    logits_BLV = self._logits(batch.labels_B, batch.tokens_BL, self.config.num_scales, None)
                    sums.add(logits_BLV[: batch.counted], batch.tokens_BL[: batch.counted])
                reshard(self._model)
            values = {f"validation_{name}": value for name, value in sums.values().items()}
            loss = values["validation_loss"]
            score = loss if isinstance(loss, float) else None
        return Evaluation(values=values, score=score, corrupt=corrupt, pictures_HW3=self._pictures())

    def _pictures(self) -> np.ndarray | None:
        """A grid of samples of classes at even distances, each with the same random numbers every time."""
        state, _ = self.finished()
        if rank() != 0:
            return None
        with torch.device("meta"):
            var = VAR(self.config)
        var.load_state_dict(state, assign=True)
        count = min(self._run.keeping.pictures, max(self.config.num_classes, 1) * 8)
        labels_B = torch.linspace(0, self.config.num_classes - 1e-3, count).long().to(self._device)
        image_B3RR = generate(
            var.eval(),
            self._vqvae,
            labels_B,
            guidance=GUIDANCE,
            top_k=TOP_K,
            top_p=TOP_P,
            generator=torch.Generator(self._device).manual_seed(self._run.seed),
        ).image_B3RR
        return picture_grid(image_B3RR)

    def finished(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = whole_state(bare(self._model), self._average.weights)
        return state, {"class_names": list(self._source.class_names)}


class _Sums:
    """Loss and accuracy of tokens, all positions and by scale, over batches and processes."""

    def __init__(self, config: VARConfig, device: torch.device) -> None:
        self._config = config
        self._sums_3K = torch.zeros(3, config.num_scales, dtype=torch.float64, device=device)  # nats, right, tokens
        self._likeliest_V = torch.zeros(config.vocab_size, device=device)

    @torch.no_grad()
    def add(self, logits_BlV: Tensor, tokens_Bl: Tensor) -> None:
        if not len(tokens_Bl):
            return
        nats_Bl = F.cross_entropy(logits_BlV.flatten(0, 1), tokens_Bl.flatten(), reduction="none").view(tokens_Bl.shape)
        likeliest_Bl = logits_BlV.argmax(dim=-1)
        self._likeliest_V += likeliest_Bl.flatten().bincount(minlength=self._config.vocab_size)
        right_Bl = likeliest_Bl == tokens_Bl
        for k in range(self._config.num_scales):
            begin, end = self._config.span(k)
            if end > tokens_Bl.shape[1]:
                break
            self._sums_3K[0, k] += nats_Bl[:, begin:end].sum(dtype=torch.float64)
            self._sums_3K[1, k] += right_Bl[:, begin:end].sum()
            self._sums_3K[2, k] += tokens_Bl[:, begin:end].numel()

    def values(self) -> dict[str, float | list[float]]:
        """Of all processes together; a scale that is not trained yet has NaN, and no part in the mean over tokens."""
        nats_K, right_K, tokens_K = sum_over_processes(self._sums_3K).cpu().unbind(0)
        share_V = sum_over_processes(self._likeliest_V) / self._likeliest_V.sum()
        return {
            "codebook_usage": (share_V > USED / self._config.vocab_size).float().mean().item(),
            "loss": (nats_K.sum() / tokens_K.sum()).item(),
            "loss_last": (nats_K / tokens_K)[-1].item(),
            "accuracy": (right_K.sum() / tokens_K.sum()).item(),
            "accuracy_last": (right_K / tokens_K)[-1].item(),
            "loss_by_scale": (nats_K / tokens_K).tolist(),
            "accuracy_by_scale": (right_K / tokens_K).tolist(),
        }


def row_uniforms(seed: int, iteration: int, count: int, rows: int) -> Tensor:
    """float32 [U, G] in [0, 1): the random numbers of every row of a global batch, whichever process trains it."""
    words = np.random.Philox(key=np.array([seed, ROWS], np.uint64), counter=np.array([0, 0, iteration, 0], np.uint64))
    raw_UG = words.random_raw(count * rows).reshape(count, rows)
    return torch.from_numpy((raw_UG >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def _takes_flex_attention(run: VARRun, device: torch.device) -> bool:
    asked = run.execution.attention
    if asked == "dense":
        return False
    if device.type != "cuda":
        why = f"it trains on CUDA only, this is {device}"
    elif asked == "flex":
        return True
    else:
        why = flex_attention_fails(device)
    if asked == "flex":
        raise ConfigError(f"execution.attention: got 'flex', but {why}; give 'dense' or 'auto'")
    if why and rank() == 0:
        log.warning("attention with the dense mask, not FlexAttention: %s", why)
    return not why
