"""Models of odd configurations with random weights, exported once per run, for the tests of graphs and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from odd_models import ODD_CONFIGURATIONS, odd_configs, random_models
from var_deploy.bundle import Bundle
from var_export.bundle import write_bundle
from var_train import VAR, VQVAE
from var_train.checkpoint import CheckpointPair

# These tensors are tiny: a second thread costs more than it gives, several times over where cores are shared.
torch.set_num_threads(1)


@dataclass(frozen=True)
class OddModel:
    """Reference models, their state dicts as a checked pair, and the opened bundle."""

    name: str
    var: VAR
    vqvae: VQVAE
    pair: CheckpointPair
    bundle: Bundle


@pytest.fixture(scope="session", params=list(ODD_CONFIGURATIONS))
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OddModel:
    """One exported model after the other; read only."""
    var, vqvae = random_models(*odd_configs(request.param))
    pair = CheckpointPair(var.config, vqvae.config, var.state_dict(), vqvae.state_dict())
    path = write_bundle(pair, tmp_path_factory.mktemp("odd") / request.param)
    return OddModel(request.param, var, vqvae, pair, Bundle.open(path))


@pytest.fixture(scope="session")
def tiny_checkpoints(tiny_pair) -> CheckpointPair:
    """The golden tiny pair as the exporter reads it."""
    from var_train.checkpoint import load_pair

    return load_pair(tiny_pair[1], tiny_pair[2])
