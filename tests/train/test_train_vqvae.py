"""One VQVAE training step against a step written out by hand, with and without its adversary; measures; revival.

The hand-written step uses forward passes and autograd alone: losses, clipping, AdamW and averages are formulas.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pydantic")
pytest.importorskip("torchmetrics")

from safetensors.torch import load_file

from var_train import VQVAE, image_data
from var_train import train_vqvae as train_vqvae_module
from var_train.adversarial import PatchDiscriminator
from var_train.codebook import residual_vectors
from var_train.configuration import VQVAERun, read_run
from var_train.image_data import Crop, ImageBatch, evaluation_batches
from var_train.image_files import open_images
from var_train.perceptual import GROUPS, PerceptualDistance
from var_train.pictures import normalised, picture_grid
from var_train.run_folder import write_finished
from var_train.setup import opened_images, train_vqvae
from var_train.train_vqvae import MEASURED, VQVAETraining, psnr, ssim

CPU = torch.device("cpu")
RATE, CLIP, DECAY = 1e-3, 0.5, 0.05
BETAS = 0.9, 0.95

#: Forward and backward pass by hand are the same operations as those of the step, so gradients agree bit for bit. What
#: is left are the roundings of the update: some 1e-7 of weights of up to 1.
CLOSE = {"rtol": 0.0, "atol": 5e-7}

Make = Callable[..., VQVAETraining]


@pytest.fixture
def training_of(vqvae_toml: Any, tmp_path: Path) -> Make:
    """`training_of("loss.l1=2", …, perceptual=None)`: the small run before its first step; nothing is unused yet."""

    def make(*options: str, perceptual: nn.Module | None = None, split: bool = True) -> VQVAETraining:
        common = [f"optimiser.clip={CLIP}", f"optimiser.weight_decay={DECAY}", "optimiser.final=1.0"]
        run = read_run(VQVAERun, vqvae_toml(tmp_path), [*common, *options])
        images, validation = opened_images(run.data)
        torch.manual_seed(run.seed)
        vqvae, discriminator = VQVAE(run.model.config()), None
        if run.loss.adversarial:
            discriminator = PatchDiscriminator(width=run.loss.discriminator_width, layers=run.loss.discriminator_layers)
        return VQVAETraining(
            run,
            vqvae,
            discriminator,
            perceptual,  # type: ignore[arg-type]
            images,
            validation if split else None,
            CPU,
        )

    return make


def batch_of(training: VQVAETraining, iteration: int) -> ImageBatch:
    stream = training.batches(iteration)
    batch = next(stream)
    stream.close()  # type: ignore[attr-defined]
    return batch


def image_of(batch: ImageBatch) -> Tensor:
    return batch.images_BCRR.float() / 127.5 - 1


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@dataclass
class AdamByHand:
    """AdamW of one model: a formula for each weight. Keeps what it has to remember."""

    decay: float
    rate: float = RATE
    count: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    def norm_and_update(self, model: nn.Module, gradients: dict[str, Tensor]) -> float:
        """Updates by the clipped gradients, and returns the norm that they had."""
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        factor = min(1.0, CLIP / (norm + 1e-6))
        self.count += 1
        for name, p in model.named_parameters():
            if name not in gradients:
                continue
            g = gradients[name] * factor
            m = self.first[name] = BETAS[0] * self.first.get(name, torch.zeros_like(g)) + (1 - BETAS[0]) * g
            v = self.second[name] = BETAS[1] * self.second.get(name, torch.zeros_like(g)) + (1 - BETAS[1]) * g * g
            decay = self.decay if p.ndim > 1 and not name.endswith("bias") else 0.0
            with torch.no_grad():
                p.mul_(1 - self.rate * decay)
                m_hat, v_hat = m / (1 - BETAS[0] ** self.count), v / (1 - BETAS[1] ** self.count)
                p.sub_(self.rate * m_hat / (v_hat.sqrt() + 1e-8))
        return norm


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@dataclass
class StepByHand:
    """The step of iteration `iteration` from the training's present weights, which stay as they are."""

    training: VQVAETraining
    adam: AdamByHand = field(default_factory=lambda: AdamByHand(decay=DECAY))
    critics_adam: AdamByHand = field(default_factory=lambda: AdamByHand(decay=0.0))

    def __call__(self, batch: ImageBatch, *, adversarial: float = 0.0, l1: float = 1, l2: float = 1, q: float = 1):
        model: VQVAE = copy.deepcopy(self.training.state.models["vqvae"]).train()
        average = {name: tensor.clone() for name, tensor in self.training.state.ema.items()}
        real_B3RR = image_of(batch)
        fake_B3RR, quantizer_loss, _ = model(real_B3RR)
        error_B3RR = fake_B3RR - real_B3RR  # once: gradients are added up in the same order, so they round alike
        reconstruction = l1 * error_B3RR.abs().mean() + l2 * (error_B3RR**2).mean()
        loss = reconstruction + q * quantizer_loss
        self.values = {"quantizer": quantizer_loss.item()}
        if adversarial:
            critic = copy.deepcopy(self.training.state.models["discriminator"])
            deception = -critic(fake_B3RR).mean()
            last = model.decoder.conv_out.weight
            (of_image,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
            (of_critic,) = torch.autograd.grad(deception, last, retain_graph=True)
            weight = of_image.norm() / (of_critic.norm() + 1e-4)
            loss = loss + adversarial * weight * deception
            self.values |= {"deception": deception.item(), "adaptive_weight": weight.item()}
        self.values["loss"] = loss.item()
        self.values["gradient_norm"] = self.adam.norm_and_update(model, gradients_of(loss, model))
        t = batch.iteration
        d = min(0.9, (1 + t) / (10 + t))
        self.weights = parameters_of(model)
        self.average = {name: d * average[name] + (1 - d) * p for name, p in self.weights.items()}
        if adversarial:
            on_real, on_fake = critic(real_B3RR), critic(fake_B3RR.detach())
            hinge = 0.5 * (1 - on_real).clamp(min=0).mean() + 0.5 * (1 + on_fake).clamp(min=0).mean()
            self.values["discriminator"] = hinge.item()
            self.critics_adam.norm_and_update(critic, gradients_of(hinge, critic))
            self.critic = parameters_of(critic)
        return self

    def assert_is(self, values: Any) -> None:
        for name, value in self.values.items():
            assert values[name] == pytest.approx(value, rel=1e-5), name
        models, ema = self.training.state.models, self.training.state.ema
        torch.testing.assert_close(parameters_of(models["vqvae"]), self.weights, **CLOSE)
        torch.testing.assert_close(ema, self.average, **CLOSE)
        if "discriminator" in self.values:
            torch.testing.assert_close(parameters_of(models["discriminator"]), self.critic, **CLOSE)


def test_steps_equal_steps_written_out_by_hand(training_of):
    training = training_of("loss.revive_every=50", "loss.l1=0.5", "loss.l2=2", "loss.quantizer=3", "loss.adversarial=0")
    by_hand = StepByHand(training)
    start = parameters_of(training.state.models["vqvae"])
    for iteration in (1, 2, 3):  # at 0 the codebook is placed
        batch = batch_of(training, iteration)
        by_hand(batch, l1=0.5, l2=2, q=3)
        step = training.step(batch, measure=True)
        assert step.loss == step.values["loss"]
        by_hand.assert_is(step.values)
    assert by_hand.values["gradient_norm"] > CLIP  # so it was clipped
    assert training.state.models.keys() == {"vqvae"}
    for name, p in training.state.models["vqvae"].named_parameters():
        used = p.requires_grad and training.state.optimizers["vqvae"].state[p]["exp_avg"].any()
        assert torch.equal(p, start[name]) is not bool(used), name


def test_the_step_by_hand_would_notice_a_difference(training_of):
    training = training_of("loss.revive_every=50", "loss.adversarial=0", "optimiser.learning_rate=1.01e-3")
    batch = batch_of(training, 1)
    by_hand = StepByHand(training)(batch)
    step = training.step(batch, measure=True)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        by_hand.assert_is(step.values)
    with pytest.raises(AssertionError, match="loss"):
        by_hand.assert_is({**step.values, "loss": step.loss * 1.001})


def test_a_step_with_the_adversary_equals_one_written_out_by_hand(training_of):
    training = training_of(
        "loss.revive_every=50", "loss.adversarial=0.7", "loss.adversarial_start=0", "loss.discriminator_rate=0.5"
    )
    by_hand = StepByHand(training)
    by_hand.critics_adam.rate = RATE * 0.5
    for iteration in (1, 2):
        batch = batch_of(training, iteration)
        by_hand(batch, adversarial=0.7)
        by_hand.assert_is(training.step(batch, measure=True).values)
    assert by_hand.values["adaptive_weight"] > 0.01


def test_the_adversary_joins_in_at_its_start(training_of):
    training = training_of("loss.adversarial_start=0.35")  # 7 of 20 iterations
    critic = training.state.models["discriminator"]
    before = parameters_of(critic)
    terms = {"deception", "adaptive_weight", "discriminator"}
    values = training.step(batch_of(training, 6), measure=True).values
    assert not terms & values.keys()
    torch.testing.assert_close(parameters_of(critic), before, rtol=0, atol=0)
    assert not training.state.optimizers["discriminator"].state
    values = training.step(batch_of(training, 7), measure=True).values
    assert terms <= values.keys()
    changed = {name for name, p in critic.named_parameters() if not torch.equal(p, before[name])}
    assert changed >= before.keys() - {"layers.5.bias"}  # both sides of the hinge pull at the last one alike


def test_the_images_own_step_leaves_the_adversary_alone(training_of, monkeypatch):
    training = training_of("loss.adversarial_start=0")
    critic = training.state.models["discriminator"]
    before = parameters_of(critic)
    seen: list[list[Tensor | None]] = []
    monkeypatch.setattr(training, "_train_critic", lambda *_: seen.append([p.grad for p in critic.parameters()]))
    values = training.step(batch_of(training, 0), measure=True).values
    assert values["adaptive_weight"] > 0
    assert seen == [[None] * len(before)]
    assert all(p.requires_grad for p in critic.parameters())
    torch.testing.assert_close(parameters_of(critic), before, rtol=0, atol=0)


def test_parts_of_a_batch_come_to_the_same_as_the_whole(training_of):
    options = "loss.adversarial=0", "loss.revive_every=2", "optimiser.clip=1e6"
    whole, parts = training_of(*options), training_of(*options, "optimiser.accumulate=4")
    for iteration in (0, 1):
        ours, theirs = (t.step(batch_of(t, iteration), measure=True).values for t in (whole, parts))
        assert ours["revived"] == theirs["revived"] == (61 if iteration == 0 else 0)
        # convolutions of other batch sizes round otherwise
        for name in ("loss", "l1", "l2", "quantizer", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        assert ours["usage_by_scale"] == theirs["usage_by_scale"]
        if iteration == 0:  # Adam's first average is a tenth of the gradient, which its own step hides
            states = [t.state.optimizers["vqvae"].state for t in (whole, parts)]
            pairs = zip(*(t.state.models["vqvae"].named_parameters() for t in (whole, parts)), strict=True)
            for (name, p), (_, other) in pairs:
                if p.requires_grad:
                    a, b = states[0][p]["exp_avg"], states[1][other]["exp_avg"]
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_phis_that_few_scales_leave_out_are_not_trained(training_of):
    training = training_of("loss.adversarial=0")  # 3 scales use the first, the second or third, and the last of 4 φ
    vqvae: VQVAE = training.state.models["vqvae"]
    used = {vqvae.config.phi_index(k) for k in range(3)}
    assert len(used) == 3
    training.step(batch_of(training, 0), measure=False)
    trained = {id(p) for group in training.state.optimizers["vqvae"].param_groups for p in group["params"]}
    for i in range(4):
        assert (id(vqvae.get_parameter(f"{vqvae.config.phi_key(i)}.weight")) in trained) is (i in used)
    assert training.parameters == sum(p.numel() for p in vqvae.parameters())


# ---- revival -------------------------------------------------------------------------------------------------------


def distance_to(vectors_NC: Tensor, codes_VC: Tensor) -> float:
    """The largest distance from a code to the vector that is nearest to it."""
    return torch.cdist(codes_VC, vectors_NC, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).max().item()


def test_at_the_start_every_entry_lies_on_a_vector_of_the_batch(training_of):
    training = training_of("loss.adversarial=0", "optimiser.learning_rate=1e-9")
    vqvae: VQVAE = training.state.models["vqvae"]
    batch = batch_of(training, 0)
    with torch.no_grad():
        empty = copy.deepcopy(vqvae.quantize)
        empty.embedding.weight.zero_()
        vectors_NC = residual_vectors(empty, vqvae.encode(image_of(batch))).flatten(0, 1)
    step = training.step(batch, measure=True)
    assert step.values["revived"] == 61
    assert distance_to(vectors_NC, vqvae.quantize.embedding.weight.detach()) < 1e-6
    assert sum(step.values["usage_by_scale"]) > 0.5


def test_unused_entries_are_placed_on_residuals_and_their_averages_follow(training_of):
    training = training_of("loss.adversarial=0", "loss.revive_every=5", "loss.revive_until=0.5")
    vqvae: VQVAE = training.state.models["vqvae"]
    averaged_VC = training.state.ema["quantize.embedding.weight"]
    averaged_VC.add_(1.0)
    used_V = torch.arange(61) % 3 == 0
    vqvae.quantize.ema_vocab_hit_SV[1, used_V] = 4.0
    before_VC, before_averaged_VC = vqvae.quantize.embedding.weight.detach().clone(), averaged_VC.clone()
    image_B3RR = image_of(batch_of(training, 5))
    with torch.no_grad():
        vectors_NC = residual_vectors(vqvae.quantize, vqvae.encode(image_B3RR)).flatten(0, 1)

    assert training._revive(4, image_B3RR) == 0  # not yet
    assert torch.equal(vqvae.quantize.embedding.weight, before_VC)
    assert training._revive(5, image_B3RR) == int((~used_V).sum())
    after_VC = vqvae.quantize.embedding.weight.detach()
    assert torch.equal(after_VC[used_V], before_VC[used_V])
    assert torch.equal(averaged_VC[used_V], before_averaged_VC[used_V])
    assert torch.equal(averaged_VC[~used_V], after_VC[~used_V])
    assert distance_to(vectors_NC, after_VC[~used_V]) < 1e-6
    assert len(after_VC[~used_V].unique(dim=0)) > 20
    assert training._revive(10, image_B3RR) > 0
    assert training._revive(15, image_B3RR) == 0  # beyond half of 20 iterations


def test_a_codebook_that_is_gone_on_from_keeps_its_place(training_of, small_vqvae, vqvae_toml, tmp_path):
    """Although nothing is known of its usage, as with a published file, whose statistics are of other scales."""
    options = ["loss.adversarial=0", "optimiser.learning_rate=1e-9", "optimiser.iterations=1", "optimiser.ema=0"]
    run = read_run(VQVAERun, vqvae_toml(tmp_path), [*options, f"model.start_from={small_vqvae}"])
    ours, theirs = load_file(train_vqvae(run, tmp_path / "run", CPU)), load_file(small_vqvae)
    theirs = {key: tensor for key, tensor in theirs.items() if "ema_vocab_hit" not in key}
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


# ---- precision, perceptual term --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_near_float32(training_of, precision):
    runs = [training_of("loss.adversarial_start=0", f"optimiser.precision={p}") for p in ("fp32", precision)]
    for iteration in range(3):
        ours, theirs = (t.step(batch_of(t, iteration), measure=True).values for t in runs)
        assert theirs["l1"] == pytest.approx(ours["l1"], rel=0.05)  # bf16 has 8 bits
        assert math.isfinite(theirs["adaptive_weight"])
    model = runs[1].state.models["vqvae"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert runs[1].state.scaler.is_enabled() is (precision == "fp16")


def test_gradients_too_small_for_fp16_weigh_the_adversary_as_in_float32(training_of):
    """Those of large batches are so: a mean over some 10⁷ pixels has gradients that fp16 cannot tell from 0."""
    options = "loss.adversarial_start=0", "loss.l1=1e-5", "loss.l2=0", "loss.revive_every=50"
    runs = [training_of(*options, f"optimiser.precision={precision}") for precision in ("fp32", "fp16")]
    ours, theirs = (t.step(batch_of(t, 1), measure=True).values["adaptive_weight"] for t in runs)
    assert theirs == pytest.approx(ours, rel=0.02)
    assert ours > 0


def perceptual_weights() -> dict[str, Tensor]:
    """VGG-16's shapes, with few numbers that are not 0."""
    state, before, number = {}, 3, 0
    for group in GROUPS:
        for width in group:
            weight = torch.zeros(width, before, 3, 3)
            weight[torch.arange(width), torch.arange(width) % before, 1, 1] = 1.0
            state |= {f"features.{number}.weight": weight, f"features.{number}.bias": torch.full((width,), 0.1)}
            before, number = width, number + 2
        number += 1
    return state


def test_the_perceptual_term_counts_with_its_weight(training_of):
    distance = PerceptualDistance(perceptual_weights())
    options = "loss.adversarial=0", "model.ch_mult=[1, 1, 2]", "loss.perceptual=0.3"  # VGG halves 16 pixels four times
    training = training_of(*options, perceptual=distance)
    vqvae: VQVAE = copy.deepcopy(training.state.models["vqvae"])
    batch = batch_of(training, 1)
    values = training.step(batch, measure=True).values
    fake_B3RR, quantizer_loss, _ = vqvae(image_of(batch))
    by_hand = distance(fake_B3RR, image_of(batch)).item()
    assert by_hand > 0
    assert values["perceptual"] == pytest.approx(by_hand, rel=1e-5)
    expected = values["l1"] + values["l2"] + quantizer_loss.item() + 0.3 * by_hand
    assert values["loss"] == pytest.approx(expected, rel=1e-5)
    assert not any(p.grad is not None for p in distance.parameters())


# ---- measures --------------------------------------------------------------------------------------------------------


def measured_by_hand(vqvae: VQVAE, root: Path, split: str, enlarge: float = 1.125) -> tuple[float, float]:
    """PSNR and SSIM of a split's images, cropped in the middle."""
    images = open_images(root, split=split)
    crop = Crop(side=vqvae.config.image_size, random=False, enlarge=enlarge)
    (batch,) = evaluation_batches(images, crop, len(images))
    image_B3RR = image_of(batch)
    with torch.no_grad():
        ours_B3RR = vqvae.eval().reconstruct(image_B3RR)
    error_B = (ours_B3RR - image_B3RR).double().square().mean(dim=(1, 2, 3))
    similar = [ssim(ours, real) for ours, real in zip(ours_B3RR, image_B3RR, strict=True)]
    return (10 * torch.log10(2**2 / error_B)).mean().item(), float(np.mean(similar))


def test_measures_are_of_the_averaged_weights_which_are_gone_afterwards(training_of, small_images):
    training = training_of("loss.adversarial=0", "data.batch=7", "keeping.pictures=6")  # 18 images: 7, 7, 4
    for iteration in range(3):
        training.step(batch_of(training, iteration), measure=False)
    vqvae: VQVAE = training.state.models["vqvae"]
    before, averaged = parameters_of(vqvae), copy.deepcopy(vqvae)
    averaged.load_state_dict(training.state.ema, strict=False)
    evaluation = training.evaluate()
    torch.testing.assert_close(parameters_of(vqvae), before, rtol=0, atol=0)

    by_hand = measured_by_hand(averaged, small_images, "val")
    assert list(evaluation.values) == ["validation_rpsnr", "validation_rssim"]
    assert tuple(evaluation.values.values()) == pytest.approx(by_hand, rel=1e-4)
    assert evaluation.score == -evaluation.values["validation_rpsnr"]  # the lower the better
    assert by_hand[0] != pytest.approx(measured_by_hand(copy.deepcopy(vqvae), small_images, "val")[0], rel=1e-4)

    images = open_images(small_images, split="val")
    batch = next(evaluation_batches(images, Crop(side=8, random=False), 18))
    real_B3RR = normalised(batch.images_BCRR[::6], CPU)  # three of the 18, at even distances
    with torch.no_grad():
        ours_B3RR = averaged.eval().reconstruct(real_B3RR)
    pairs_B3RR = torch.stack([real_B3RR, ours_B3RR], dim=1).flatten(0, 1)  # each beside what became of it
    grid_HW3 = picture_grid((pairs_B3RR + 1) / 2)
    assert evaluation.pictures_HW3.shape == grid_HW3.shape == (16, 24, 3)
    assert np.abs(evaluation.pictures_HW3.astype(int) - grid_HW3).max() <= 1  # batches of other sizes round otherwise


def test_several_processes_measure_every_image_once(training_of, monkeypatch):
    training = training_of("loss.adversarial=0", "data.batch=8")  # 18 images: 8, 8 and 2, of which one process has none
    whole = training.evaluate().values
    sums: list[Tensor] = []
    monkeypatch.setattr(train_vqvae_module, "sum_over_processes", lambda sums_3: sums.append(sums_3) or sums_3)
    monkeypatch.setattr(image_data, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(image_data, "rank", lambda rank=rank: rank)
        training.evaluate()
    total_psnr, total_ssim, number = torch.stack(sums).sum(dim=0).tolist()
    assert number == 18
    assert [total_psnr / 18, total_ssim / 18] == pytest.approx(list(whole.values()), rel=1e-4)


def test_without_images_kept_apart_training_images_are_measured_on(training_of, small_images):
    training = training_of("loss.adversarial=0", split=False)
    evaluation = training.evaluate()
    assert evaluation.score is None
    assert list(evaluation.values) == ["training_rpsnr", "training_rssim"]
    by_hand = measured_by_hand(copy.deepcopy(training.state.models["vqvae"]), small_images, "train")
    assert tuple(evaluation.values.values()) == pytest.approx(by_hand, rel=1e-4)
    assert MEASURED >= 72  # which are all of them


def test_the_signal_to_noise_ratio_of_errors_worked_out_by_hand():
    image = torch.rand(3, 16, 16) * 2 - 1
    assert psnr(image + 0.2, image) == pytest.approx(20.0, abs=1e-3)  # 10·log10(4 / 0.04)
    assert psnr(image, image) == pytest.approx(10 * math.log10(4e20))  # no infinity, which JSON does not know


@pytest.mark.parametrize(("side", "noise"), [(11, 0.3), (12, 0.05), (17, 0.6), (64, 0.1), (40, 0.01)])
def test_structural_similarity_is_that_of_scikit_image(side, noise):
    metrics = pytest.importorskip("skimage.metrics")
    ours = torch.rand(3, side, side) * 2 - 1
    ours[:, : side // 2] = torch.linspace(-1, 1, side)  # where variances are small beside squares
    theirs = (ours + noise * torch.randn(3, side, side)).clamp(-1, 1)
    expected = metrics.structural_similarity(
        ours.double().numpy(),
        theirs.double().numpy(),
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=2,
    )
    # variances are differences of squares, which float32 has to 1e-7, divided by constants of about 4e-4
    assert ssim(ours, theirs) == pytest.approx(expected, abs=1e-4)
    assert ssim(ours, ours) == pytest.approx(1.0, abs=1e-6)


def test_images_smaller_than_the_window_have_a_similarity_too():
    image = torch.rand(3, 8, 8) * 2 - 1
    assert ssim(image, image) == pytest.approx(1.0, abs=1e-6)
    assert ssim(image, torch.rand(3, 8, 8) * 2 - 1) < 0.2


def test_a_run_describes_what_its_checkpoint_needs(training_of, tmp_path):
    training = training_of("loss.adversarial=0")
    state, notes = training.finished()
    assert notes == {"class_names": ["across", "down", "slanting"], "patch_nums": [1, 2, 4]}
    assert state.keys() == training.state.models["vqvae"].state_dict().keys()
    training.step(batch_of(training, 0), measure=False)
    state, _ = training.finished()
    for name, tensor in training.state.ema.items():
        assert torch.equal(state[name], tensor)
    write_finished(tmp_path / "vqvae.safetensors", state, notes)
    VQVAE(training.config).load_state_dict(load_file(tmp_path / "vqvae.safetensors"))
