"""A run's directory: one process at a time, held to what it was begun as, its files whole or as they were."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from var_deploy.config import ConfigError
from var_deploy.errors import CheckpointError
from var_train import run_folder
from var_train.run_folder import RUN_FILE, begin, finished_file, locked, read_run_file, write_finished

RECORD: dict[str, Any] = {
    "kind": "var",
    "configuration": {
        "seed": 3,
        "data": {"path": "images", "batch": 8, "workers": 4},
        "optimiser": {"iterations": 20, "betas": (0.9, 0.95)},
        "keeping": {"log_every": 10, "evaluate_every": None},
        "execution": {"parallel": "ddp", "compile": False},
        "progressive": None,
    },
    "classes": ["apple", "pear"],
    "images": 100,
    "parameters": 12345,
}


def changed(place: str, value: Any) -> dict[str, Any]:
    """The record with another value at a dotted place."""
    record = copy.deepcopy(RECORD)
    *sections, key = place.split(".")
    part = record
    for section in sections:
        part = part[section]
    part[key] = value
    return record


def test_what_a_run_is_can_be_read_again(tmp_path):
    begin(tmp_path, RECORD)
    stored = read_run_file(tmp_path)
    assert stored == {"format": 1, **json.loads(json.dumps(RECORD))}
    before = (tmp_path / RUN_FILE).stat()
    begin(tmp_path, RECORD)
    assert (tmp_path / RUN_FILE).stat().st_mtime_ns == before.st_mtime_ns  # the same run: nothing is written
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("configuration.seed", 4, "seed: got 4, this run was started with 3"),
        ("configuration.data.path", "other", "data.path: got 'other', this run was started with 'images'"),
        ("configuration.optimiser.betas", (0.9, 0.99), "optimiser.betas: got [0.9, 0.99], this run was started with"),
        ("configuration.progressive", {"first": 1}, "progressive.first: got 1, this run was started with None"),
        ("classes", ["apple", "fig"], "classes: got ['apple', 'fig'], this run was started with ['apple', 'pear']"),
        ("classes", ["apple"], "classes: got ['apple'], this run was started with ['apple', 'pear']"),
        ("images", 101, "images: got 101, this run was started with 100"),
        ("kind", "vqvae", "kind: got 'vqvae', this run was started with 'var'"),
    ],
)
def test_another_run_is_refused(tmp_path, place, value, said):
    begin(tmp_path, RECORD)
    before = (tmp_path / RUN_FILE).read_bytes()
    with pytest.raises(ConfigError) as refusal:
        begin(tmp_path, changed(place, value))
    assert str(refusal.value).startswith(f"{tmp_path}: {said}")
    assert str(refusal.value).endswith("; go on with that, or choose another --out")
    assert "\n" not in str(refusal.value)
    assert (tmp_path / RUN_FILE).read_bytes() == before


def test_what_was_asked_for_is_said_before_what_follows_and_long_values_are_cut(tmp_path):
    begin(tmp_path, RECORD)
    record = changed("configuration.data.path", "/begin" + "x" * 100 + "/end")
    record |= {"classes": ["fig"], "images": 7}
    with pytest.raises(
        ConfigError, match=r": data\.path: got '/beginx+\.\.\.x+/end', this run .* 'images' \(and 2 more\); go on"
    ):
        begin(tmp_path, record)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("configuration.keeping.log_every", 1),
        ("configuration.keeping.evaluate_every", 5),
        ("configuration.execution.parallel", "fsdp"),
        ("configuration.data.workers", 0),
        ("parameters", 1),
    ],
)
def test_what_changes_no_result_may_differ(tmp_path, place, value):
    begin(tmp_path, RECORD)
    begin(tmp_path, changed(place, value))
    assert read_run_file(tmp_path)["configuration"] == json.loads(json.dumps(RECORD["configuration"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"run\.json: cannot be read \(Expecting value.*\); restore it or choose another --out"),
        (b'{"format": 1', r"run\.json: cannot be read \(.*\); restore it or choose another --out"),
        (b"\xff\xfe", r"run\.json: cannot be read \(.*\); restore it or choose another --out"),
        (b'{"format": 2}', r"run\.json: not of format 1; choose another --out"),
        (b"[1]", r"run\.json: not of format 1; choose another --out"),
    ],
)
def test_a_file_that_says_no_run_is_one_line(tmp_path, content, message):
    (tmp_path / RUN_FILE).write_bytes(content)
    for read in (lambda: read_run_file(tmp_path), lambda: begin(tmp_path, RECORD)):
        with pytest.raises(ConfigError, match=message) as refusal:
            read()
        assert "\n" not in str(refusal.value)
    assert (tmp_path / RUN_FILE).read_bytes() == content
    with pytest.raises(ConfigError, match=r"none/run\.json: cannot be read"):
        read_run_file(tmp_path / "none")


def _try_to_lock(folder: Path, answer: Connection) -> None:
    try:
        with locked(folder):
            answer.send("locked")
    except ConfigError as error:
        answer.send(str(error))


def from_another_process(folder: Path) -> str:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_try_to_lock, args=(folder, theirs))
    process.start()
    said = ours.recv() if ours.poll(30) else "nothing"
    process.join()
    return str(said)


def test_one_process_at_a_time(tmp_path):
    folder = tmp_path / "deeper" / "run"
    with locked(folder):
        said = from_another_process(folder)
    assert said == f"{folder}: another process trains here; wait for it or choose another --out"
    assert from_another_process(folder) == "locked"


def test_a_lock_ends_with_an_error_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    assert from_another_process(tmp_path) == "locked"


def test_a_file_system_without_locks_is_trained_on(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"file/run: cannot write \(.*\); choose another --out"),
        locked(tmp_path / "file" / "run"),
    ):
        pass


def test_finished_weights_are_a_plain_state_dict_with_notes(tmp_path):
    path = finished_file(tmp_path, "var")
    assert path == tmp_path / "var.safetensors"
    columns = torch.arange(6.0).view(2, 3).t()  # the format knows dense row-major tensors alone
    state = {"a.weight": columns.requires_grad_(True), "b": torch.tensor([3], dtype=torch.int64)}
    write_finished(path, state, {"class_names": ["appel", "Äpfel"], "patch_nums": [1, 2]})
    stored = load_file(path)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], state[key]) for key in state)
    with safe_open(path, "pt") as file:
        assert {key: json.loads(text) for key, text in file.metadata().items()} == {
            "class_names": ["appel", "Äpfel"],
            "patch_nums": [1, 2],
        }
    content = path.read_bytes()
    for _ in range(3):
        write_finished(path, state, {"class_names": ["appel", "Äpfel"], "patch_nums": [1, 2]})
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["var.safetensors"]


def test_weights_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    path = finished_file(tmp_path, "vqvae")
    write_finished(path, {"a": torch.zeros(3)}, {})
    before = path.read_bytes()

    def disk_full(tensors: object, partial: Path, metadata: object) -> None:
        partial.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "save_file", disk_full)
    message = r"vqvae\.safetensors: cannot write \(.*No space left on device\); make room, then run the same command"
    with pytest.raises(CheckpointError, match=message):
        write_finished(path, {"a": torch.ones(3)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["vqvae.safetensors"]
