"""keep_given against its reference: slices of a longer sequence, odd counts, a width that is no power of two."""

from __future__ import annotations

import pytest
import torch

from var_kernels import reference
from var_kernels.keep_given import keep_given


@pytest.mark.parametrize(("B", "L", "begin", "n", "C"), [(1, 1, 0, 1, 8), (3, 50, 5, 33, 5), (2, 70, 6, 64, 32)])
def test_against_the_reference(B, L, begin, n, C, device):
    given_BL = torch.randint(-1, 4, (B, L), device=device)
    tokens_BL, codes_BLC = torch.full((B, L), 9, device=device), torch.randn(B, L, C, device=device)
    here = slice(begin, begin + n)
    results = []
    for op in (keep_given, reference.keep_given):
        tokens, codes_BnC = tokens_BL.clone(), torch.full((B, n, C), 7.0, device=device)
        op(given_BL[:, here], codes_BLC[:, here], tokens_out_Bn=tokens[:, here], codes_out_BnC=codes_BnC)
        results.append((tokens, codes_BnC))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)  # copies
    tokens_BL, codes_BnC = results[0]
    given_Bn = given_BL[:, here] >= 0
    assert (tokens_BL[:, here] == torch.where(given_Bn, given_BL[:, here], 9)).all()
    assert (codes_BnC[~given_Bn] == 7).all()


def test_nothing_outside_the_slice_is_touched(device):
    tokens_BL, guard = torch.full((2, 9), 5, device=device), torch.full((4, 3, 8), 7.0, device=device)
    given_Bn, given_BnC = torch.ones(2, 3, dtype=torch.int64, device=device), torch.zeros(2, 3, 8, device=device)
    keep_given(given_Bn, given_BnC, tokens_out_Bn=tokens_BL[:, 4:7], codes_out_BnC=guard[1:3])
    assert (tokens_BL[:, 4:7] == 1).all()
    assert (tokens_BL[:, :4] == 5).all()
    assert (tokens_BL[:, 7:] == 5).all()
    assert (guard[1:3] == 0).all()
    assert (guard[::3] == 7).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("given_tokens_Bn", torch.zeros(1, 2).long(), r"given_tokens_Bn: shape \(1, 2\), expected \(1, 3\)"),
        ("tokens_out_Bn", torch.zeros(1, 3).int(), "tokens_out_Bn: torch.int32, expected torch.int64"),
        ("tokens_out_Bn", torch.zeros(1, 6).long()[:, ::2], "tokens_out_Bn: expected unit stride along n"),
        ("given_codes_BnC", torch.zeros(1, 3, 5), r"given_codes_BnC: shape \(1, 3, 5\), expected \(1, 3, 4\)"),
        ("given_codes_BnC", torch.zeros(1, 3, 8)[..., ::2], r"given_codes_BnC: strides .* expected \(any, 4, 1\)"),
    ],
)
def test_wrong_input_is_named(name, value, message):
    arguments = {
        "given_tokens_Bn": torch.zeros(1, 3).long(),
        "given_codes_BnC": torch.zeros(1, 3, 4),
        "tokens_out_Bn": torch.zeros(1, 3).long(),
        "codes_out_BnC": torch.zeros(1, 3, 4),
    }
    with pytest.raises(ValueError, match=message):
        keep_given(**(arguments | {name: value}))
