"""The numpy quantiser against the reference's, for every layout of φ and both distances."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from var_deploy.bundle import Bundle
from var_deploy.config import VQVAEConfig
from var_deploy.errors import BundleError
from var_deploy.quantizer import Quantizer
from var_train.presets import randomise
from var_train.quantizer import MultiScaleQuantizer, Phi

# Sums of up to 4 scales of bicubic enlargement (torch keeps its weights in float32) and a 3×3 convolution.
ATOL = 2e-5


def _pair(**options) -> tuple[Quantizer, MultiScaleQuantizer]:
    """The same random quantiser twice: in numpy, from weights as a bundle holds them, and in PyTorch."""
    config = VQVAEConfig(patch_nums=(1, 2, 3, 5), vocab_size=37, z_channels=6, ch=32, **options)
    reference = MultiScaleQuantizer(config)
    randomise(reference)
    convs = [module for module in reference.quant_resi.modules() if isinstance(module, Phi)]
    identity_CC33 = torch.zeros(6, 6, 3, 3)
    identity_CC33[range(6), range(6), 1, 1] = 1
    weights = {
        "quantize.embedding.weight": reference.embedding.weight,
        "quantize.phi.weight": torch.cat([0.5 * conv.weight + 0.5 * identity_CC33 for conv in convs]),
        "quantize.phi.bias": torch.cat([0.5 * conv.bias for conv in convs]),
    }
    bundle = SimpleNamespace(
        path=Path("bundle"),
        manifest=SimpleNamespace(vqvae=config),
        weight=lambda name: weights[name].detach().numpy(),
    )
    return Quantizer(bundle), reference


LAYOUTS = [
    {"num_phi": 4, "phi_layout": "partial"},
    {"num_phi": 3, "phi_layout": "partial"},
    {"num_phi": 1, "phi_layout": "single"},
    {"num_phi": 4, "phi_layout": "per_scale"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
@pytest.mark.parametrize("using_znorm", [False, True])
@torch.no_grad()
def test_tokens_of_a_feature_map(layout, using_znorm):
    quantizer, reference = _pair(**layout, using_znorm=using_znorm)
    f_BChh = torch.randn(3, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    tokens = quantizer.tokens_from_features(f_BChh.numpy())
    assert [t.shape for t in tokens] == [(3, 1), (3, 4), (3, 9), (3, 25)]
    for ours, theirs in zip(tokens, reference.tokens_from_features(f_BChh), strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())


@torch.no_grad()
def test_cosine_and_distance_choose_differently():
    # Otherwise the test above would not tell the two apart.
    f_BChh = np.random.default_rng(2).standard_normal((3, 6, 5, 5)).astype(np.float32)
    near, cosine = (_pair(using_znorm=znorm)[0].tokens_from_features(f_BChh) for znorm in (False, True))
    assert any((a != b).any() for a, b in zip(near, cosine, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
@pytest.mark.parametrize("scales", [1, 3, 4])
@torch.no_grad()
def test_feature_map_of_all_or_the_first_tokens(layout, scales):
    quantizer, reference = _pair(**layout)
    rng = np.random.default_rng(3)
    tokens = [rng.integers(0, 37, (2, n)) for n in (1, 4, 9, 25)[:scales]]
    expected = reference.features_from_tokens([torch.from_numpy(t) for t in tokens])
    np.testing.assert_allclose(quantizer.features_from_tokens(tokens), expected.numpy(), atol=ATOL, rtol=0)


def test_weights_of_another_shape_are_a_bundle_error():
    quantizer, _ = _pair(num_phi=4)
    wrong = SimpleNamespace(
        path=Path("bundle"),
        manifest=SimpleNamespace(vqvae=quantizer.config),
        weight=lambda name: np.zeros((37, 5), np.float32),
    )
    with pytest.raises(
        BundleError,
        match=r"bundle: quantize\.embedding\.weight has shape \(37, 5\), expected \(37, 6\); export the bundle again",
    ):
        Quantizer(wrong)


def test_reads_its_weights_from_a_bundle(tiny_bundle):
    quantizer = Quantizer(Bundle.open(tiny_bundle))
    assert quantizer.codebook_VC.shape == (256, 32)
