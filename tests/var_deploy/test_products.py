"""One thread for NumPy's products while anybody needs it, whoever comes and goes in whatever thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from var_deploy import philox, products
from var_deploy.products import single_threaded
from var_deploy.sampling import smooth_codes


def threads() -> dict[str, int]:
    """Of NumPy's library, by file."""
    found = ThreadpoolController().select(user_api="blas").info()
    return {library["filepath"]: library["num_threads"] for library in found if "numpy" in library["filepath"]}


def in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_the_last_to_leave_restores_the_number():
    before = threads()
    assert before
    first, second = single_threaded(), single_threaded()
    in_a_thread(first.__enter__)
    assert set(threads().values()) == {1}
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(threads().values()) == {1}
    in_a_thread(lambda: second.__exit__(None, None, None))
    assert threads() == before


def test_an_error_inside_restores_it_too():
    before = threads()
    try:
        with single_threaded():
            raise ValueError
    except ValueError:
        pass
    assert threads() == before


class Listening(np.ndarray):
    """An array that notes on how many threads it is multiplied."""

    seen: list[set[int]] = []  # noqa: RUF012

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if ufunc is np.matmul:
            self.seen.append(set(threads().values()))
        plain = [np.asarray(value) if isinstance(value, Listening) else value for value in inputs]
        return getattr(ufunc, method)(*plain, **options)


def test_mixed_codes_are_made_on_one_thread(monkeypatch):
    monkeypatch.setattr(Listening, "seen", [])
    n, V, C = 3, 50, 8
    rng = np.random.default_rng(0)
    codebook_VC = rng.standard_normal((V, C)).astype(np.float32).view(Listening)
    logits_nV = rng.standard_normal((n, V)).astype(np.float32)
    smooth_codes(logits_nV, np.ones((n, V), bool), philox.gumbels(0, 0, n, V), 0.5, codebook_VC)
    assert Listening.seen == [{1}]


@pytest.fixture
def without_threadpoolctl(monkeypatch):
    products._matrix_libraries.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "threadpoolctl", None)
        yield
    products._matrix_libraries.cache_clear()


def test_without_threadpoolctl_nothing_is_set(without_threadpoolctl):
    with single_threaded():
        assert products._matrix_libraries() == []
