"""The resampling matrices against PyTorch's interpolate, over odd sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from var_deploy.interpolation import area_matrix, bicubic_matrix, bilinear

sizes = st.integers(1, 19)
# Inputs in float64, of order 1, so that only the rounding of the float32 matrices is left: 6e-8 per entry, 16 taps.
ATOL = 2e-6


def _map(size: int) -> np.ndarray:
    return np.random.default_rng(size).standard_normal((2, 3, size, size))


@given(n_in=sizes, n_out=sizes)
def test_bicubic_equals_torch(n_in, n_out):
    x, matrix = _map(n_in), bicubic_matrix(n_in, n_out)
    assert matrix.shape == (n_out, n_in)
    assert matrix.dtype == np.float32
    expected = F.interpolate(torch.from_numpy(x), size=(n_out, n_out), mode="bicubic").numpy()
    np.testing.assert_allclose(matrix @ x @ matrix.T, expected, atol=ATOL, rtol=0)


@given(n_in=sizes, n_out=sizes)
def test_area_equals_torch(n_in, n_out):
    x, matrix = _map(n_in), area_matrix(n_in, n_out)
    assert matrix.shape == (n_out, n_in)
    assert matrix.dtype == np.float32
    expected = F.interpolate(torch.from_numpy(x), size=(n_out, n_out), mode="area").numpy()
    np.testing.assert_allclose(matrix @ x @ matrix.T, expected, atol=ATOL, rtol=0)


@given(n_in=sizes, n_out=sizes)
def test_bilinear_equals_torch(n_in, n_out):
    x = _map(n_in).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(x), size=(n_out, n_out), mode="bilinear").numpy()
    np.testing.assert_allclose(bilinear(x, n_out), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("matrix", [bicubic_matrix, area_matrix])
@given(n_in=sizes, n_out=sizes)
def test_a_constant_stays_constant(matrix, n_in, n_out):
    np.testing.assert_allclose(matrix(n_in, n_out).sum(axis=1), 1, atol=1e-6)  # float32 rounding of up to 19 terms


@pytest.mark.parametrize("matrix", [bicubic_matrix, area_matrix])
def test_equal_sizes_change_nothing(matrix):
    np.testing.assert_array_equal(matrix(7, 7), np.eye(7, dtype=np.float32))
