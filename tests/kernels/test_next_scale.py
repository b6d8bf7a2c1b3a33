"""next_scale against its reference and, pyramid by pyramid, the trainer's quantiser: odd sides, odd widths."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from var_deploy.config import VQVAEConfig
from var_deploy.interpolation import area_matrix, bicubic_matrix
from var_kernels import reference
from var_kernels.next_scale import next_scale
from var_kernels.reference import resampling_taps
from var_train.presets import randomise
from var_train.quantizer import MultiScaleQuantizer

#: Sums of up to 9·C products in another order; on a GPU of numbers split into pairs that keep 22 bits.
FACTOR = 20


def matrices(h, p, q):
    """Cell taps, and where there is a next scale token taps and area matrix."""
    enlarge_hp = torch.from_numpy(bicubic_matrix(p, h))
    if q is None:
        return {"cell_taps_3hp": resampling_taps(enlarge_hp)}
    area_qh = torch.from_numpy(area_matrix(h, q))
    taps = {"cell_taps_3hp": resampling_taps(enlarge_hp), "token_taps_3qp": resampling_taps(enlarge_hp, area_qh)}
    return {**taps, "area_qh": area_qh}


def inputs(B, h, p, q, C, D):
    words = {} if q is None else {"word_weight_CD": torch.randn(C, D) / C**0.5, "position_mD": torch.randn(q * q, D)}
    return {
        "codes_BnC": torch.randn(B, p * p, C),
        "f_hat_BlC": torch.randn(B, h * h, C),
        "phi_weight_9CC": torch.randn(9, C, C) / (9 * C) ** 0.5,
        "phi_bias_C": torch.randn(C),
        **matrices(h, p, q),
        **words,
    }


def run(function, arguments, device, R=0):
    """(f_hat, x or None): outputs lie between guard rows that must stay as they are."""
    given = {name: tensor.to(device) for name, tensor in arguments.items()}
    buffers = {"f_hat_out_BlC": torch.full((len(given["f_hat_BlC"]) + 2, *given["f_hat_BlC"].shape[1:]), torch.nan)}
    if R:
        buffers["x_out_RmD"] = torch.full((R + 2, *given["position_mD"].shape), torch.nan)
    buffers = {name: buffer.to(device) for name, buffer in buffers.items()}
    for buffer in buffers.values():
        buffer[[0, -1]] = 7.0
    function(**given, **{name: buffer[1:-1] for name, buffer in buffers.items()})
    for buffer in buffers.values():
        assert (buffer[[0, -1]] == 7).all(), "written beside the buffer"
    return buffers["f_hat_out_BlC"][1:-1], buffers["x_out_RmD"][1:-1] if R else None


SIZES = [  # B, h, p, q, C, D, halves of the rows
    (1, 4, 1, 2, 5, 64, 2),
    (3, 3, 1, 3, 5, 64, 1),
    (2, 7, 4, 5, 32, 192, 2),
    (2, 9, 3, 4, 5, 64, 2),
    (1, 16, 13, 16, 32, 64, 2),
    (1, 18, 5, 7, 16, 192, 1),
    (2, 7, 7, None, 32, 0, 0),
    (1, 17, 17, None, 5, 0, 0),
    (1, 32, 24, 32, 5, 64, 1),
    (1, 32, 32, None, 5, 0, 0),
]
PUBLISHED_SIZES = [
    (1, 16, 1, 2, 32, 1024, 2),
    (8, 16, 13, 16, 32, 1920, 2),
    (2, 32, 24, 32, 32, 2304, 2),
    (2, 32, 32, None, 32, 0, 0),
    (1, 64, 48, 64, 32, 192, 1),
]


def assert_like_the_reference(B, h, p, q, C, D, halves, device, near):
    arguments = inputs(B, h, p, q, C, D)
    f_hat_BlC, x_RmD = run(next_scale, arguments, device, halves * B)
    expected_f_hat_BlC, expected_RmD = run(reference.next_scale, arguments, device, halves * B)
    near(f_hat_BlC, expected_f_hat_BlC, torch.float32, factor=FACTOR)
    if q is not None:
        near(x_RmD, expected_RmD, torch.float32, factor=FACTOR)
        assert torch.equal(x_RmD[:B], x_RmD[-B:]), "both halves alike"


@pytest.mark.parametrize("sizes", SIZES)
def test_against_the_reference_with_nothing_outside_touched(sizes, device, near):
    assert_like_the_reference(*sizes, device, near)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", PUBLISHED_SIZES)
def test_published_sizes(sizes, device, near):
    assert_like_the_reference(*sizes, device, near)


def test_images_do_not_mix(device):
    arguments = inputs(3, 5, 2, 3, 5, 64)
    f_hat_BlC, x_RmD = run(next_scale, arguments, device, 3)
    arguments["codes_BnC"][1] = arguments["f_hat_BlC"][1] = torch.nan
    bad_f_hat_BlC, bad_x_RmD = run(next_scale, arguments, device, 3)
    assert torch.equal(bad_f_hat_BlC[::2], f_hat_BlC[::2])
    assert torch.equal(bad_x_RmD[::2], x_RmD[::2])
    assert bad_f_hat_BlC[1].isnan().all()


def phi_as_one_convolution(phi):
    """φ(x) = 0.5·x + 0.5·conv(x) as weights [tap, in, out] and a bias."""
    C = phi.weight.shape[0]
    weight_33CC = 0.5 * phi.weight.detach().permute(2, 3, 1, 0)
    weight_33CC[1, 1] += 0.5 * torch.eye(C)
    return weight_33CC.reshape(9, C, C).contiguous(), 0.5 * phi.bias.detach()


@pytest.mark.parametrize(
    ("function", "patch_nums"),
    [
        (reference.next_scale, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
        (reference.next_scale, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
        (reference.next_scale, (2, 5, 7)),
        (next_scale, (1, 2, 3, 5)),
        (next_scale, (2, 4, 7)),
        pytest.param(next_scale, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), marks=pytest.mark.gpu),
    ],
)
def test_a_pyramid_adds_up_to_what_the_trainer_computes(function, patch_nums, device, near):
    B, C, D, h = 2, 6, 64, patch_nums[-1]
    quantizer = MultiScaleQuantizer(VQVAEConfig(patch_nums=patch_nums, vocab_size=7, z_channels=C, ch=32))
    randomise(quantizer)
    word_weight_CD = torch.randn(C, D) / C**0.5
    f_hat_BlC, expected_BChh = torch.zeros(B, h * h, C), torch.zeros(B, C, h, h)
    for k, (p, q) in enumerate(pairwise((*patch_nums, None))):
        codes_BnC = torch.randn(B, p * p, C)
        weight_9CC, bias_C = phi_as_one_convolution(quantizer.phi(k))
        arguments = {"codes_BnC": codes_BnC, "f_hat_BlC": f_hat_BlC, **matrices(h, p, q)}
        arguments |= {"phi_weight_9CC": weight_9CC, "phi_bias_C": bias_C}
        if q is not None:
            arguments |= {"word_weight_CD": word_weight_CD, "position_mD": torch.randn(q * q, D)}
        f_hat_BlC, x_RmD = run(function, arguments, device, B if q else 0)
        with torch.no_grad():
            expected_BChh = expected_BChh + quantizer.contribution(k, codes_BnC)
        near(f_hat_BlC.cpu(), expected_BChh.flatten(2).transpose(1, 2), torch.float32, factor=FACTOR)
        if q is not None:
            words_BmD = quantizer.next_features(k + 1, expected_BChh) @ word_weight_CD
            near(x_RmD.cpu(), words_BmD + arguments["position_mD"], torch.float32, factor=FACTOR)


def test_any_resampling_with_taps_can_be_had(device):
    """The kernel knows nothing of bicubic weights: dense taps too give Σ taps[dy]·codes·taps[dx]ᵀ·W[dy, dx]."""
    arguments = inputs(1, 5, 3, None, 4, 0)
    arguments["cell_taps_3hp"] = taps_3hp = torch.randn(3, 5, 3)
    f_hat_BlC, _ = run(next_scale, arguments, device)
    weight_33CC, codes_ppC = arguments["phi_weight_9CC"].view(3, 3, 4, 4), arguments["codes_BnC"].view(3, 3, 4)
    sums_hhC = torch.einsum("ahp,bwr,prc,abcd->hwd", taps_3hp, taps_3hp, codes_ppC, weight_33CC)
    expected_BlC = arguments["f_hat_BlC"] + arguments["phi_bias_C"] + sums_hhC.view(1, 25, 4)
    torch.testing.assert_close(f_hat_BlC.cpu(), expected_BlC, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes_BnC": torch.zeros(1, 5, 5)}, r"codes_BnC: shape \(1, 5, 5\), expected \(1, 4, 5\)"),
        ({"f_hat_BlC": torch.zeros(1, 5, 16).mT}, "f_hat_BlC: strides .* expected contiguous"),
        ({"token_taps_3qp": torch.zeros(3, 2, 2)}, r"token_taps_3qp: shape \(3, 2, 2\), expected \(3, 3, 2\)"),
        ({"x_out_RmD": torch.zeros(2, 4, 64)}, r"x_out_RmD: shape \(2, 4, 64\), expected \(2, 9, 64\)"),
        ({"area_qh": None}, "x_out_RmD: expected token_taps, area, word_weight and position with it"),
    ],
)
def test_wrong_input_is_named(change, message):
    outputs = {"f_hat_out_BlC": torch.zeros(1, 16, 5), "x_out_RmD": torch.zeros(2, 9, 64)}
    with pytest.raises(ValueError, match=message):
        next_scale(**{**inputs(1, 4, 2, 3, 5, 64), **outputs, **change})


def test_the_feature_map_must_not_be_overwritten_while_it_is_read():
    arguments = inputs(1, 4, 4, None, 5, 0)
    with pytest.raises(ValueError, match="f_hat_out_BlC: the same buffer as f_hat_BlC, expected another"):
        next_scale(**arguments, f_hat_out_BlC=arguments["f_hat_BlC"])
