"""One VAR training step against a step written out by hand, and what it records.

The hand-written step uses the model's forward pass and autograd alone: loss, clipping, AdamW and averages are formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("pydantic")
pytest.importorskip("torchmetrics")

from var_deploy.config import VARConfig, VQVAEConfig
from var_train import VAR, VQVAE
from var_train.configuration import VARRun
from var_train.presets import randomise
from var_train.setup import description
from var_train.token_sources import Tokens
from var_train.train_var import VARTraining, row_uniforms

CPU = torch.device("cpu")
SCALES = (1, 2, 4)
VQVAE_CONFIG = VQVAEConfig(patch_nums=SCALES, vocab_size=29, z_channels=8, ch=32, ch_mult=(1, 1), num_res_blocks=1)
G = 6  # images of a global batch
NO_DECAY = ("bias", "pos_", "lvl_embed", "ada_gss", "scale_mul")


class FixedTokens:
    """A source of 13 images with random tokens."""

    class_names = ("a", "b", "c")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens_NL = torch.randint(29, (13, 21), generator=generator)
        self.labels_N = torch.randint(3, (13,), generator=generator)

    def __len__(self) -> int:
        return 13

    def name(self, index: int) -> str:
        return f"image {index}"

    def batch(self, iteration: int, indices: list[int]) -> Tokens:
        return Tokens(tokens_BL=self.tokens_NL[indices], labels_B=self.labels_N[indices], iteration=iteration)

    def training(self, batches, rows, start):
        iteration = start
        while True:
            yield self.batch(iteration, batches.indices(iteration)[1][rows].tolist())
            iteration += 1

    def evaluation(self, size):
        for begin in range(0, 13, size):
            batch = self.batch(0, list(range(begin, min(begin + size, 13))))
            yield replace(batch, counted=len(batch.labels_B))


def run_of(**optimiser) -> VARRun:
    settings = {"iterations": 20, "learning_rate": 3e-3, "precision": "fp32", "warmup": 0.0, "weight_decay": 0.05}
    return VARRun.model_validate(
        {
            "seed": 5,
            "data": {"path": "unused", "batch": G},
            "model": {"vqvae": "unused", "depth": 2, "heads": 1, "label_dropout": 0.4, "drop_path": 0.3},
            "optimiser": settings | optimiser,
        }
    )


def training_of(run: VARRun, *, validation: bool = False, shared_aln: bool = False) -> VARTraining:
    vqvae = VQVAE(VQVAE_CONFIG)
    randomise(vqvae)
    model = run.model.model_copy(update={"shared_aln": shared_aln})
    config: VARConfig = model.config(VQVAE_CONFIG, 3)
    var = VAR(config, label_dropout=run.model.label_dropout, drop_path=run.model.drop_path)
    randomise(var)
    source = FixedTokens()
    return VARTraining(run, var, vqvae.eval().requires_grad_(False), source, FixedTokens() if validation else None, CPU)


@dataclass(frozen=True)
class ByHand:
    losses: list[float]
    norms: list[float]
    average: dict[str, Tensor]
    steady: dict[str, Tensor]  #: where no gradient was so small that its rounding decides the direction of a step


def by_hand(training: VARTraining, run: VARRun, steps: int) -> ByHand:
    """What the steps come to; changes the training's model."""
    var: VAR = training.state.models["var"]
    vqvae: VQVAE = training._vqvae
    source = FixedTokens()
    average = {name: p.detach().clone() for name, p in var.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in var.named_parameters()}
    square = {name: torch.zeros_like(p) for name, p in var.named_parameters()}
    steady = {name: torch.ones_like(p, dtype=torch.bool) for name, p in var.named_parameters()}
    losses, norms = [], []
    for iteration in range(steps):
        indices = training.data.indices(iteration)[1].tolist()
        tokens_GL, labels_G = source.tokens_NL[indices], source.labels_N[indices]
        per_scale = list(tokens_GL.split([1, 4, 16], dim=1))
        features_GLC = vqvae.quantize.teacher_forcing_input(per_scale)
        var.train()
        uniforms_UG = row_uniforms(5, iteration, 1 + 2 * 2, G)
        logits_GLV = var(labels_G, features_GLC, uniforms_UG)
        log_p_GLV = logits_GLV - logits_GLV.logsumexp(dim=-1, keepdim=True)
        loss = -log_p_GLV.gather(2, tokens_GL[..., None]).sum() / (G * 21)
        gradients = dict(
            zip(
                mean,
                torch.autograd.grad(loss, list(var.parameters())),
                strict=True,
            )
        )
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        factor = min(1.0, run.optimiser.clip / (norm + 1e-6))
        # linear schedule without warm-up: flat for a twentieth, then to a tenth of the peak
        passed = iteration / 19
        rate = 3e-3 * (1.0 if passed < 0.05 else 0.1 + 0.9 * (1 - passed) / 0.95)
        beta1, beta2 = 0.9, 0.95
        with torch.no_grad():
            for name, p in var.named_parameters():
                g = gradients[name] * factor
                steady[name] &= g.abs() > 3e-5 * factor
                exempt = p.ndim == 1 or any(
                    part in name for part in ("bias", "pos_", "lvl_embed", "ada_gss", "scale_mul")
                )
                p.mul_(1 - rate * (0.0 if exempt else 0.05))
                mean[name] = beta1 * mean[name] + (1 - beta1) * g
                square[name] = beta2 * square[name] + (1 - beta2) * g * g
                first = mean[name] / (1 - beta1 ** (iteration + 1))
                second = square[name] / (1 - beta2 ** (iteration + 1))
                p.sub_(rate * first / (second.sqrt() + 1e-8))
                decay = min(run.optimiser.ema, (1 + iteration) / (10 + iteration))
                average[name] = decay * average[name] + (1 - decay) * p
        losses.append(loss.item())
        norms.append(norm)
    return ByHand(losses, norms, average, steady)


