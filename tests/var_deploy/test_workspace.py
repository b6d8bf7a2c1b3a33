"""The block that stays between requests: whose it is, how large it is, and that nobody has to wait for its pages."""

from __future__ import annotations

import gc
import mmap
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import var_deploy
from var_deploy.errors import EngineError
from var_deploy.workspace import Workspace

MB = 1 << 20


def test_the_same_block_comes_back_while_it_is_large_enough():
    workspace = Workspace()
    first = workspace.take(5 * MB)
    second = workspace.take(5 * MB)  # the first is still out
    assert second is not first
    workspace.give(first)
    assert workspace.take(3 * MB) is first
    workspace.give(first)
    assert len(workspace.take(6 * MB)) >= 6 * MB  # and the smaller one is gone
    assert workspace.take(MB) is not first


def test_the_largest_stays():
    workspace = Workspace()
    small, large = workspace.take(MB), workspace.take(2 * MB)
    for block in (small, large, small):
        workspace.give(block)
    assert workspace.take(1) is large
    assert workspace.take(1) is not small


@given(st.lists(st.integers(0, 3 * mmap.PAGESIZE), min_size=1, max_size=8))
def test_no_two_have_the_same_memory(sizes):
    workspace = Workspace()
    blocks = [workspace.take(size) for size in sizes]
    for i, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        block[:size] = bytes([i]) * size
    for i, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        assert block[:size] == bytes([i]) * size
        workspace.give(block)


def test_a_system_without_the_advice_keeps_nothing(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_FREE")
    workspace = Workspace()
    block = workspace.take(MB)
    workspace.give(block)
    assert workspace.take(MB) is not block


def test_threads_never_share_a_block():
    workspace = Workspace()

    def use(i: int) -> bool:
        block = workspace.take(MB)
        array = np.frombuffer(block, np.int64)
        array[:] = i
        kept = bool((array == i).all())
        del array
        workspace.give(block)
        return kept

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(200)))


@pytest.mark.parametrize("decoder", ["graph", "winograd"])
def test_a_second_request_takes_the_memory_of_the_first(tiny_bundle, decoder):
    """Caches and maps of all requests lie in one block, and the pictures do not show it."""
    pipe = var_deploy.load(tiny_bundle, decoder=decoder)
    workspace, taken, given = pipe.engine._workspace, [], []
    take, give = workspace.take, workspace.give
    workspace.take = lambda size: taken.append(take(size)) or taken[-1]
    workspace.give = lambda block: given.append(block) or give(block)
    expected = var_deploy.load(tiny_bundle, decoder=decoder).generate([0, 1], seeds=5).pixels
    runs = [pipe.generate([0, 1], seeds=5).pixels for _ in range(3)]
    assert len(taken) == len(given) == (3 if decoder == "graph" else 6)
    # Of two sizes, the larger stays; blocks are kept alive here, so that another one is another object.
    assert len({id(block) for block in taken[2:]}) == 1
    assert workspace.reused == 0
    for other in runs:
        np.testing.assert_array_equal(other, expected)


def test_a_block_that_is_taken_again_costs_no_page_faults():
    workspace = Workspace()
    faults = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = workspace.take(64 * MB)
        np.frombuffer(block, np.uint8)[:: mmap.PAGESIZE] = 1
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        workspace.give(block)
    assert faults[1] <= 0.5 * faults[0]  # none, but for what the system took back meanwhile


def test_what_is_out_again_is_told_as_the_system_takes_it_for_free(tiny_bundle):
    workspace = Workspace()
    first = workspace.take(2 * MB)
    assert workspace.reused == 0
    workspace.give(first)
    assert workspace.reused == 0
    assert workspace.take(MB) is first
    assert workspace.reused == 2 * MB
    workspace.give(first)
    assert workspace.reused == 0

    engine = var_deploy.load(tiny_bundle).engine
    for expected in (False, True):
        state = engine.begin(np.array([0, 1]))
        assert (engine.memory_reused() > 0) is expected
        del state
        gc.collect()


def test_no_memory_is_one_line():
    with pytest.raises(EngineError, match=r"^[\d,]+ MB for a request: .*; free memory, or make the batch smaller$"):
        Workspace().take(1 << 60)


def test_states_side_by_side_have_their_own_caches(tiny_bundle):
    engine = var_deploy.load(tiny_bundle).engine
    one, other = (engine.begin(np.array([0, 1])) for _ in range(2))
    caches = [next(iter(state.caches.values())) for state in (one, other)]
    assert not np.shares_memory(*caches)
