"""Exceptions by who must act. Every message says what is wrong, got and expected, and the next step."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable


class VarDeployError(Exception):
    """Base of all errors that a user can mend; the command line prints it on one line, without a trace."""


class CheckpointError(VarDeployError):
    """The checkpoint file is unreadable, incomplete, or does not fit its partner."""


class DataError(VarDeployError):
    """The training data is missing, empty, inconsistent or unreadable."""


class BundleError(VarDeployError):
    """The bundle is incomplete, altered, or of a newer format; or it cannot be written."""


class EngineError(VarDeployError):
    """The engine asked for is unknown, not installed, or cannot run this bundle here."""


class RequestError(VarDeployError):
    """A request (label, seed, guidance, image, ...) is outside what the loaded model accepts."""


def printable(value: object, limit: int = 80) -> str:
    """What a file says, harmless on a terminal and on one line."""
    text = value if isinstance(value, str) else repr(value)
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def run_command(command: Callable[[], object]) -> None:
    """Runs a command line's entry point; an error that a user can mend is one line, exit status 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays behind
    try:
        command()
    except (VarDeployError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None
