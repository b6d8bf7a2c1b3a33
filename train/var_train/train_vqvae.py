"""Training of the multi-scale VQVAE: reconstruction, commitment and codebook terms, and on request a perceptual and an
adversarial one, with a watch on the codebook's health.

Axes: B images of this process, R image side, h side of the feature map, C code width, S scales, V codebook entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torchmetrics.functional.image import structural_similarity_index_measure

from .adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from .codebook import perplexity, record_usage, revive_unused, usage
from .configuration import VQVAERun
from .image_data import Crop, GlobalBatches, ImageBatch, evaluation_shares, share_batches, training_batches
from .image_files import ImageFiles
from .parallel import bare, ddp, gradients_stay, shared_out, whole_state
from .perceptual import PerceptualDistance
from .pictures import normalised, picture_grid
from .processes import average_over_processes, sum_over_processes
from .run_loop import Evaluation, Step
from .run_state import RunState
from .updates import Average, adamw, is_finite, loss_scaler, mixed_precision, update
from .vqvae import VQVAE

#: Of the discriminator.
_NO_SCALER = GradScaler(enabled=False)

#: Training images that are measured on where none are kept apart.
MEASURED = 256


class VQVAETraining:
    """A run of `var-deploy train vqvae`; see `run_loop.Training`."""

    kind = "vqvae"

    def __init__(
        self,
        run: VQVAERun,
        vqvae: VQVAE,
        discriminator: PatchDiscriminator | None,
        perceptual: PerceptualDistance | None,
        images: ImageFiles,
        validation: ImageFiles | None,
        device: torch.device,
    ) -> None:
        """The modules are on the device with their initial weights, the same in all processes."""
        self._run, self._device, self._perceptual = run, device, perceptual
        self._images, self._validation = images, validation
        self.config = vqvae.config
        side = vqvae.config.image_size
        self._crop = Crop(side=side, random=True, flip=run.data.flip, enlarge=run.data.enlarge)
        self.data = GlobalBatches(count=len(images), size=run.data.batch, seed=run.seed)
        self._rows = shared_out(run.data.batch, run.optimiser.accumulate)
        self._schedule = run.schedule(len(images))
        self._leave_out_unused_phi(vqvae)
        self.parameters = sum(p.numel() for p in vqvae.parameters())
        if run.execution.compile:
            vqvae.encoder.compile()
            vqvae.decoder.compile()
        self._model = ddp(vqvae)
        self._optimizer = adamw(self._model, run.optimiser)
        self._scaler = loss_scaler(run.optimiser, device)
        self._average = Average(self._model, run.optimiser.ema)
        models: dict[str, nn.Module] = {"vqvae": self._model}
        optimizers: dict[str, torch.optim.Optimizer] = {"vqvae": self._optimizer}
        self._discriminator: nn.Module | None = None
        if discriminator is not None:
            models["discriminator"] = self._discriminator = ddp(discriminator)
            optimizers["discriminator"] = adamw(self._discriminator, run.optimiser)
            self._discriminator_optimizer = optimizers["discriminator"]
        self.state = RunState(
            models=models,
            optimizers=optimizers,
            ema=self._average.weights,
            scaler=self._scaler,
            values={"class_names": list(images.class_names), "patch_nums": list(vqvae.config.patch_nums)},
        )

    @staticmethod
    def _leave_out_unused_phi(vqvae: VQVAE) -> None:
        """Few scales may leave a φ without use: it gets no gradient, for which DDP would wait."""
        used = {vqvae.config.phi_index(k) for k in range(vqvae.config.num_scales)}
        for i in range(vqvae.config.num_phi):
            vqvae.get_submodule(vqvae.config.phi_key(i)).requires_grad_(i in used)

    @property
    def _vqvae(self) -> VQVAE:
        model: VQVAE = bare(self._model)
        return model

    @property
    def _last_layer(self) -> nn.Parameter:
        return self._vqvae.decoder.conv_out.weight  # type: ignore[return-value]

    def batches(self, start: int) -> Iterator[ImageBatch]:
        data = self._run.data
        return training_batches(
            self._images,
            self._crop,
            self.data,
            rows=self._rows,
            start=start,
            workers=data.workers,
            seed=self._run.seed,
        )

    def name(self, index: int) -> str:
        return self._images.name(index)

    def step(self, batch: ImageBatch, *, measure: bool) -> Step:
        settings, iteration = self._run.optimiser, batch.iteration
        self._model.train()
        self._schedule.apply(self._optimizer, iteration)
        image_B3RR = normalised(batch.images_BCRR, self._device)
        revived = self._revive(iteration, image_B3RR)
        adversarial = self._adversarial_at(iteration)
        sums = _Terms(self._device)
        fakes: list[Tensor] = []
        tokens_of_parts: list[list[Tensor]] = []
        parts = image_B3RR.chunk(settings.accumulate)
        for number, part_B3RR in enumerate(parts, 1):
            with gradients_stay(self._model, last=number == len(parts)):
                loss, fake_B3RR, tokens = self._loss(part_B3RR, adversarial, sums, 1 / len(parts))
                self._scaler.scale(loss / len(parts)).backward()
            tokens_of_parts.append(tokens)
            fakes.append(fake_B3RR)
        norm = update(self._model, self._optimizer, self._scaler, settings.clip)
        if adversarial:
            self._train_critic(iteration, parts, fakes, sums)
        terms = sums.values()
        finite = is_finite(terms["loss"], norm, self._scaler)
        health: dict[str, list[float]] = {}
        if finite:
            self._average.update(iteration)
            hits_SV = record_usage(self._vqvae.quantize, [torch.cat(t) for t in zip(*tokens_of_parts, strict=True)])
            if measure:
                health = {"usage_by_scale": usage(hits_SV), "perplexity_by_scale": perplexity(hits_SV)}
        values: dict[str, float | list[float]] = {}
        if measure:
            values = {
                **terms,
                **health,
                "revived": float(revived),
                "gradient_norm": norm,
                "learning_rate": self._schedule.rate_at(iteration),
                "weight_decay": self._schedule.weight_decay_at(iteration),
            }
        return Step(loss=terms["loss"], gradient_norm=norm, finite=finite, values=values)

    def _revive(self, iteration: int, image_B3RR: Tensor) -> int:
        """Places unused entries of the codebook anew; at the start all of them, on what the first batch leaves over."""
        loss = self._run.loss
        if iteration % loss.revive_every or iteration > loss.revive_until * self._schedule.iterations:
            return 0
        quantizer = self._vqvae.quantize
        if iteration == 0:
            if self._run.model.start_from is not None:  # its codes are in use, whatever its statistics say
                return 0
            nn.init.zeros_(quantizer.embedding.weight)
        with torch.no_grad(), mixed_precision(self._run.optimiser, self._device):
            f_BChh = torch.cat([self._vqvae.encode(part) for part in image_B3RR.chunk(self._run.optimiser.accumulate)])
        unused_V = revive_unused(
            quantizer,
            f_BChh.float(),
            seed=self._run.seed + iteration,
            first_row=self._rows.start,
            rows=self.data.size,
        )
        averaged_VC = self._average.weights.get("quantize.embedding.weight")
        if averaged_VC is not None:  # an average with the entry's old place would be neither
            averaged_VC[unused_V] = quantizer.embedding.weight.detach()[unused_V]
        return int(unused_V.sum())

    def _adversarial_at(self, iteration: int) -> bool:
        start = self._run.loss.adversarial_start * self._schedule.iterations
        return self._discriminator is not None and iteration >= start

    def _loss(
        self, image_B3RR: Tensor, adversarial: bool, sums: _Terms, part: float
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Loss of a part of the batch, its reconstruction [B, 3, R, R] and tokens."""
        weights = self._run.loss
        with mixed_precision(self._run.optimiser, self._device):
            fake_B3RR, quantizer_loss, tokens = self._model(image_B3RR)
        fake_B3RR = fake_B3RR.float()
        difference_B3RR = fake_B3RR - image_B3RR
        l1, l2 = difference_B3RR.abs().mean(), difference_B3RR.square().mean()
        sums.add(part, l1=l1, l2=l2, quantizer=quantizer_loss)
        reconstruction = weights.l1 * l1 + weights.l2 * l2
        if self._perceptual is not None:
            with mixed_precision(self._run.optimiser, self._device):
                perceptual = self._perceptual(fake_B3RR, image_B3RR)
            sums.add(part, perceptual=perceptual)
            reconstruction = reconstruction + weights.perceptual * perceptual
        loss = reconstruction + weights.quantizer * quantizer_loss
        if adversarial:
            assert self._discriminator is not None
            critic = bare(self._discriminator).requires_grad_(False)
            with self._critic_precision():
                deception = generator_loss(critic(fake_B3RR).float())
            critic.requires_grad_(True)
            scale = self._scaler.get_scale()
            weight = adaptive_weight(reconstruction, deception, self._last_layer, scale=scale)
            sums.add(part, deception=deception, adaptive_weight=weight)
            loss = loss + weights.adversarial * weight * deception
        sums.add(part, loss=loss)
        return loss, fake_B3RR.detach(), tokens

    def _train_critic(self, iteration: int, reals: tuple[Tensor, ...], fakes: list[Tensor], sums: _Terms) -> None:
        assert self._discriminator is not None
        settings, optimizer = self._run.optimiser, self._discriminator_optimizer
        for group in optimizer.param_groups:
            group["lr"] = self._schedule.rate_at(iteration) * self._run.loss.discriminator_rate
            group["weight_decay"] = 0.0
        for number, (real_B3RR, fake_B3RR) in enumerate(zip(reals, fakes, strict=True), 1):
            with gradients_stay(self._discriminator, last=number == len(fakes)):
                with self._critic_precision():
                    answers = self._discriminator(torch.cat([real_B3RR, fake_B3RR])).float()
                loss = discriminator_loss(*answers.chunk(2))
                (loss / len(fakes)).backward()
            sums.add(1 / len(fakes), discriminator=loss)
        update(self._discriminator, optimizer, _NO_SCALER, settings.clip)

    def _critic_precision(self) -> torch.autocast:
        """The discriminator's loss is not scaled, so it would vanish in fp16."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._run.optimiser.precision == "bf16")

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        self._model.eval()
        images = self._validation or self._images
        count = len(images) if self._validation else min(MEASURED, len(images))
        sums_3 = torch.zeros(3, dtype=torch.float64, device=self._device)  # PSNR, SSIM, images
        shares = evaluation_shares(count, self._run.data.batch // self._run.optimiser.accumulate)
        centre = Crop(side=self._crop.side, random=False, enlarge=self._crop.enlarge)
        shown: list[Tensor] = []  # of this process, [b, 2, 3, R, R]
        stride = max(1, 2 * count // self._run.keeping.pictures)
        corrupt: tuple[str, ...] = ()
        with self._average.in_place():
            for batch, share in zip(
                share_batches(images, centre, shares, workers=self._run.data.workers), shares, strict=True
            ):
                corrupt += batch.corrupt
                image_B3RR = normalised(batch.images_BCRR, self._device)
                ours_B3RR = self._vqvae.reconstruct(image_B3RR)
                picked_B = torch.from_numpy(share.indices_B % stride == 0).to(self._device)
                shown.append(torch.stack([image_B3RR[picked_B], ours_B3RR[picked_B]], dim=1))
                for real, ours in list(zip(image_B3RR, ours_B3RR, strict=True))[: share.counted]:
                    sums_3 += torch.tensor([psnr(ours, real), ssim(ours, real), 1.0]).to(sums_3)
        total_psnr, total_ssim, number = sum_over_processes(sums_3).tolist()
        prefix = "validation" if self._validation else "training"
        values = {f"{prefix}_rpsnr": total_psnr / number, f"{prefix}_rssim": total_ssim / number}
        score = -total_psnr / number if self._validation else None
        pairs_B3RR = torch.cat(shown).flatten(0, 1)  # every picture beside what became of it
        grid_HW3 = picture_grid(pairs_B3RR.add(1).mul(0.5)) if len(pairs_B3RR) else None  # the first process has some
        return Evaluation(values=values, score=score, corrupt=corrupt, pictures_HW3=grid_HW3)

    def finished(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = whole_state(self._vqvae, self._average.weights)
        return state, {name: self.state.values[name] for name in ("class_names", "patch_nums")}


class _Terms:
    """Means of the terms of a loss over the parts of a batch, and over processes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, part: float, **terms: Tensor) -> None:
        """`part` of the batch has these means."""
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + part * term.detach()

    def values(self) -> dict[str, float]:
        means = torch.stack([term.float() for term in self._sums.values()])
        average_over_processes([means])
        return dict(zip(self._sums, means.tolist(), strict=True))


def psnr(ours_3RR: Tensor, theirs_3RR: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of an image in [−1, 1]."""
    return 10 * math.log10(4 / max((ours_3RR - theirs_3RR).square().mean().item(), 1e-20))


def ssim(ours_3RR: Tensor, theirs_3RR: Tensor) -> float:
    """Structural similarity of an image in [−1, 1]: mean over the places of a Gaussian window of 11 pixels within it.

    Of an image that holds no such window all pixels count, beyond whose border it is reflected.
    """
    _, every_13RR = structural_similarity_index_measure(
        ours_3RR[None], theirs_3RR[None], data_range=2.0, return_full_image=True
    )
    within_13rr = every_13RR[..., 5:-5, 5:-5]
    return (within_13rr if within_13rr.numel() else every_13RR).mean().item()
