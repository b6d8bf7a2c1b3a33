"""A staging directory becomes its goal or vanishes, with the parents that were made for it."""

from __future__ import annotations

import pytest

from var_deploy.errors import BundleError, DataError
from var_deploy.staging import put_in_place, require_absent, staging_directory


def test_what_is_put_in_place_stays(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with staging_directory(out) as staging:
        assert staging.parent == out.parent
        assert staging.stat().st_mode & 0o777 == 0o700
        (staging / "file").write_text("content")
        put_in_place(staging, out, BundleError)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "file").read_text() == "content"
    assert out.stat().st_mode & 0o777 == 0o755


def test_what_is_not_vanishes_with_its_parents(tmp_path):
    def interrupted() -> None:
        with staging_directory(tmp_path / "there" / "a" / "b" / "out", "trials") as staging:
            assert staging.name.startswith(".out.trials-")
            (staging / "sub").mkdir()
            raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_parents_that_others_use_meanwhile_stay(tmp_path):
    with staging_directory(tmp_path / "a" / "out"):
        (tmp_path / "a" / "of another").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["of another"]


@pytest.mark.parametrize("error", [BundleError, DataError])
def test_a_goal_made_meanwhile_is_left_alone(tmp_path, error):
    def overtaken() -> None:
        with staging_directory(out) as staging:
            out.mkdir()  # a rename would replace it
            put_in_place(staging, out, error)

    out = tmp_path / "out"
    require_absent(out, error)
    message = "out: exists already; nothing is overwritten, choose another name or remove it"
    with pytest.raises(error, match=message):
        overtaken()
    assert list(tmp_path.iterdir()) == [out]
    out.rmdir()
    out.symlink_to("nowhere")
    with pytest.raises(error, match=message):
        require_absent(out, error)


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists"), staging_directory(tmp_path / "file" / "out"):
        pass
