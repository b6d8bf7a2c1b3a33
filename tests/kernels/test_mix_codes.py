"""mix_codes against its reference: odd counts of positions and entries, widths that are no power of two."""

from __future__ import annotations

import pytest
import torch

from var_kernels import reference
from var_kernels.mix_codes import mix_codes


@pytest.mark.parametrize(("B", "n", "V", "C"), [(1, 1, 64, 8), (3, 9, 1000, 5), (2, 16, 257, 32)])
def test_against_the_reference(B, n, V, C, device, near):
    weights_BnV = torch.randn(B, n, V, device=device).softmax(-1)
    codebook_VC = torch.randn(V, C, device=device)
    got_BnC, expected_BnC = (torch.full((B, n, C), torch.nan, device=device) for _ in range(2))
    mix_codes(weights_BnV, codebook_VC, codes_out_BnC=got_BnC)
    reference.mix_codes(weights_BnV, codebook_VC, codes_out_BnC=expected_BnC)
    near(got_BnC, expected_BnC, torch.float32, factor=4)  # V sums in another order


def test_nothing_outside_the_buffer_is_touched(device):
    guard = torch.full((4, 3, 8), 7.0, device=device)
    mix_codes(torch.ones(2, 3, 16, device=device), torch.ones(16, 8, device=device), codes_out_BnC=guard[1:3])
    assert (guard[1:3] == 16).all()
    assert (guard[::3] == 7).all()


def test_wrong_input_is_named(device):
    with pytest.raises(ValueError, match=r"codebook_VC: shape \(8, 4\), expected \(16, 4\)"):
        mix_codes(torch.zeros(1, 3, 16), torch.zeros(8, 4), codes_out_BnC=torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"codes_out_BnC: shape \(1, 2, 4\), expected \(1, 3, 4\)"):
        mix_codes(torch.zeros(1, 3, 16), torch.zeros(16, 4), codes_out_BnC=torch.zeros(1, 2, 4))
