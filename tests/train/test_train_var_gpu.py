"""VAR training on a GPU: FlexAttention against the dense mask, precisions against float32, ways to run blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("torchmetrics")

from var_deploy.config import VQVAEConfig
from var_train import VAR, VQVAE
from var_train.configuration import VARRun
from var_train.presets import randomise
from var_train.step_benchmark import RandomTokens
from var_train.train_var import VARTraining

pytestmark = pytest.mark.gpu

SCALES = (1, 2, 3, 5, 8)  # 103 tokens: no multiple of FlexAttention's blocks
VQVAE_CONFIG = VQVAEConfig(patch_nums=SCALES, vocab_size=97, z_channels=16, ch=32, ch_mult=(1, 1), num_res_blocks=1)


def losses(steps: int = 8, *, precision: str = "fp32", ema: float = 0.0, **execution: object) -> list[float]:
    device = torch.device("cuda")
    run = VARRun.model_validate(
        {
            "data": {"path": "", "batch": 6},
            "model": {"vqvae": "", "depth": 3, "heads": 2},
            "optimiser": {"iterations": 20, "learning_rate": 1e-3, "precision": precision, "ema": ema},
            "execution": execution,
        }
    )
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAE_CONFIG)
    var = VAR(run.model.config(VQVAE_CONFIG, 1000))
    randomise(vqvae)
    var.init_weights()
    source = RandomTokens(24, 103, 97, device)
    training = VARTraining(run, var.to(device), vqvae.to(device).eval().requires_grad_(False), source, None, device)
    return [training.step(batch, measure=False).loss for batch in itertools.islice(training.batches(0), steps)]


def test_flex_attention_trains_as_the_dense_mask_does():
    # float32 in both, whose kernels sum in another order, and TF32 where the library takes it: 1e-3 of about 4.6 nats
    assert losses(attention="flex") == pytest.approx(losses(attention="dense"), abs=5e-3)


@pytest.mark.parametrize("attention", ["flex", "dense"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_float32(precision, attention):
    # bf16 has 8 bits: a relative error of 4e-3 in activations, less in a mean over 618 tokens
    assert losses(attention=attention, precision=precision) == pytest.approx(losses(attention="dense"), abs=5e-2)


@pytest.mark.parametrize("execution", [{"checkpoint_blocks": True}, {"compile": True}])
@pytest.mark.parametrize("attention", ["flex", "dense"])
def test_how_blocks_run_changes_rounding_alone(execution, attention):
    assert losses(attention=attention, **execution) == pytest.approx(losses(attention=attention), abs=5e-3)


def test_auto_takes_flex_attention():
    assert losses(2) == pytest.approx(losses(2, attention="flex"), abs=1e-5)
