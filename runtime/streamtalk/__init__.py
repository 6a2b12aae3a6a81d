"""Microphone in, talking 3D face out, at a constant latency. Importing this package loads no backend.

>>> talker = streamtalk.Talker.load("engines/bundled")
>>> with talker.open(seed=7) as stream:
...     for frame in stream.push(pcm):
...         show(frame.vertices)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from streamtalk.errors import (
    AudioError,
    BackendError,
    DeviceError,
    MissingDependencyError,
    ModelError,
    OutputError,
    SpeakerError,
    StreamError,
    StreamTalkError,
    UsageError,
)
from streamtalk.snapshot import Snapshot
from streamtalk.stream import Frame, Stream, StreamStats
from streamtalk.talker import Talker

if TYPE_CHECKING:
    from streamtalk.backends.build import build_engines, check_builder
    from streamtalk.backends.disk_cache import exclusive
    from streamtalk.batch import Batch
    from streamtalk.signals import ended_by_signals, signals_after

__version__ = "0.1.0"

__all__ = [
    "AudioError",
    "BackendError",
    "Batch",
    "DeviceError",
    "Frame",
    "MissingDependencyError",
    "ModelError",
    "OutputError",
    "Snapshot",
    "SpeakerError",
    "Stream",
    "StreamError",
    "StreamStats",
    "StreamTalkError",
    "Talker",
    "UsageError",
    "__version__",
    "build_engines",
    "check_builder",
    "ended_by_signals",
    "exclusive",
    "signals_after",
]

_LATER = {
    "Batch": "streamtalk.batch",
    "build_engines": "streamtalk.backends.build",
    "check_builder": "streamtalk.backends.build",
    "ended_by_signals": "streamtalk.signals",
    "exclusive": "streamtalk.backends.disk_cache",
    "signals_after": "streamtalk.signals",
}
"""Names that a stream by itself does not need, and where they are: imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
