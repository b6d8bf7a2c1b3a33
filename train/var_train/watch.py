"""What one watches of a run: a progress bar, `metrics.jsonl`, and TensorBoard scalars and pictures.

Only one process of a run watches. What is told of an iteration carries the number of iterations done. A run that goes
on from a checkpoint drops what was written after that checkpoint, so that a file never tells of an iteration twice.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

METRICS_FILE, BOARD_FOLDER = "metrics.jsonl", "tensorboard"

#: Numbers that the bar shows, where a run has them.
SHOWN = ("loss", "accuracy")


class Watch:
    """A context around the loop: `advance` after every iteration, `record` now and then."""

    def __init__(self, run: Path, name: str, *, iterations: int, start: int = 0) -> None:
        """`start`: iterations done before, by the process that this one goes on from."""
        from torch.utils.tensorboard import SummaryWriter  # some seconds to import

        run.mkdir(parents=True, exist_ok=True)
        self._metrics = run / METRICS_FILE
        _drop_after(self._metrics, start)
        self._board = SummaryWriter(str(run / BOARD_FOLDER), purge_step=start + 1)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[said]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(name, total=iterations, completed=start, said="")
        self._since, self._images = time.perf_counter(), 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._board.close()

    def advance(self, images: int) -> None:
        """One iteration of so many images, in all processes together, is done."""
        self._images += images
        self._bar.advance(self._task)

    def record(self, iteration: int, values: Mapping[str, float | list[float]], *, timed: bool = True) -> None:
        """Numbers at an iteration; a list has one for each scale. Adds images per second since the last record.

        `timed=False`: what was done since then was no training, so no rate is told and the clock starts anew.
        """
        now = time.perf_counter()
        rate = self._images / max(now - self._since, 1e-9)
        self._since, self._images = now, 0
        line = {"iteration": iteration, **values} | ({"images_per_second": rate} if timed else {})
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(line)) + "\n")
        for name, value in line.items():
            if isinstance(value, list):
                for k, one in enumerate(value):
                    self._board.add_scalar(f"{name}/scale_{k:02d}", one, iteration)
            elif name != "iteration":
                self._board.add_scalar(name, value, iteration)
        if timed:
            shown = [f"{name} {values[name]:.4g}" for name in SHOWN if name in values]
            self._bar.update(self._task, said=" ".join([*shown, f"{rate:.1f} img/s"]))

    def pictures(self, iteration: int, name: str, grid_HW3: np.ndarray) -> None:
        """A grid of samples, uint8 [H, W, 3]."""
        self._board.add_image(name, grid_HW3, iteration, dataformats="HWC")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; one that a kill cut short at the end is left out."""
    path = run / METRICS_FILE
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    found = []
    for line in lines[:-1]:  # behind the last line end there is nothing, or a line that was cut short
        found.append(json.loads(line))
    return found


def _drop_after(path: Path, start: int) -> None:
    """Leaves the lines of the first `start` iterations."""
    if not path.is_file():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(path.parent) if line["iteration"] <= start]
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(one) for one in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None

    return {name: finite(value) for name, value in values.items()}