def trained(run: VARRun, steps: int, **options) -> tuple[VARTraining, list[float], list[float]]:
    training = training_of(run, **options)
    losses, norms = [], []
    batches = training.batches(0)
    for _ in range(steps):
        step = training.step(next(batches), measure=True)
        losses.append(step.loss)
        norms.append(step.values["gradient_norm"])
    return training, losses, norms


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize(("clip", "steps"), [(2.0, 1), (0.01, 3)])
def test_steps_equal_steps_written_out_by_hand(clip, steps, shared_aln):
    run = run_of(clip=clip, ema=0.9)
    expected = training_of(run, shared_aln=shared_aln)
    hand = by_hand(expected, run, steps)
    training, losses, norms = trained(run, steps, shared_aln=shared_aln)
    assert losses == pytest.approx(hand.losses, rel=1e-6)
    assert norms == pytest.approx(hand.norms, rel=1e-5)
    theirs = dict(expected.state.models["var"].named_parameters())
    for name, p in training.state.models["var"].named_parameters():
        steady = hand.steady[name]
        # Adam's first steps have the size of the rate, whatever the gradient's; float32 sums are exact to about 1e-8,
        # so the direction of gradients near that may differ. The others agree to the last places.
        torch.testing.assert_close(
            p[steady], theirs[name][steady], rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=2 * 3e-3 * steps)
        torch.testing.assert_close(training.state.ema[name][steady], hand.average[name][steady], rtol=1e-5, atol=5e-6)
    assert sum(int(s.sum()) for s in hand.steady.values()) > 0.5 * sum(s.numel() for s in hand.steady.values())


def test_the_step_by_hand_would_notice_a_difference():
    run = run_of()
    hand = by_hand(training_of(run), run, 2)
    _, other_losses, other_norms = trained(run_of(learning_rate=3.1e-3), 2)
    assert other_losses[0] == pytest.approx(hand.losses[0], rel=1e-6)
    assert other_norms[0] == pytest.approx(hand.norms[0], rel=1e-5)
    assert other_losses[1] != pytest.approx(hand.losses[1], rel=1e-6)


def test_parts_of_a_batch_come_to_the_same_as_the_whole():
    _, losses, norms = trained(run_of(), 3)
    _, in_parts, norms_in_parts = trained(run_of(accumulate=3), 3)
    assert in_parts == pytest.approx(losses, rel=1e-5)
    assert norms_in_parts == pytest.approx(norms, rel=1e-4)


