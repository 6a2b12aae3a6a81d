"""Audio over time: what a run listens to, each block stamped with when it was there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from streamtalk.app.audio.files import read_mono
from streamtalk.app.audio.raw import RawFormat, read_raw

PACED_BLOCK_S = 0.010
"""What a microphone gives at a time: a frame's latency should not hide in the block size."""
FAST_BLOCK_S = 1.0


@dataclass(frozen=True)
class Block:
    """Mono samples [n] float32 at the model's rate. `arrival_s` on the monotonic clock is when the last of
    them was there; None where nobody waits for the frames.
    """

    samples: npt.NDArray[np.float32]
    arrival_s: float | None


@dataclass(frozen=True)
class SourceEvents:
    """What went wrong on the way and was survived."""

    overflows: int = 0
    reconnects: int = 0


class Source(Protocol):
    """Where audio comes from."""

    @property
    def label(self) -> str:
        """What to call it in a message."""

    @property
    def live(self) -> bool:
        """Whether it ends only when somebody ends it."""

    def blocks(self) -> Iterator[Block]:
        """The audio in order, once. Raises AudioError, DeviceError."""

    def events(self) -> SourceEvents:
        """Counts so far."""


class FileSource:
    """A sound file, in real time or as fast as it is read."""

    live = False

    def __init__(self, path: Path, rate: int, fast: bool) -> None:
        self.label = str(path)
        self._rate = rate
        self._fast = fast
        self._samples = read_mono(path, rate, FAST_BLOCK_S if fast else PACED_BLOCK_S)

    def blocks(self) -> Iterator[Block]:
        """Blocks of the file, each when its last sample would have been played."""
        began, position = monotonic(), 0
        for samples in self._samples:
            if self._fast:
                yield Block(samples, None)
                continue
            position += samples.size
            due = began + position / self._rate
            sleep(max(0.0, due - monotonic()))
            yield Block(samples, due)

    def events(self) -> SourceEvents:
        """A file always comes whole."""
        return SourceEvents()


class RawSource:
    """Raw samples from a pipe, as they arrive."""

    live = True
    label = "stdin"

    def __init__(self, file: BinaryIO, raw_format: RawFormat, rate: int, fast: bool) -> None:
        self._samples = read_raw(file, raw_format, round(rate * PACED_BLOCK_S))
        self._fast = fast

    def blocks(self) -> Iterator[Block]:
        """Whatever was written to the pipe."""
        for samples in self._samples:
            yield Block(samples, None if self._fast else monotonic())

    def events(self) -> SourceEvents:
        """A pipe blocks its writer and loses nothing."""
        return SourceEvents()
