"""Every error halfbyte raises on purpose: one tree, three parts (what was wrong, what was expected, a hint).

    HalfbyteError
    ├── ArgumentError            (also ValueError)           a value, dtype, shape, blocksize or name is not usable
    ├── CheckpointError          (also ValueError)           a file or state dict is truncated, altered or foreign
    ├── UnsupportedError         (also NotImplementedError)  valid, but no backend here can do it
    ├── QuantStateMissingError   (also RuntimeError)         a 4-bit weight without its quantization state
    ├── EnvironmentConflictError (also RuntimeError)         another package stands where halfbyte should go
    └── DownloadError            (also OSError)              something could not be fetched

>>> raise ArgumentError("blocksize is 48", expected="32, 64 or 128", hint="leave blocksize unset for 64")
Traceback (most recent call last):
    ...
halfbyte.errors.ArgumentError: blocksize is 48; expected 32, 64 or 128
hint: leave blocksize unset for 64
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DownloadError",
    "EnvironmentConflictError",
    "HalfbyteError",
    "QuantStateMissingError",
    "UnsupportedError",
]


class HalfbyteError(Exception):
    """Base of all. ``str(error)`` is ``"<what>; expected <expected>\\nhint: <hint>"``.

    Args:
        message: What was wrong, with the offending value.
        expected: What would have been right; left out where the message says it.
        hint: The next action, as something to type where there is one.
    """

    def __init__(self, message: str, *, expected: str = "", hint: str = "") -> None:
        self.message = message
        self.expected = expected
        self.hint = hint
        text = message + (f"; expected {expected}" if expected else "") + (f"\nhint: {hint}" if hint else "")
        super().__init__(text)


class ArgumentError(HalfbyteError, ValueError):
    """A value, dtype, shape, blocksize or name that cannot be used."""


class CheckpointError(HalfbyteError, ValueError):
    """A file or state dict that is truncated, altered or not of the expected kind."""


class UnsupportedError(HalfbyteError, NotImplementedError):
    """A valid request that no backend on this machine can carry out."""


class QuantStateMissingError(HalfbyteError, RuntimeError):
    """A packed 4-bit weight whose quantization state is not there."""


class EnvironmentConflictError(HalfbyteError, RuntimeError):
    """Another package stands where halfbyte was asked to go."""


class DownloadError(HalfbyteError, OSError):
    """Something that had to be fetched could not be."""
