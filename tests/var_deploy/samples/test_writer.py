"""Images beside the engine: what waits is bounded, what fails ends the run, what was given is written."""

from __future__ import annotations

import threading

import pytest

from var_deploy.errors import RequestError
from var_deploy.samples import writer
from var_deploy.samples.folder import SampleFolder
from var_deploy.samples.writer import Writer


@pytest.fixture
def folder(plan, tmp_path) -> SampleFolder:
    return SampleFolder(path=tmp_path, plan=plan)


@pytest.mark.parametrize("ends", [None, SystemExit(143), KeyboardInterrupt()], ids=repr)
def test_all_that_was_given_is_written_however_the_block_is_left(folder, ends):
    told = []
    try:
        with Writer(folder, lambda: told.append(1)) as writing:
            for index in range(5):
                writing.put(index, lambda index=index: b"%d" % index)
            if ends is not None:
                raise ends
    except (SystemExit, KeyboardInterrupt):
        assert ends is not None
    assert sorted(path.name for path in folder.path.iterdir()) == [f"00000{index}.png" for index in range(5)]
    assert (folder.path / "000003.png").read_bytes() == b"3"
    assert len(told) == 5


def test_no_more_than_a_few_wait(folder, monkeypatch):
    monkeypatch.setattr(writer, "_WAITING", 6)
    release, given = threading.Event(), []

    def png() -> bytes:
        assert release.wait(60)
        return b""

    def give() -> None:
        with Writer(folder, lambda: None) as writing:
            for index in range(10):
                given.append(index)
                writing.put(index, png)

    giver = threading.Thread(target=give)
    giver.start()
    giver.join(0.2)
    assert given == list(range(7))  # the seventh waits for the first
    release.set()
    giver.join()
    assert len(list(folder.path.iterdir())) == 10


def test_what_cannot_be_written_ends_the_run(folder):
    (folder.path / "000002.png").mkdir()

    def give() -> None:
        with Writer(folder, lambda: None) as writing:
            for index in range(4):
                writing.put(index, lambda: b"x")

    with pytest.raises(RequestError, match=r"000002.png: cannot write \(Is a directory\); choose another place"):
        give()
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".")] == []
