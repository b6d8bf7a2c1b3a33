"""The network against torch-fidelity's, with random weights in the published layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from var_deploy.evaluation.inception import POOL, SPATIAL, Inception, enlarge

#: Both do the same float32 arithmetic but for the order of sums; random weights make no sum cancel.
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def ours(weights) -> Inception:
    network = Inception()
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def theirs(torch_fidelity, weights_file):
    wanted = ["2048", "logits_unbiased"]
    return torch_fidelity.inception.FeatureExtractorInceptionV3("x", wanted, str(weights_file))


@pytest.mark.parametrize("size", [(37, 53), (256, 256), (299, 299), (310, 301)], ids="{0[0]}x{0[1]}".format)
def test_features_are_those_of_torch_fidelity(ours, theirs, size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    branches: list[torch.Tensor] = []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: branches.append(output))
    pooled, logits = theirs(images)
    hook.remove()
    found_pooled, found_spatial = ours(images)
    spatial = branches[0].permute(0, 2, 3, 1)[..., :7].reshape(2, -1)  # as guided-diffusion takes them, in NHWC
    found_logits = torch.from_numpy(found_pooled.numpy() @ ours.fc.weight.numpy().T)
    for found, expected, width in (
        (found_pooled, pooled, POOL),
        (found_spatial, spatial, SPATIAL),
        (found_logits, logits, 1008),
    ):
        assert found.shape == (2, width)
        largest = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=RELATIVE * largest)
        assert (expected[0] - expected[1]).abs().max() > 100 * RELATIVE * largest  # the images are told apart


def test_enlarging_places_cells_as_tensorflow_1_does():
    row = torch.tensor([0.0, 1, 2]).view(1, 1, 1, 3)
    np.testing.assert_allclose(enlarge(row, 6)[0, 0, 0], [0, 0.5, 1, 1.5, 2, 2])  # half cells would start with 0, 0.25
    np.testing.assert_allclose(enlarge(row.mT, 2)[0, 0, :, 0], [0, 1.5])
    image = torch.arange(12.0).view(1, 1, 3, 4)
    grid = enlarge(image, 12)[0, 0]
    expected = 4 * np.minimum(np.arange(12) / 4, 2)[:, None] + np.minimum(np.arange(12) / 3, 3)
    np.testing.assert_allclose(grid, expected, atol=1e-5)
