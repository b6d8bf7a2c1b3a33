"""Exceptions by who must act. Every message says what is wrong, got and expected, and the next step."""


class VarDeployError(Exception):
    """Base of all errors that a user can mend; the command line prints it on one line, without a trace."""


class CheckpointError(VarDeployError):
    """The checkpoint file is unreadable, incomplete, or does not fit its partner."""


class BundleError(VarDeployError):
    """The bundle is incomplete, altered, or of a newer format; or it cannot be written."""


class EngineError(VarDeployError):
    """The engine asked for is unknown, not installed, or cannot run this bundle here."""


class RequestError(VarDeployError):
    """A request (label, seed, guidance, image, ...) is outside what the loaded model accepts."""
