"""One voice by itself: audio in, frames out, and everything that it remembers in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType

import numpy.typing as npt

from streamtalk.backends import Lane, LaneState
from streamtalk.clock import Clock
from streamtalk.cuda.array import DeviceArray, device_vertices
from streamtalk.errors import StreamError
from streamtalk.voice import Float32, Frame, StreamState, StreamStats, Voice

__all__ = ["Frame", "Snapshot", "Stream", "StreamState", "StreamStats"]


@dataclass(frozen=True)
class Snapshot:
    """All of a stream's state at one moment, on the host: see `Stream.state`."""

    stream: StreamState
    lane: LaneState
    clock: Clock
    """Of the model that it was taken from."""

    def require_fit(self, own: Snapshot) -> None:
        """Raise StreamError where it is of another model than a stream's `own`."""
        for name in ("features", "kv_cache", "latents"):
            got, want = getattr(self.lane, name).shape, getattr(own.lane, name).shape
            if got != want:
                raise StreamError(
                    f"This snapshot is of another model: its {name} are {list(got)}, here {list(want)}."
                )
        if self.clock != own.clock:
            raise StreamError(
                "This snapshot is of another model, or of one that was exported in another way."
            )


class Stream:
    """A voice opened by `Talker.open`; a context manager. Not for use from two threads at once.

    Everything is allocated at open; a frame costs the same after a second and after a year.
    """

    def __init__(self, voice: Voice, lane: Lane) -> None:
        self._voice = voice
        self._lane = lane
        self._generation = 0

    @property
    def template(self) -> Float32:
        """The face at rest [V, 3] that this stream moves."""
        return self._voice.template

    @property
    def delay_s(self) -> float:
        """Seconds of audio that a frame waits for beyond its own time: the window's lookahead."""
        return self._voice.clock.delay_s

    @property
    def device_vertices(self) -> DeviceArray:
        """The newest frame's vertices [V, 3] on the GPU, see `DeviceArray`. Raises BackendError on a CPU backend."""
        return device_vertices(self._lane)

    def push(self, pcm: npt.ArrayLike) -> Iterator[Frame]:
        """Take audio and return the frames that are ready.

        `pcm` is float32 or float64 mono [n] at the model's rate (16 kHz), full scale 1.0, any n. It is
        checked and copied at the call. Frames are computed as the iterator is read; those not read come
        with the next call. However audio is cut into pushes, the frames are the same to the bit.

        Raises AudioError, in which case nothing was taken and the stream goes on unharmed, and StreamError
        after `flush` or `close`.
        """
        self._voice.push(pcm)
        return self._ready()

    def flush(self) -> Iterator[Frame]:
        """End the audio and return all frames that are left, silence standing in for their lookahead.

        n samples yield n * fps // 16000 frames in all. Afterwards only `reset` is allowed. Raises
        StreamError.
        """
        self._voice.flush()
        return self._ready()

    def reset(self) -> None:
        """Become equal to a newly opened stream. Iterators of earlier calls end. Raises StreamError if
        closed.
        """
        self._voice.require_open()
        self._lane.reset()
        self._voice.reset()
        self._generation += 1

    def state(self) -> Snapshot:
        """A copy of all state, to go back to with `restore`: for tests and for handing a voice on."""
        state = self._voice.state.copy()
        return Snapshot(state, self._lane.state(state.frame), self._voice.clock)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this stream, or of another of the same model. Statistics are kept. Raises
        StreamError, in which case nothing has changed.
        """
        snapshot.require_fit(self.state())
        self._voice.restore(snapshot.stream)
        self._lane.restore(snapshot.stream.frame, snapshot.lane)
        self._generation += 1

    def stats(self) -> StreamStats:
        """Figures since open or reset; cheap, and allowed after close."""
        return self._voice.stats()

    def close(self) -> None:
        """Give the lane back. Closing twice is fine."""
        if not self._voice.closed:
            self._voice.close()
            self._lane.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ready(self) -> Iterator[Frame]:
        generation = self._generation
        while generation == self._generation:
            frame = self._next()
            if frame is None:
                return
            yield frame

    def _next(self) -> Frame | None:
        """Compute the next frame, if its audio is there."""
        voice, lane, state = self._voice, self._lane, self._voice.state
        index = state.frame
        if index >= voice.frames_ready:
            return None
        began = perf_counter()
        if index >= state.encoded:
            lane.pcm[:] = voice.window(index)
            lane.encode()
            voice.encoded(index)
        voice.noise(index, lane.noise)
        lane.frame(index)
        frame = voice.frame(index, lane.vertices())
        # Last, and alone: a frame that was interrupted before this line is simply computed again.
        state.count[0] = index + 1
        voice.latency.add((perf_counter() - began) * 1e3)
        return frame
