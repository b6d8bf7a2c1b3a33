"""Images that are there → done of total, images a second and the time left: a bar, or now and then a line in a log.

The rate is that of this run alone, from the moment when the first image could be made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

#: Seconds between two lines where nobody sees a bar move.
_INTERVAL = 30.0

#: Hears how many images are there and how many there will be.
OnImages = Callable[[int, int], None]


class Rate:
    """How fast it goes. The first report is of what an earlier run has left, and starts the clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None
        self._before = 0

    def text(self, done: int, total: int) -> str:
        """Images a second and the time left, where they are known."""
        now = self._clock()
        if self._began is None:
            self._began, self._before = now, done
        made, seconds = done - self._before, now - self._began
        if made == 0 or seconds <= 0:
            return ""
        rate = made / seconds
        speed = f"{rate:.1f} images/s" if rate >= 1 else f"{1 / rate:.1f} s an image"
        return speed if done >= total else f"{speed}, {_duration((total - done) / rate)} left"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    days, rest = divmod(whole, 86_400)
    hours, minutes = rest // 3600, rest % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


@contextmanager
def shown(console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[OnImages]:
    """Shows what it hears on a console: a bar on a terminal, else a line every half minute and one at the end."""
    with _bar(console, Rate(clock)) if console.is_terminal else _lines(console, Rate(clock), clock) as hear:
        yield hear


@contextmanager
def _bar(console: Console, rate: Rate) -> Iterator[OnImages]:
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("images", total=None, speed="loading")

        def hear(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, speed=rate.text(done, total))

        yield hear


@contextmanager
def _lines(console: Console, rate: Rate, clock: Callable[[], float]) -> Iterator[OnImages]:
    told: float | None = None

    def hear(done: int, total: int) -> None:
        nonlocal told
        speed = rate.text(done, total)
        if told is None or done == total or clock() - told >= _INTERVAL:
            told = clock()
            console.print(
                f"{done:,}/{total:,} images" + (f", {speed}" if speed else ""), highlight=False, soft_wrap=True
            )

    yield hear