def test_numbers_are_those_of_the_tokens():
    training = training_of(run_of(), validation=True)
    values = training.evaluate().values
    source, var, vqvae = FixedTokens(), training.state.models["var"].eval(), training._vqvae
    features_NLC = vqvae.quantize.teacher_forcing_input(list(source.tokens_NL.split([1, 4, 16], dim=1)))
    with torch.no_grad():
        logits_NLV = var(source.labels_N, features_NLC)
    nats_NL = F.cross_entropy(logits_NLV.transpose(1, 2), source.tokens_NL, reduction="none")
    right_NL = (logits_NLV.argmax(-1) == source.tokens_NL).float()
    assert values["validation_loss"] == pytest.approx(nats_NL.mean().item(), rel=1e-5)
    assert values["validation_loss_last"] == pytest.approx(nats_NL[:, 5:].mean().item(), rel=1e-5)
    assert values["validation_accuracy"] == pytest.approx(right_NL.mean().item())
    assert values["validation_accuracy_by_scale"] == pytest.approx(
        [right_NL[:, part].mean().item() for part in (slice(0, 1), slice(1, 5), slice(5, 21))]
    )


def test_evaluation_takes_averaged_weights_and_puts_the_others_back():
    run = run_of(ema=0.9)
    training, _, _ = trained(run, 4, validation=True)
    before = {name: p.clone() for name, p in training.state.models["var"].named_parameters()}
    evaluation = training.evaluate()
    for name, p in training.state.models["var"].named_parameters():
        assert torch.equal(p, before[name])
    averaged = training_of(run, validation=True)
    averaged.state.models["var"].load_state_dict(training.state.ema, strict=False)
    averaged._average.weights.clear()
    assert evaluation.score == pytest.approx(averaged.evaluate().score, rel=1e-6)
    assert evaluation.score != pytest.approx(training_of(run, validation=True).evaluate().score, rel=1e-3)


def test_pictures_are_a_grid_that_repeats_and_takes_no_random_numbers():
    training = training_of(run_of())
    before = torch.get_rng_state()
    grid_HW3 = training.evaluate().pictures_HW3
    assert torch.equal(torch.get_rng_state(), before)
    assert grid_HW3.shape == (4 * 8, 4 * 8, 3)  # 16 images of 8 pixels
    assert grid_HW3.dtype == np.uint8
    assert np.array_equal(training.evaluate().pictures_HW3, grid_HW3)


def test_progressive_scales_train_a_prefix():
    run = run_of()
    run = VARRun.model_validate({**run.model_dump(), "progressive": {"first": 1, "until": 0.8}})
    training = training_of(run)
    batches = training.batches(0)
    scales = []
    for _ in range(20):
        step = training.step(next(batches), measure=True)
        scales.append(step.values["scales"])
        assert math.isnan(step.values["accuracy_by_scale"][-1]) is (scales[-1] < 3)
    assert scales == sorted(scales)
    assert set(scales) == {1.0, 2.0, 3.0}


def test_random_numbers_of_a_row_are_uniform_and_its_own():
    uniforms_UG = row_uniforms(7, 3, 5, 4000)
    assert uniforms_UG.shape == (5, 4000)
    assert 0 <= uniforms_UG.min() < 1e-3
    assert 0.999 < uniforms_UG.max() < 1
    assert uniforms_UG.mean().item() == pytest.approx(0.5, abs=0.01)  # 20,000 numbers: a deviation of 0.002
    assert not torch.equal(uniforms_UG, row_uniforms(7, 4, 5, 4000))
    assert not torch.equal(uniforms_UG, row_uniforms(8, 3, 5, 4000))
    assert torch.equal(uniforms_UG, row_uniforms(7, 3, 5, 4000))


def test_the_run_is_described():
    training = training_of(run_of())
    record = description(training, run_of())
    assert (record["kind"], record["images"], record["iterations"], record["batch"]) == ("var", 13, 20, G)
    assert record["parameters"] == sum(p.numel() for p in training.state.models["var"].parameters())
    assert record["configuration"]["optimiser"]["learning_rate"] == 3e-3
    assert record["classes"] == ["a", "b", "c"]
