"""What a run writes for people to watch: every iteration once, also after a kill and a new start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from var_train.watch import BOARD_FOLDER, METRICS_FILE, Watch, read_metrics


def _train(run: Path, start: int, end: int) -> None:
    with Watch(run, "VAR", iterations=10, start=start) as watch:
        for done in range(start + 1, end + 1):
            watch.advance(4)
            watch.record(done, {"loss": 10.0 - done, "accuracy_by_scale": [0.1 * done, 0.5]})


def _board(run: Path) -> EventAccumulator:
    board = EventAccumulator(str(run / BOARD_FOLDER))
    board.Reload()
    return board


def test_numbers_go_to_both_places(tmp_path):
    _train(tmp_path / "run", 0, 3)
    lines = read_metrics(tmp_path / "run")
    assert [(line["iteration"], line["loss"]) for line in lines] == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert lines[1]["accuracy_by_scale"] == [0.2, 0.5]
    assert all(line["images_per_second"] > 0 for line in lines)
    board = _board(tmp_path / "run")
    assert set(board.Tags()["scalars"]) == {
        "loss",
        "accuracy_by_scale/scale_00",
        "accuracy_by_scale/scale_01",
        "images_per_second",
    }
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 9.0), (2, 8.0), (3, 7.0)]


def test_a_run_that_goes_on_tells_of_every_iteration_once(tmp_path):
    _train(tmp_path, 0, 6)
    before = read_metrics(tmp_path)
    _train(tmp_path, 4, 8)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == list(range(1, 9))
    assert read_metrics(tmp_path)[:4] == before[:4]
    assert [event.step for event in _board(tmp_path).Scalars("loss")] == list(range(1, 9))


def test_a_run_from_the_start_drops_all_that_was_told_before(tmp_path):
    _train(tmp_path, 0, 6)
    _train(tmp_path, 0, 2)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2]
    assert [event.step for event in _board(tmp_path).Scalars("loss")] == [1, 2]


def test_an_evaluation_has_no_rate_and_its_time_is_no_training(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    with Watch(tmp_path, "VAR", iterations=10) as watch:
        for _ in range(2):
            watch.advance(6)
        now = 103.0
        watch.record(2, {"loss": 1.0})
        now = 200.0
        watch.record(2, {"validation_loss": 2.0}, timed=False)
        watch.advance(6)
        now = 202.0
        watch.record(3, {"loss": 0.5})
    assert read_metrics(tmp_path) == [
        {"iteration": 2, "loss": 1.0, "images_per_second": 4.0},
        {"iteration": 2, "validation_loss": 2.0},
        {"iteration": 3, "loss": 0.5, "images_per_second": 3.0},
    ]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    _train(tmp_path, 0, 3)
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text() + '{"iteration": 4, "lo')
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    _train(tmp_path, 3, 5)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_what_is_no_number_is_null(tmp_path):
    with Watch(tmp_path, "VAR", iterations=1) as watch:
        watch.record(0, {"loss": float("nan"), "per_scale": [1.0, float("inf")]})
    (line,) = read_metrics(tmp_path)
    assert (line["loss"], line["per_scale"]) == (None, [1.0, None])


def test_pictures_are_kept_as_they_are(tmp_path):
    grid_HW3 = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with Watch(tmp_path, "VAR", iterations=1) as watch:
        watch.pictures(5, "samples", grid_HW3)
    (event,) = _board(tmp_path).Images("samples")
    assert (event.step, event.width, event.height) == (5, 6, 4)


def test_an_error_inside_ends_the_bar_and_goes_on(tmp_path):
    with pytest.raises(ZeroDivisionError), Watch(tmp_path, "VAR", iterations=2) as watch:
        watch.advance(1 // 0)
    assert read_metrics(tmp_path) == []
