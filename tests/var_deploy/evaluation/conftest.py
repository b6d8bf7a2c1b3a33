"""The library that numbers are compared with, weights in the published layout, and a network of a few features."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torchmetrics  # noqa: F401  decides at its import whether torch-fidelity is there
from torch import Tensor, nn

from var_deploy.evaluation import reference
from var_deploy.evaluation.features import FeatureNetwork
from var_deploy.evaluation.inception import Inception

#: Where the Makefile puts torch-fidelity: it needs torchvision, which the pinned PyTorch cannot be imported beside.
ORACLE = Path(sys.prefix) / "oracle"
#: Modules that it imports, and the names it takes from them; nothing of them runs here.
STAND_INS = {
    "torchvision": (),
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "STL10"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": (),
    "tqdm": ("tqdm",),
}
#: Features of `SmallNetwork`.
WIDTHS = 12, 6


@pytest.fixture(scope="session")
def torch_fidelity() -> SimpleNamespace:
    """torch-fidelity's Inception and measures; afterwards no other code sees it or the stand-ins."""
    if not ORACLE.is_dir():
        pytest.skip(f"no torch-fidelity in {ORACLE}; make installs it there")
    names = {
        "inception": "feature_extractor_inceptionv3",
        "fid": "metric_fid",
        "isc": "metric_isc",
        "prc": "metric_prc",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ORACLE)
        for name, attributes in STAND_INS.items():
            module = ModuleType(name)
            patch.setitem(sys.modules, name, module)
            for attribute in attributes:
                setattr(module, attribute, object)
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, module)
        found = {name: importlib.import_module(f"torch_fidelity.{module}") for name, module in names.items()}
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
            del sys.modules[name]
    return SimpleNamespace(**found)


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    """Random weights in the published layout, of sizes that keep activations near 1; read only."""
    generator = torch.Generator().manual_seed(1)
    network = Inception()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return dict(network.state_dict())


@pytest.fixture(scope="session")
def weights_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those weights as a .pth; read only."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


class SmallNetwork(nn.Module):
    """Means of the image's quarters, and the squares of the first half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTHS[0], 5)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        pooled = nn.functional.adaptive_avg_pool2d(images_B3HW.float() / 255, 2).flatten(1)
        return pooled, pooled[:, : WIDTHS[1]].square()


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FeatureNetwork:
    """Stands where Inception does, so that covariances have 12 rows instead of 2048; "published"."""
    monkeypatch.setattr(reference, "POOL", WIDTHS[0])
    monkeypatch.setattr(reference, "SPATIAL", WIDTHS[1])
    network, device = SmallNetwork().eval().requires_grad_(False), torch.device("cpu")
    return FeatureNetwork(
        network=network, device=device, path=tmp_path / "weights.pth", sha256="a" * 64, published=True
    )
