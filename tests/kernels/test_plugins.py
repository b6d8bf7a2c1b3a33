"""The kernels of TensorRT's plugins against their references: with and without a branch, normalised and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import plugin_stand_ins
from var_kernels import plugins

#: Scores reach 100 with the largest query scale: an error in a float32's last place there is 1e-5 of a weight.
ATTENTION_FACTOR = {torch.float32: 10, torch.float16: 1, torch.bfloat16: 1}


def adaln_tensors(R, n, D, dtype, device) -> dict[str, Any]:
    """Of a block in the middle: gates and norms are one tensor with the vectors of three blocks."""
    modulation_RgD = torch.randn(R, 18, D).to(device, dtype)
    return {
        "x_RnD": (torch.randn(R, n, D) * 3 + 1).to(device),
        "y_RnD": torch.randn(R, n, D).to(device, dtype),
        "gates_RgD": modulation_RgD,
        "norms_RsD": modulation_RgD,
        "gamma_at": 7,
        "scale_at": 14,
        "shift_at": 17,
        "x_out_RnD": torch.full((R, n, D), torch.nan, device=device),
        "out_RnD": torch.full((R, n, D), torch.nan, dtype=dtype, device=device),
    }


def by_both(name: str, given: dict[str, Any], results: tuple[str, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(kernel's, reference's) of each result, which each gets memory of its own for."""
    made = []
    for module in (plugins, plugin_stand_ins):
        own = {result: given[result].clone() for result in results}
        getattr(module, name)(**given | own)
        made.append(own)
    return [(made[0][result], made[1][result]) for result in results]


@pytest.mark.parametrize(("R", "n", "D"), [(1, 1, 64), (3, 9, 192), (2, 25, 320)])
@pytest.mark.parametrize("kind", ["middle", "start", "head"])
def test_adaln_against_the_reference(R, n, D, kind, dtype, device, near):
    given = adaln_tensors(R, n, D, dtype, device)
    x_RnD = given["x_RnD"].clone()
    if kind == "start":
        given |= dict.fromkeys(["y_RnD", "gates_RgD", "gamma_at", "x_out_RnD"])
    if kind == "head":  # its own modulation, and a result in float32
        given |= {"norms_RsD": torch.randn(R, 2, D).to(device, dtype), "scale_at": 0, "shift_at": 1}
        given |= {"x_out_RnD": None, "out_RnD": torch.full((R, n, D), torch.nan, device=device)}
    results = ("out_RnD", "x_out_RnD") if kind == "middle" else ("out_RnD",)
    for got, expected in by_both("adaln", given, results):
        near(got, expected, got.dtype)
    assert torch.equal(given["x_RnD"], x_RnD), "x is an input"


@pytest.mark.parametrize(("R", "H", "n", "begin"), [(3, 1, 1, 0), (2, 3, 9, 5), (1, 2, 36, 55)])
@pytest.mark.parametrize("unit", [True, False], ids=["unit", "plain"])
def test_attention_against_the_reference(R, H, n, begin, unit, dtype, device, near):
    caches = [torch.randn(R, H, begin + n + 7, 64).to(device, dtype) for _ in range(2)]
    for cache in caches:
        cache[:, :, begin:] = torch.nan  # never read
    new = {name: torch.full((R, H, n, 64), torch.nan, dtype=dtype, device=device) for name in ("k", "v")}
    given = {
        "qkv_RnN": torch.randn(R, n, 3 * H * 64).to(device, dtype),
        "q_scale_H": torch.linspace(4, 100, H).to(device) if unit else None,
        "cache_k_RHLd": torch.nn.functional.normalize(caches[0], dim=-1),
        "cache_v_RHLd": caches[1],
        "begin": begin,
        "softmax_scale": 1.0 if unit else 0.125,
        "out_RnD": torch.full((R, n, H * 64), torch.nan, dtype=dtype, device=device),
        "k_new_RHnd": new["k"],
        "v_new_RHnd": new["v"],
    }
    before = [given[name].clone() for name in ("cache_k_RHLd", "cache_v_RHLd")]
    out, k_new, v_new = by_both("cached_attention", given, ("out_RnD", "k_new_RHnd", "v_new_RHnd"))
    near(*out, dtype, factor=ATTENTION_FACTOR[dtype])
    near(*k_new, dtype)
    assert torch.equal(*v_new)
    for name, cache in zip(("cache_k_RHLd", "cache_v_RHLd"), before, strict=True):
        torch.testing.assert_close(given[name], cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_RnD": torch.zeros(2, 3, 64).half()}, r"x_RnD: torch.float16, expected torch.float32"),
        ({"y_RnD": None}, "y_RnD, gates_RgD and gamma_at: expected all or none"),
        ({"y_RnD": torch.zeros(2, 4, 64)}, r"y_RnD: shape \(2, 4, 64\), expected \(2, 3, 64\)"),
        ({"norms_RsD": torch.zeros(3, 18, 64)}, r"norms_RsD: shape \(3, 18, 64\), expected \(2, 18, 64\)"),
        ({"gamma_at": 18}, "gamma_at: 18, expected 0 to 17 of 18 vectors"),
        ({"shift_at": -1}, "shift_at: -1, expected 0 to 17 of 18 vectors"),
        ({"x_out_RnD": torch.zeros(2, 3, 64).half()}, r"x_out_RnD: torch.float16, expected torch.float32"),
        ({"out_RnD": torch.zeros(2, 64, 3).mT}, r"out_RnD: strides \(192, 1, 3\) of shape"),
    ],
)
def test_wrong_input_of_adaln_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        plugins.adaln(**adaln_tensors(2, 3, 64, torch.float32, "cpu") | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_RnN": torch.zeros(2, 4, 192)}, r"qkv_RnN: shape \(2, 4, 192\), expected \(2, 4, 384\)"),
        ({"q_scale_H": torch.ones(3)}, r"q_scale_H: shape \(3,\), expected \(2,\)"),
        ({"cache_v_RHLd": torch.zeros(2, 2, 9, 64).half()}, r"cache_v_RHLd: torch.float16, expected torch.float32"),
        ({"k_new_RHnd": torch.zeros(2, 2, 5, 64)}, r"k_new_RHnd: shape \(2, 2, 5, 64\), expected \(2, 2, 4, 64\)"),
        ({"begin": 6}, "begin: 6 with 4 tokens, expected 0 to 5 in a cache of 9"),
    ],
)
def test_wrong_input_of_attention_is_named(change, message):
    caches = {"cache_k_RHLd": torch.zeros(2, 2, 9, 64), "cache_v_RHLd": torch.zeros(2, 2, 9, 64)}
    results = {name: torch.zeros(2, 2, 4, 64) for name in ("k_new_RHnd", "v_new_RHnd")}
    given = {"qkv_RnN": torch.zeros(2, 4, 384), "q_scale_H": torch.ones(2), "out_RnD": torch.zeros(2, 4, 128)}
    with pytest.raises(ValueError, match=message):
        plugins.cached_attention(**given | caches | results | {"begin": 5, "softmax_scale": 1.0} | change)
