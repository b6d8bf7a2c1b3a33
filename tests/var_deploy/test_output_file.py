"""Output files: whole or not there, nothing left behind, refused early where they could not be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from var_deploy.errors import RequestError
from var_deploy.output_file import check_output, replacing, write_text


def test_a_file_appears_whole_with_the_directories_it_needs(tmp_path):
    path = tmp_path / "a" / "b" / "x.txt"
    write_text(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    write_text(path, "second")
    assert path.read_text(encoding="utf-8") == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.txt"]


def _write_half(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    old, new = tmp_path / "x.txt", tmp_path / "a" / "b" / "y.txt"
    old.write_text("old")
    for path in (old, new):
        with pytest.raises(ZeroDivisionError), replacing(path) as partial:
            _write_half(partial)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_what_the_system_refuses_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"file/x: cannot write \(.+\); choose another place"):
        write_text(tmp_path / "file" / "x", "")


def test_a_place_is_checked_without_touching_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_output(tmp_path / "file")
    check_output(tmp_path / "not" / "yet" / "x")
    monkeypatch.chdir(tmp_path)
    check_output(Path("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for path, message in {
        tmp_path: "got a directory, expected a file name",
        tmp_path / "file" / "x": r"cannot write \(Not a directory: .+/file\); choose another place",
        Path("file/deeper/x"): r"cannot write \(Not a directory: .+/file\); choose another place",
    }.items():
        with pytest.raises(RequestError, match=message):
            check_output(path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_a_place_that_takes_no_files_is_refused():
    with pytest.raises(RequestError, match=r"/proc/self/x: cannot write \(.+: /proc/self\); choose another place"):
        check_output(Path("/proc/self/x"))
