"""The loop of a training run, for VAR and VQVAE alike: step, watch, measure, keep; until the end or a signal.

    load newest checkpoint → for every batch: step → now and then: numbers, evaluation, checkpoint → finished weights

A signal (SIGTERM, Ctrl-C) writes a checkpoint after the step that it came in; the same command goes on from there.
"""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from PIL import Image

from var_deploy.errors import DataError

from .configuration import Run
from .image_data import GlobalBatches
from .processes import any_process, by_first_process, rank, sum_over_processes
from .run_checkpoints import RunCheckpoints
from .run_folder import CHECKPOINTS, SAMPLES, finished_file, write_finished
from .run_state import RunState, checkpoint_bytes
from .updates import DTYPES
from .watch import Watch

log = logging.getLogger("var_train")

Values = Mapping[str, float | list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one iteration came to, the same in all processes."""

    loss: float  #: of the global batch
    gradient_norm: float  #: before clipping
    finite: bool  #: whether the weights took the step; an overflow that the loss scaler answers counts as such
    values: Values  #: to be recorded; empty unless asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What the model does on images that are kept apart, or on some of the training images."""

    values: Values
    score: float | None  #: the lower the better; None where nothing was kept apart
    corrupt: tuple[str, ...] = ()  #: names of images of this process that could not be decoded
    pictures_HW3: np.ndarray | None  #: uint8 grid, of the first process


class Batch(Protocol):
    """What the loop sees of a batch."""

    @property
    def iteration(self) -> int: ...
    @property
    def corrupt(self) -> tuple[str, ...]: ...


class Training(Protocol):
    """A kind of training; every process calls every method."""

    kind: str  #: "var" or "vqvae"
    config: Any  #: of the model
    parameters: int
    state: RunState
    data: GlobalBatches

    def batches(self, start: int) -> Iterator[Any]:
        """This process's part of every iteration's batch, from `start` on."""
        ...

    def step(self, batch: Any, *, measure: bool) -> Step:
        """Changes the weights by one batch."""
        ...

    def evaluate(self) -> Evaluation:
        """Measures, with averaged weights where there are some."""
        ...

    def name(self, index: int) -> str:
        """Of an image of the data set."""
        ...

    def finished(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Plain state dict, in the first process alone, and what its file's header says."""
        ...


def run_training(training: Training, run: Run, folder: Path) -> Path:
    """Trains to the end and returns the file of finished weights. Raises VarDeployError; SystemExit after a signal."""
    images = training.data.count
    total, every = run.iterations(images), run.evaluate_every(images)
    checkpoints = RunCheckpoints(folder / CHECKPOINTS, keep=run.keeping.checkpoints)
    start = checkpoints.load_newest(training.state) or 0
    checkpoints.check_space(checkpoint_bytes(training.state))
    if start and rank() == 0:
        log.warning("%s: going on after %d of %d iterations", folder, start, total)
    with ExitStack() as stack:
        watch = None
        if rank() == 0:
            watch = stack.enter_context(Watch(folder, training.kind, iterations=total, start=start))
        signals = stack.enter_context(_Signals())
        batches = stack.enter_context(closing(training.batches(start)))  # type: ignore[type-var]
        guard = _NonFinite(training, run.optimiser.nonfinite)
        corrupt = _Corrupt(training.state)
        for batch in itertools.islice(batches, total - start):
            done = batch.iteration + 1
            logged = done % run.keeping.log_every == 0 or done == total
            step = training.step(batch, measure=logged)
            guard.check(step, batch.iteration)
            if watch is not None:
                watch.advance(run.data.batch)
            corrupt.tell(batch.corrupt, counted=True)
            if logged:
                count = corrupt.sum()
                if watch is not None:
                    watch.record(done, {**step.values, "skipped_images": count})
            evaluation = None
            if done % every == 0 or done == total:
                evaluation = training.evaluate()
                corrupt.tell(evaluation.corrupt)
                if watch is not None:
                    _record(watch, folder, done, evaluation)
            stopped = any_process(signals.number is not None)
            if evaluation is not None or stopped or done % run.keeping.checkpoint_every == 0:
                corrupt.sum()
                training.state.values["configuration"] = run.model_dump(mode="json")
                checkpoints.save(done, training.state, score=evaluation.score if evaluation else None)
            if stopped and done < total:
                if rank() == 0:
                    log.warning(
                        "%s: stopped after iteration %d of %d; the same command goes on from there", folder, done, total
                    )
                raise SystemExit(128 + (signals.number or signal.SIGTERM))
    path = finished_file(folder, training.kind)
    state, metadata = training.finished()
    by_first_process(lambda: write_finished(path, state, metadata, DTYPES[run.keeping.finished]))
    return path


def _record(watch: Watch, folder: Path, done: int, evaluation: Evaluation) -> None:
    watch.record(done, evaluation.values, timed=False)
    if evaluation.pictures_HW3 is not None:
        watch.pictures(done, "samples", evaluation.pictures_HW3)
        (folder / SAMPLES).mkdir(exist_ok=True)
        Image.fromarray(evaluation.pictures_HW3).save(folder / SAMPLES / f"{done:08d}.png")


class _Corrupt:
    """Names images that cannot be decoded, each once, and counts how often training came upon one."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._told: set[str] = set()
        self._new = 0

    def tell(self, names: tuple[str, ...], *, counted: bool = False) -> None:
        """In this process."""
        for name in names:
            if name not in self._told:
                log.warning("%s: cannot be decoded; the next image stands for it", name)
        self._told.update(names)
        self._new += len(names) * counted

    def sum(self) -> float:
        """Of all processes since the run began."""
        new = sum_over_processes(torch.tensor(float(self._new)))
        self._state.values["corrupt"] = self._state.values.get("corrupt", 0.0) + new.item()
        self._new = 0
        return float(self._state.values["corrupt"])


class _NonFinite:
    """Ends a run after so many steps in a row whose loss or gradient was NaN or infinite, and which were left out."""

    def __init__(self, training: Training, limit: int) -> None:
        self._training, self._limit = training, limit

    def check(self, step: Step, iteration: int) -> None:
        values = self._training.state.values
        if step.finite:
            values["nonfinite"] = 0
            return
        values["nonfinite"] = values.get("nonfinite", 0) + 1
        loss_is_sound = math.isfinite(step.loss)
        got = f"the gradient's norm is {step.gradient_norm}" if loss_is_sound else f"loss is {step.loss}"
        _, indices_B = self._training.data.indices(iteration)
        names = ", ".join(self._training.name(index) for index in indices_B.tolist())
        if values["nonfinite"] < self._limit:
            if rank() == 0:
                log.warning("iteration %d: %s; left out; its images: %s", iteration + 1, got, names)
            return
        raise DataError(
            f"iteration {iteration + 1}: {got}, for the {self._limit}. time in a row (optimiser.nonfinite); images of "
            f"this batch: {names}; look at them, lower the learning rate, or train in bf16 or fp32"
        )


#: Seconds within which another signal is the same one: a scheduler sends it to all processes, and their launcher, which
#: gets it too, passes it on to them.
ECHO = 1.0


class _Signals:
    """Notes the first SIGTERM or SIGINT, for the loop to act on; the second acts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            self._restore()
            if signal.getsignal(number) == signal.SIG_IGN:  # so a shell starts what it puts in the background
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
