"""Kernels run on the GPU where there is one, else in Triton's interpreter, which `tests/conftest.py` chooses.

On a GPU whatever takes `device` is marked `gpu`, so that `-m gpu` runs every kernel. The interpreter checks what a
kernel computes, not how it compiles; `test_resources.py` compiles every kernel. Its bf16 `tl.dot` multiplies bit
patterns and its conversion to bf16 cuts off, so bf16 is tested on a GPU only.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With CUDA, the tests beside this file that run on the device need it."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == Path(__file__).parent and "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)


#: Storage types of a parametrised test: bf16 needs a GPU.
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `dtype` runs for every storage type."""
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES)


#: Relative tolerance of one rounding to each storage type, with room for sums in another order.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Every element within factor × the type's tolerance of the reference, relative to the reference's largest."""
    assert got.shape == expected.shape
    assert got.isfinite().all(), "unwritten or not finite"
    error = (got.double() - expected.double()).abs()
    limit = factor * TOLERANCE[dtype] * max(1.0, expected.double().abs().max().item())
    place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= limit, f"largest difference {error.max():.2e} at {place}, limit {limit:.2e}"


@pytest.fixture
def near():
    """`near(got, expected, dtype, factor=1)`."""
    return assert_near


def assert_rounded_once(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Every bf16 element within one rounding of float64, which is 2⁻⁸ of itself with 8 significant bits.

    What is added up in float32 before it, where terms cancel too, may be 1e-5 of the largest element off.
    """
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5 * max(1.0, exact.abs().max().item()))


@pytest.fixture
def rounded_once():
    """`rounded_once(got, exact)`."""
    return assert_rounded_once
