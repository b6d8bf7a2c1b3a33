"""Who works in a directory of samples: a shard once, and none that overlaps with it."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pytest

from var_deploy.errors import RequestError
from var_deploy.samples.folder import SampleFolder
from var_deploy.samples.plan import Shard


@pytest.fixture
def folder(plan, tmp_path) -> SampleFolder:
    return SampleFolder(path=tmp_path / "out", plan=plan)


def test_a_shard_is_made_by_one_process_at_a_time_and_others_beside_it(folder, plan, run_sample):
    second = SampleFolder(path=folder.path, plan=plan)
    with folder.held(Shard(index=1, total=2)):
        with second.held(Shard(index=2, total=2)):
            pass
        with pytest.raises(RequestError, match="another process makes shard 1 of 2 of these samples here; wait until"):
            run_sample(folder.path, shard=Shard(index=1, total=2))
    with second.held(Shard(index=1, total=2)):
        pass
    with folder.held(Shard()), pytest.raises(RequestError, match="another process makes these samples here; wait"):
        run_sample(folder.path)


def test_shards_that_are_cut_otherwise_wait_for_each_other(folder, run_sample):
    message = r"\.shard-1-of-2\.lock: another process is at work with another number of shards, this is 1 of 1; give"
    with folder.held(Shard(index=1, total=2)), pytest.raises(RequestError, match=message):
        run_sample(folder.path)
    with folder.held(Shard()):  # the file of the other is still there
        pass


def test_shards_that_start_together_agree_on_one_plan(folder, plan):
    """Every one writes or compares; with two plans one of them is refused, whichever is later."""
    folder.path.mkdir()
    refused: list[str] = []
    barrier = threading.Barrier(8)

    def note(seed: int) -> None:
        own = SampleFolder(path=folder.path, plan=replace(plan, seed=seed))
        barrier.wait()
        try:
            own.note({"precision": "fp32", "engine": "onnx"})
        except RequestError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=note, args=(index % 2,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 4
    assert all(re.search("another plan: seed [01], now [01];", line) for line in refused)


def test_a_directory_that_cannot_be_made_is_one_line(plan, tmp_path):
    (tmp_path / "file").touch()
    folder = SampleFolder(path=tmp_path / "file" / "out", plan=plan)
    with (
        pytest.raises(RequestError, match=r"file/out: cannot be made \(Not a directory\); choose another place"),
        folder.held(Shard()),
    ):
        pass


@pytest.mark.parametrize(("count", "name"), [(1, "000000.png"), (10**6, "000000.png"), (10**6 + 1, "0000000.png")])
def test_names_have_the_digits_that_the_count_needs(plan, tmp_path, count, name):
    folder = SampleFolder(path=tmp_path, plan=replace(plan, count=count))
    assert folder.file(0).name == name
    assert len(folder.file(count - 1).name) == len(name)
