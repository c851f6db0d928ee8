"""What a user can get wrong. Each error carries one line that says what, and a hint that says what to do.

The command line prints `error: MESSAGE` and `hint: HINT` and exits with code 1; no traceback is shown unless the
environment has `PHYSFORMER_DEBUG=1`. Faults of the program itself are ordinary Python exceptions, not these.
"""

from __future__ import annotations


class PhysFormerError(Exception):
    """A fault of the input, the data, the configuration or the machine, which the user can mend.

    Args:
        message: What is wrong, in one line, with the offending value and where it stands.
        hint: What to do about it, in one line. `None` if the message already says it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(PhysFormerError):
    """A configuration file, a preset or an option is malformed, unknown or contradicts another."""


class DataError(PhysFormerError):
    """A data set, a shard or a picture is missing, damaged or of another format."""


class CheckpointError(PhysFormerError):
    """A checkpoint or weights file is missing, damaged, foreign or not what its hash says."""


class PromptError(PhysFormerError):
    """A prompt is empty, too long for the text encoder, or a prompt file cannot be read."""


class SizeError(PhysFormerError):
    """A resolution, width, height or aspect ratio is unknown, contradictory or out of range."""


class OutputError(PhysFormerError):
    """A result cannot be written: no permission, no space, or no such folder."""


class DeviceError(PhysFormerError):
    """The device or number format asked for does not exist here, or has too little memory."""
