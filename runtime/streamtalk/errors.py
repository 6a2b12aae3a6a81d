"""Typed errors. Each says what was expected, what came, and what to do.

Every class also derives from the built-in that a caller who does not know this package would catch.
"""

from __future__ import annotations


class StreamTalkError(Exception):
    """Base of every error this package raises on purpose. Its text is meant for people."""


class AudioError(StreamTalkError, ValueError):
    """Audio that cannot be used: wrong dtype, rate or channels, not a number, unreadable."""


class DeviceError(StreamTalkError, OSError):
    """A sound device that is missing, busy or gone."""


class BackendError(StreamTalkError, RuntimeError):
    """No backend could run the model here."""


class MissingDependencyError(StreamTalkError, ImportError):
    """An optional package is needed for what was asked."""


class ModelError(StreamTalkError, ValueError):
    """A model directory that is missing, incomplete, corrupt or of another version."""


class SpeakerError(StreamTalkError, KeyError):
    """A speaker that the model does not know."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument: a sentence in quotation marks.
        return str(self.args[0]) if self.args else ""


class StreamError(StreamTalkError, RuntimeError):
    """A call that the stream's state does not allow, such as a push after flush."""


class OutputError(StreamTalkError, OSError):
    """Output that cannot be written: no such folder, disk full, a reader that went away."""


class UsageError(StreamTalkError, ValueError):
    """Arguments, of the command line or a call, that contradict each other or are out of range."""
