"""uniforms against its reference, which the runtime's own generator holds: bit for bit, any seed, any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from var_deploy import philox
from var_kernels import reference
from var_kernels.uniforms import uniforms

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


def seeds_tensor(seeds, device):
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64)).to(device)


@pytest.mark.parametrize("L", [1, 5, 127, 128, 129, 680])
@pytest.mark.parametrize("function", [uniforms, reference.uniforms])
def test_against_the_reference_of_the_runtime(function, L, device):
    """Bit for bit, as is the reference beside the kernel."""
    out_BL = torch.full((len(SEEDS), L), torch.nan, dtype=torch.float64, device=device)
    assert function(seeds_tensor(SEEDS, device), out_BL=out_BL) is out_BL
    expected_BL = np.stack([philox.uniforms(seed, 0, L) for seed in SEEDS])
    np.testing.assert_array_equal(out_BL.cpu().numpy(), expected_BL)


def test_nothing_outside_the_buffer_is_touched(device):
    guard = torch.full((4, 33), 7.0, dtype=torch.float64, device=device)
    uniforms(seeds_tensor([1, 2], device), out_BL=guard[1:3])
    assert (guard[0] == 7).all()
    assert (guard[3] == 7).all()


def test_wrong_input_is_named(device):
    with pytest.raises(ValueError, match=r"seeds_B: shape \(3,\), expected \(2,\)"):
        uniforms(torch.zeros(3, dtype=torch.int64), out_BL=torch.zeros(2, 4, dtype=torch.float64))
