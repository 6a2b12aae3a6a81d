"""Ways to drive streams: whole clips, chunks, and Ctrl-C at every line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import streamtalk
from streamtalk import Frame, Snapshot, Stream

Array = npt.NDArray[Any]
T = TypeVar("T")
CORE = str(Path(streamtalk.__file__).parent)
SECOND = 16000
NOTHING = np.zeros(0, np.float32)


def kept(frames: Iterable[Frame]) -> list[Array]:
    """Copies of the frames' vertices."""
    return [frame.vertices.copy() for frame in frames]


def whole(stream: Stream, pcm: Array, chunk: int | None = None) -> Array:
    """Vertices [L, V, 3] of a clip pushed in chunks, and flushed."""
    made = [
        vertices for part in chunks(pcm, chunk or max(1, len(pcm))) for vertices in kept(stream.push(part))
    ]
    return np.array(made + kept(stream.flush())).reshape(-1, *stream.template.shape)


def chunks(pcm: Array, n: int) -> Iterator[Array]:
    """The clip in parts of `n` samples."""
    return (pcm[first : first + n] for first in range(0, len(pcm), n))


def same(a: Snapshot, b: Snapshot) -> bool:
    """Whether two snapshots are equal to the bit."""
    return a.to_bytes() == b.to_bytes()


class CtrlC:
    """Makes calls, each of which Ctrl-C ends three lines of the package further on than the last one that it ended.

    Once a call gets through, the next is ended at its first lines again; three such sweeps meet every line.
    """

    def __init__(self) -> None:
        self.line = 0
        self.sweeps = 0
        self.ended = 0

    def __call__(self, call: Callable[[], T]) -> T:
        """Make the call. Raises KeyboardInterrupt."""
        self.line += 3
        left = self.line

        def trace(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.startswith(CORE):
                return None
            if event == "line":
                left -= 1
                if not left:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            result = call()
        except KeyboardInterrupt:
            self.ended += 1
            raise
        finally:
            sys.settrace(before)
        self.sweeps += 1
        self.line = -(self.sweeps % 3)
        return result
