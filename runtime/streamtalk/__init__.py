"""Microphone in, talking 3D face out, at a constant latency. Importing this package loads no backend.

>>> talker = streamtalk.Talker.load("engines/bundled")
>>> with talker.open(seed=7) as stream:
...     for frame in stream.push(pcm):
...         show(frame.vertices)
"""

from __future__ import annotations

from streamtalk.batch import Batch, BatchStream
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
from streamtalk.stream import Frame, Stream, StreamStats
from streamtalk.talker import Talker

__version__ = "0.1.0"

__all__ = [
    "AudioError",
    "BackendError",
    "Batch",
    "BatchStream",
    "DeviceError",
    "Frame",
    "MissingDependencyError",
    "ModelError",
    "OutputError",
    "SpeakerError",
    "Stream",
    "StreamError",
    "StreamStats",
    "StreamTalkError",
    "Talker",
    "UsageError",
    "__version__",
]
