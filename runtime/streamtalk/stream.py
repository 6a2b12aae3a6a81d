"""One voice: audio in, frames out, and everything that it remembers in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from streamtalk.backends import Lane, LaneState
from streamtalk.blendshapes import WeightSolver
from streamtalk.clock import Clock
from streamtalk.errors import StreamError
from streamtalk.latency import Latency, LatencyHistogram
from streamtalk.pcm import accepted
from streamtalk.timeline import Timeline

Float32 = npt.NDArray[np.float32]


class Noise(Protocol):
    """Fills `out` [C] with the noise of a frame; any frame, in any order."""

    def __call__(self, frame: int, out: Float32) -> None: ...


@dataclass(frozen=True)
class Frame:
    """One animation frame. `vertices` [V, 3] float32, in the model's units, and `blendshapes` [52] float32 are
    read-only views of buffers that the stream's next frame overwrites: copy to keep. `time_s` is `index / fps`.

    `blendshapes` are ARKit weights in [0, 1], named by `Talker.blendshape_names`; None where the model's face
    has no shapes. They add up to the vertices within the error that the parity certificate states.
    """

    index: int
    time_s: float
    vertices: Float32
    blendshapes: Float32 | None = None


@dataclass(frozen=True)
class StreamStats:
    """A stream since it was opened or reset. `latency_ms` is a whole frame's, audio encoder included;
    `compute_s` its sum; `pending_frames` are ready and not yet read.
    """

    frames: int
    samples: int
    pending_frames: int
    compute_s: float
    latency_ms: Latency


@dataclass
class StreamState:
    """What a stream remembers outside its lane.

    `samples` were taken in all, `frame` is the next frame's index, frames below `encoded` have audio
    features, `ended` is set by flush.
    """

    timeline: Timeline
    samples: int = 0
    frame: int = 0
    encoded: int = 0
    ended: bool = False

    def copy(self) -> StreamState:
        """An independent copy."""
        return replace(self, timeline=self.timeline.copy())


@dataclass(frozen=True)
class Snapshot:
    """All of a stream's state at one moment, on the host: see `Stream.state`."""

    stream: StreamState
    lane: LaneState


class Stream:
    """A voice opened by `Talker.open`; a context manager. Not for use from two threads at once.

    Everything is allocated at open; a frame costs the same after a second and after a year.
    """

    def __init__(
        self,
        clock: Clock,
        lane: Lane,
        noise: Noise,
        template: Float32,
        weights: WeightSolver | None = None,
    ) -> None:
        self._clock = clock
        self._lane = lane
        self._noise = noise
        self._weights = weights
        self._latency = LatencyHistogram()
        self._state = self._fresh_state()
        self._generation = 0
        self._closed = False
        self.template = template
        """The face at rest [V, 3] that this stream moves."""

    @property
    def delay_s(self) -> float:
        """Seconds of audio that a frame waits for beyond its own time: the window's lookahead."""
        return self._clock.delay_s

    def push(self, pcm: npt.ArrayLike) -> Iterator[Frame]:
        """Take audio and return the frames that are ready.

        `pcm` is float32 or float64 mono [n] at the model's rate (16 kHz), full scale 1.0, any n. It is
        checked and copied at the call. Frames are computed as the iterator is read; those not read come
        with the next call. However audio is cut into pushes, the frames are the same to the bit.

        Raises AudioError, in which case nothing was taken and the stream goes on unharmed, and StreamError
        after `flush` or `close`.
        """
        state = self._open_state()
        if state.ended:
            raise StreamError("This stream was flushed: call reset() before the next push.")
        samples = accepted(pcm, self._clock.rate)
        state.timeline.append(samples)
        state.samples += samples.size
        return self._ready()

    def flush(self) -> Iterator[Frame]:
        """End the audio and return all frames that are left, silence standing in for their lookahead.

        n samples yield n * fps // 16000 frames in all. Afterwards only `reset` is allowed. Raises
        StreamError.
        """
        state = self._open_state()
        if state.ended:
            raise StreamError("This stream was flushed already: call reset() to start again.")
        state.timeline.append_silence(self._clock.window_samples)
        state.ended = True
        return self._ready()

    def reset(self) -> None:
        """Become equal to a newly opened stream. Iterators of earlier calls end. Raises StreamError if
        closed.
        """
        self._open_state()
        self._lane.reset()
        self._latency.clear()
        self._state = self._fresh_state()
        self._generation += 1

    def state(self) -> Snapshot:
        """A copy of all state, to go back to with `restore`: for tests and for handing a voice on."""
        state = self._open_state().copy()
        return Snapshot(state, self._lane.state(state.frame))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this stream, or of another of the same model. Statistics are kept."""
        self._open_state()
        self._state = snapshot.stream.copy()
        self._lane.restore(self._state.frame, snapshot.lane)
        self._generation += 1

    def stats(self) -> StreamStats:
        """Figures since open or reset; cheap, and allowed after close."""
        state = self._state
        return StreamStats(
            frames=state.frame,
            samples=state.samples,
            pending_frames=self._frames_ready() - state.frame,
            compute_s=self._latency.total_ms / 1e3,
            latency_ms=self._latency.summary(),
        )

    def close(self) -> None:
        """Give the lane back. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._lane.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_state(self) -> StreamState:
        if self._closed:
            raise StreamError("This stream is closed: open another from the talker.")
        return self._state

    def _fresh_state(self) -> StreamState:
        clock = self._clock
        # Twice the window: the rest is moved at most once per window of audio.
        timeline = Timeline(2 * clock.window_samples + clock.context_samples, start=-clock.context_samples)
        timeline.append_silence(clock.context_samples)
        return StreamState(timeline)

    def _ready(self) -> Iterator[Frame]:
        generation = self._generation
        while generation == self._generation:
            frame = self._next()
            if frame is None:
                return
            yield frame

    def _next(self) -> Frame | None:
        """Compute the next frame, if its audio is there."""
        state = self._open_state()
        index = state.frame
        if index >= self._frames_ready():
            return None
        began = perf_counter()
        if index >= state.encoded:
            self._encode(index)
        self._noise(index, self._lane.noise)
        self._lane.frame(index)
        vertices = self._lane.vertices()
        blendshapes = self._weights(vertices) if self._weights else None
        # Last, and alone: a frame that was interrupted before this line is simply computed again.
        state.frame = index + 1
        self._latency.add((perf_counter() - began) * 1e3)
        return Frame(index, index / self._clock.fps, vertices, blendshapes)

    def _encode(self, first_frame: int) -> None:
        clock, state = self._clock, self._state
        start = clock.window_start(first_frame)
        self._lane.pcm[:] = state.timeline.window(start, clock.window_samples)
        self._lane.encode()
        state.encoded = first_frame + clock.hop
        state.timeline.drop_before(clock.window_start(state.encoded))

    def _frames_ready(self) -> int:
        state = self._state
        return (
            self._clock.frames_in(state.samples) if state.ended else self._clock.frames_ready(state.samples)
        )
