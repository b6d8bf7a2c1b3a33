"""Weights kept in this machine's form: made once, mapped later, never half written, never wrong in silence."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import var_deploy
from var_deploy import locks, prepared
from var_deploy.engines import onnx as onnx_engine
from var_deploy.errors import EngineError, RequestError
from var_deploy.prepared import (
    SEALS,
    PreparedCache,
    default_cache,
    default_directory,
    entries,
    processor,
    remove_entries,
)


def write(directory: Path) -> None:
    (directory / "a.bin").write_bytes(b"packed")


def refuse(_directory: Path) -> None:
    raise AssertionError("made again")


@pytest.fixture
def cache(tmp_path) -> PreparedCache:
    return PreparedCache(directory=tmp_path / "cache")


def kept(cache: PreparedCache) -> list[str]:
    """Names of all that is there, but for the lock."""
    return [path.name for path in cache.directory.iterdir() if path.name != prepared.LOCK]


class TestEntry:
    def test_is_made_once(self, cache):
        first = cache.entry("x", ["1"], 6, write)
        assert first is not None
        assert (first / "a.bin").read_bytes() == b"packed"
        assert cache.entry("x", ["1"], 6, refuse) == first
        assert kept(cache) == [first.name]

    def test_is_found_without_being_made(self, cache):
        assert cache.find("x", ["1"]) is None
        made = cache.entry("x", ["1"], 6, write)
        assert cache.find("x", ["1"]) == made
        assert cache.find("x", ["2"]) is None
        (made / "a.bin").write_bytes(b"packec")
        assert cache.find("x", ["1"]) is None

    def test_depends_on_what_it_was_made_from_and_on_the_cpu(self, cache, monkeypatch):
        made = {cache.entry("x", source, 6, write) for source in (["1"], ["2"], ["1", "2"], ["12"])}
        monkeypatch.setattr(prepared, "processor", lambda: "another CPU")
        made.add(cache.entry("x", ["1"], 6, write))
        assert len(made) == 5

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda entry: (entry / "a.bin").write_bytes(b"packe"), "a.bin has 5 bytes, expected 6"),
            (lambda entry: (entry / "a.bin").write_bytes(b"packeD"), "a.bin has changed"),
            (lambda entry: (entry / "a.bin").unlink(), "damaged"),
            (lambda entry: (entry / SEALS).unlink(), "damaged"),
            (lambda entry: (entry / SEALS).write_text("{"), "damaged"),
            (lambda entry: (entry / SEALS).write_text("[]"), "damaged"),
            (lambda entry: (entry / SEALS).write_text("{}"), "empty"),
            (lambda entry: (entry / SEALS).write_text(json.dumps({"a.bin": {"size": -1, "sha256": ""}})), "damaged"),
        ],
    )
    def test_damage_is_said_and_mended(self, cache, damage, reason, caplog):
        entry = cache.entry("x", ["1"], 6, write)
        damage(entry)
        assert cache.entry("x", ["1"], 6, write) == entry
        assert f"{entry}: {reason}" in caplog.text
        assert "making it again" in caplog.text
        assert (entry / "a.bin").read_bytes() == b"packed"

    def test_without_digests_only_sizes_count(self, cache):
        entry = cache.entry("x", ["1"], 6, write)
        (entry / "a.bin").write_bytes(b"packeD")
        assert PreparedCache(directory=cache.directory, verify_digests=False).entry("x", ["1"], 6, refuse) == entry

    def test_too_little_space(self, cache, caplog):
        assert cache.entry("x", ["1"], 1 << 60, refuse) is None
        assert "nothing is kept" in caplog.text
        assert kept(cache) == []

    def test_a_place_that_cannot_be_written(self, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        assert PreparedCache(directory=tmp_path / "file").entry("x", ["1"], 6, refuse) is None
        assert f"{tmp_path / 'file'}" in caplog.text
        assert "cannot be kept" in caplog.text

    def test_a_failure_leaves_nothing(self, cache):
        def fail(directory: Path) -> None:
            write(directory)
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            cache.entry("x", ["1"], 6, fail)
        assert kept(cache) == []

    @pytest.mark.parametrize("error", [OSError(28, "No space left"), EngineError("No space left")])
    def test_a_disk_that_fills_up_is_no_failure(self, cache, error, caplog):
        def fill(directory: Path) -> None:
            write(directory)
            raise error

        assert cache.entry("x", ["1"], 6, fill) is None
        assert "cannot be kept (No space left)" in caplog.text
        assert kept(cache) == []

    def test_others_wait_for_the_one_that_makes_it(self, cache):
        """Two that start cold: the work is done once."""
        made: list[int] = []

        def make(directory: Path) -> None:
            made.append(1)
            time.sleep(0.2)
            write(directory)

        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(lambda _: cache.entry("x", ["1"], 6, make), range(3)))
        assert found == {cache.entry("x", ["1"], 6, refuse)}
        assert len(made) == 1

    def test_without_locks_another_process_may_be_quicker(self, cache, monkeypatch, caplog):
        def unsupported(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(locks.fcntl, "flock", unsupported)
        caplog.set_level(logging.INFO)

        def overtaken(directory: Path) -> None:
            write(directory)
            cache.entry("x", ["1"], 6, write)

        entry = cache.entry("x", ["1"], 6, overtaken)
        assert entry is not None
        assert cache.entry("x", ["1"], 6, refuse) == entry
        assert "cannot be locked (Function not implemented)" in caplog.text

    def test_a_process_that_never_lets_go_is_not_waited_for_without_end(self, cache, monkeypatch, caplog):
        monkeypatch.setattr(prepared, "PATIENCE", 0.2)
        cache.directory.mkdir()
        with (cache.directory / prepared.LOCK).open("w") as held:
            locks.fcntl.flock(held, locks.fcntl.LOCK_EX)
            assert cache.entry("x", ["1"], 6, write) is not None
        assert "held for 0 s by another process; going on without it" in caplog.text

    def test_the_lock_is_free_again_though_a_child_was_forked_meanwhile(self, cache):
        children = []

        def fork(directory: Path) -> None:
            write(directory)
            if (child := os.fork()) == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)

        assert cache.entry("x", ["1"], 6, fork) is not None
        with (cache.directory / prepared.LOCK).open("w") as free:
            locks.fcntl.flock(free, locks.fcntl.LOCK_EX | locks.fcntl.LOCK_NB)
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)

    def test_a_home_that_may_not_be_entered(self, cache, monkeypatch, caplog):
        def denied(_path: Path) -> bool:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(prepared.Path, "is_dir", denied)
        assert cache.entry("x", ["1"], 6, write) is None
        assert "cannot be kept (Permission denied)" in caplog.text

    def test_without_the_module_of_locks(self, cache, monkeypatch):
        monkeypatch.setattr(locks, "fcntl", None)
        assert cache.entry("x", ["1"], 6, write) is not None

    def test_what_nobody_uses_is_removed(self, cache):
        used, unused = (cache.entry("x", [name], 6, write) for name in ("used", "unused"))
        long_ago = time.time() - prepared.UNUSED - 3600
        for path in (used, unused):
            os.utime(path, (long_ago, long_ago))
        assert cache.entry("x", ["used"], 6, refuse) == used
        cache.entry("x", ["another"], 6, write)
        assert used.exists()
        assert not unused.exists()

    def test_killed_while_writing(self, cache):
        """What a killed process leaves is no entry, and is swept once it is old."""
        code = (
            "import pathlib, sys, time; from var_deploy.prepared import PreparedCache\n"
            "def make(directory):\n"
            "    (directory / 'a.bin').write_bytes(b'pack'); print('half', flush=True); time.sleep(60)\n"
            "PreparedCache(directory=pathlib.Path(sys.argv[1])).entry('x', ['1'], 6, make)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(cache.directory)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        (left,) = (cache.directory / name for name in kept(cache))
        entry = cache.entry("x", ["1"], 6, write)
        assert entry is not None
        assert left.is_dir()  # another process might still be at it
        hours_ago = time.time() - 7200
        os.utime(left, (hours_ago, hours_ago))
        cache.entry("y", ["1"], 6, write)
        assert not left.exists()


class TestEngine:
    @pytest.fixture(autouse=True)
    def _keeps_small_bundles_too(self, monkeypatch, tmp_path):
        monkeypatch.setattr(onnx_engine, "MIN_PREPARED", 0)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def test_same_images_from_what_was_kept(self, tiny_bundle, caplog):
        caplog.set_level(logging.INFO)
        runs = [var_deploy.load(tiny_bundle, decoder="winograd", cache=cache) for cache in (False, True, True)]
        assert caplog.text.count("preparing weights for this machine") == 2  # scales and decoder, by the second
        assert sorted(name.split("-")[0] for name in entries(default_directory())) == ["decoder", "scales"]
        plain, *others = (pipe.generate([0, 1], seeds=3) for pipe in runs)
        for other in others:
            np.testing.assert_array_equal(plain.pixels, other.pixels)

    def test_the_process_that_makes_an_entry_maps_it_too(self, tiny_bundle):
        pipe = var_deploy.load(tiny_bundle, decoder="winograd")
        pipe.generate([0])
        maps = Path("/proc/self/maps").read_text()
        for file in (".packed", "decoder.safetensors"):
            assert re.search(rf"{re.escape(str(default_directory()))}/.*{re.escape(file)}", maps), file

    def test_a_damaged_file_is_made_again(self, tiny_bundle, caplog):
        expected = var_deploy.load(tiny_bundle, decoder="winograd").generate([0]).pixels
        for name in entries(default_directory()):
            for file in (default_directory() / name).glob("*.*"):
                content = bytearray(file.read_bytes())
                content[len(content) // 2] ^= 255
                file.write_bytes(content)
        np.testing.assert_array_equal(var_deploy.load(tiny_bundle, decoder="winograd").generate([0]).pixels, expected)
        assert caplog.text.count("making it again") == 2

    @pytest.mark.parametrize("kind", ["scales", "decoder"])
    def test_what_cannot_be_opened_is_dropped(self, tiny_bundle, kind, caplog):
        """Without digests damage shows only when the file is opened."""
        expected = var_deploy.load(tiny_bundle, decoder="winograd").generate([0]).pixels
        (name,) = [name for name in entries(default_directory()) if name.startswith(kind)]
        file = default_directory() / name / {"scales": "scales.onnx", "decoder": "decoder.safetensors"}[kind]
        file.write_bytes(b"\xff" * file.stat().st_size)
        pipe = var_deploy.load(tiny_bundle, decoder="winograd", verify_digests=False)
        np.testing.assert_array_equal(pipe.generate([0]).pixels, expected)
        assert caplog.text.count("making it again") == 1
        assert name not in entries(default_directory())

    def test_small_bundles_are_not_kept(self, tiny_bundle, monkeypatch):
        monkeypatch.setattr(onnx_engine, "MIN_PREPARED", 1 << 40)
        var_deploy.load(tiny_bundle)
        assert entries(default_directory()) == {}

    def test_processes_at_the_same_time(self, tiny_bundle):
        context = multiprocessing.get_context("spawn")
        with context.Pool(2) as pool:
            tokens = pool.map(_tokens, [str(tiny_bundle)] * 4)
        assert len({tuple(last) for last in tokens}) == 1
        assert len(entries(default_directory())) == 1


def _tokens(bundle: str) -> list[int]:
    onnx_engine.MIN_PREPARED = 0
    return list(map(int, var_deploy.load(bundle).generate([0], seeds=3).tokens[-1][0]))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "/var/cache/me"}, "/var/cache/me/var-deploy"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/var-deploy"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/var-deploy"),
    ],
)
def test_directory(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_directory() == Path(expected)


def test_without_a_home_nothing_is_kept(monkeypatch, tiny_bundle):
    def fail() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(prepared.Path, "home", fail)
    assert default_directory() is None
    assert default_cache(verify_digests=True) is None
    monkeypatch.setattr(onnx_engine, "MIN_PREPARED", 0)
    assert len(var_deploy.load(tiny_bundle).generate([0]).images) == 1


def test_processor_tells_models_and_instruction_sets_apart(monkeypatch):
    """As /proc/cpuinfo shows them, on x86 and on Arm; elsewhere what Python knows."""
    texts = [
        "processor : 0\nmodel name\t: A\nflags\t\t: avx2\n",
        "processor : 0\nmodel name\t: A\nflags\t\t: avx2 avx512f\n",
        "processor : 0\nmodel name\t: B\nflags\t\t: avx2\n",
        "processor\t: 0\nFeatures\t: fp asimd\n",
    ]
    found = []
    for text in texts:
        monkeypatch.setattr(prepared.Path, "read_text", lambda _path, text=text: text)
        found.append(processor())
    assert len(set(found)) == len(texts)
    assert found[1].endswith("A avx2 avx512f")
    assert found[3].endswith("fp asimd")

    def missing(_path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(prepared.Path, "read_text", missing)
    assert processor().startswith(platform.machine())


def test_list_and_remove(cache, monkeypatch):
    assert entries(cache.directory) == {}
    remove_entries(cache.directory)
    entry = cache.entry("x", ["1"], 6, write)
    sizes = entries(cache.directory)
    assert list(sizes) == [entry.name]
    assert sizes[entry.name] > 6

    def fail(_path: Path) -> None:
        raise PermissionError(1, "no")

    with monkeypatch.context() as patch:
        patch.setattr(prepared.shutil, "rmtree", fail)
        with pytest.raises(RequestError, match=r"cannot be deleted \(no\); delete it by hand"):
            remove_entries(cache.directory)
    remove_entries(cache.directory)
    assert entries(cache.directory) == {}
