"""Fixtures shared by all tests: golden cases as checkpoint files and as exported bundles, made once per run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors.numpy import save_file
from torch import Tensor

from golden import Golden, rule_state_dicts
from odd_models import ODD_CONFIGURATIONS, odd_configs, random_models
from var_deploy.bundle import MANIFEST, sha256_of
from var_deploy.config import VARConfig, VQVAEConfig

# Machines that run tests are busy: a slow example is no failure. CI tries the same examples every time.
settings.register_profile("var_deploy", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("var_deploy")

# Before Triton loads, which tests of other packages may cause: without a GPU kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

Pair = tuple[Golden, Path, Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU is skipped where there is none, whatever was asked for."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers in every run and in any order."""
    torch.manual_seed(0)


def write_golden_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """Writes the rule weights of a golden case as `var_NAME.safetensors` and `vae_NAME.safetensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / f"var_{name}.safetensors", directory / f"vae_{name}.safetensors"
    for path, state in zip(paths, rule_state_dicts(Golden.load(name)), strict=True):
        save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path)
    return paths


@pytest.fixture(scope="session")
def golden_pair() -> Callable[[Path, str], tuple[Path, Path]]:
    """`golden_pair(directory, name)` writes a fresh (VAR, VQVAE) checkpoint pair, for tests that alter the files."""
    return write_golden_pair


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(golden, VAR path, VQVAE path) of four scales and own AdaLN; read only."""
    return Golden.load("tiny"), *write_golden_pair(tmp_path_factory.mktemp("tiny_pair"), "tiny")


@pytest.fixture(scope="session")
def shared_aln_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(golden, VAR path, VQVAE path) of the 512 px scale list style with shared AdaLN; read only."""
    return Golden.load("shared_aln"), *write_golden_pair(tmp_path_factory.mktemp("shared_aln_pair"), "shared_aln")


def _export(pair: Pair, out: Path) -> Path:
    from var_export.bundle import bundle_from_checkpoint  # imports torch and onnx

    return bundle_from_checkpoint(pair[1], pair[2], out)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of `tiny_pair`; read only, copy it to alter it."""
    return _export(tiny_pair, tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def shared_aln_bundle(shared_aln_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of `shared_aln_pair`; read only, copy it to alter it."""
    return _export(shared_aln_pair, tmp_path_factory.mktemp("shared_aln") / "bundle")


def reseal_files(bundle: Path, *names: str) -> None:
    """Writes the present size and digest of altered files into bundle.json, as a forger would."""
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    for name in names:
        file = bundle / name
        manifest["files"][name] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture(scope="session")
def reseal() -> Callable[..., None]:
    """`reseal(bundle, *names)` makes the seals of altered files fit again."""
    return reseal_files


@pytest.fixture
def tiny_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_bundle` that a test may alter."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def odd_states() -> Callable[[str], tuple[VARConfig, VQVAEConfig, dict[str, Tensor], dict[str, Tensor]]]:
    """`odd_states(name)`: configurations and state dicts of a row of the table, free to alter."""

    def make(name: str) -> tuple[VARConfig, VQVAEConfig, dict[str, Tensor], dict[str, Tensor]]:
        var, vqvae = random_models(*odd_configs(name))
        return var.config, vqvae.config, dict(var.state_dict()), dict(vqvae.state_dict())

    return make


@pytest.fixture(scope="session")
def odd_names() -> list[str]:
    return list(ODD_CONFIGURATIONS)


@pytest.fixture
def write_pth(tmp_path: Path) -> Callable[..., Path]:
    """`write_pth(content, name="x.pth", **torch_save_options)` → path of the file."""

    def write(content: Any, name: str = "file.pth", **options: Any) -> Path:
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return write
