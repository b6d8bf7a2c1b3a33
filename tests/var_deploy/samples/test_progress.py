"""What a user sees of a run of hours: how many, how fast, how long yet; the rate is that of this run alone."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from var_deploy.samples.progress import Rate, shown


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "done", "text"),
    [
        (10, 30_000, ""),  # nothing was made in this run
        (10, 30_500, "50.0 images/s, 6 min 30 s left"),
        (100, 30_010, "10.0 s an image, 2 d 7 h left"),
        (100, 31_000, "10.0 images/s, 31 min 40 s left"),
        (1000, 49_990, "20.0 images/s, 1 s left"),
        (20_000, 40_000, "2.0 s an image, 5 h 33 min left"),
        (100, 50_000, "200.0 images/s"),
    ],
)
def test_rate_and_time_left_are_those_of_this_run(seconds, done, text):
    clock = Clock()
    rate = Rate(clock)
    assert rate.text(30_000, 50_000) == ""
    clock.now += seconds
    assert rate.text(done, 50_000) == text


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end():
    clock, stream = Clock(), io.StringIO()
    with shown(Console(file=stream, width=20), clock) as hear:
        for second in range(0, 71):
            clock.now = 1000.0 + second
            hear(20_000 + 10 * second, 20_700)
    assert stream.getvalue().splitlines() == [
        "20,000/20,700 images",
        "20,300/20,700 images, 10.0 images/s, 40 s left",
        "20,600/20,700 images, 10.0 images/s, 10 s left",
        "20,700/20,700 images, 10.0 images/s",
    ]


def test_a_terminal_gets_a_bar():
    clock, stream = Clock(), io.StringIO()
    with shown(Console(file=stream, width=100, force_terminal=True, color_system=None), clock) as hear:
        hear(2, 50)
        clock.now += 4
        hear(10, 50)
    assert "10/50 2.0 images/s, 20 s left" in stream.getvalue()
