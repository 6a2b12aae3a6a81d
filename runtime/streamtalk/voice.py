"""The host's half of a voice: its audio, its place in time, its noise. A stream adds what runs the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from streamtalk.blendshapes import WeightSolver
from streamtalk.clock import Clock
from streamtalk.errors import StreamError
from streamtalk.latency import Latency, LatencyHistogram
from streamtalk.pcm import accepted
from streamtalk.timeline import Timeline

Float32 = npt.NDArray[np.float32]
Counter = npt.NDArray[np.int64]


class Noise(Protocol):
    """Fills `out` [C] with the noise of a frame; any frame, in any order."""

    def __call__(self, frame: int, out: Float32) -> None: ...


@dataclass(frozen=True)
class Frame:
    """One animation frame. `vertices` [V, 3] float32, in the model's units, is a read-only view of a buffer that the
    stream's next frame overwrites, or the batch's next step: copy to keep. `time_s` is `index / fps`.
    """

    index: int
    time_s: float
    vertices: Float32
    weights: Float32 | WeightSolver | None = None
    """The blendshapes, or what finds them once they are asked for."""

    @cached_property
    def blendshapes(self) -> Float32 | None:
        """ARKit weights [52] float32 in [0, 1], named by `Talker.blendshape_names`; None where the model's face has no
        shapes. They add up to the vertices within the error that the parity certificate states.

        Found when first read, which must be before the next frame; a read-only view that later ones overwrite.
        """
        return self.weights(self.vertices) if isinstance(self.weights, WeightSolver) else self.weights


@dataclass(frozen=True)
class StreamStats:
    """A stream since it was opened or reset. `latency_ms` is a whole frame's, audio encoder included;
    `compute_s` its sum; `pending_frames` are ready and not yet read. In a batch a frame's latency is that of
    the step which made it.
    """

    frames: int
    samples: int
    pending_frames: int
    compute_s: float
    latency_ms: Latency


@dataclass
class StreamState:
    """What a voice remembers on the host.

    `samples` were taken in all, frames below `encoded` have audio features, `ended` is set by flush. `count`
    [1] int64 holds the next frame's index: memory rather than a number, so that a batch can advance all of its
    voices at once.
    """

    timeline: Timeline
    count: Counter
    samples: int = 0
    encoded: int = 0
    ended: bool = False

    @property
    def frame(self) -> int:
        """The next frame's index."""
        return int(self.count[0])

    def copy(self) -> StreamState:
        """An independent copy."""
        return replace(self, timeline=self.timeline.copy(), count=self.count.copy())


class Voice:
    """The host's half of one stream. `count` [1] int64 is where it keeps its next frame's index; whoever runs
    the frames advances it.
    """

    def __init__(
        self,
        clock: Clock,
        noise: Noise,
        template: Float32,
        weights: WeightSolver | None,
        count: Counter,
    ) -> None:
        self.clock = clock
        self.noise = noise
        self.template = template
        self.latency = LatencyHistogram()
        self._weights = weights
        self._count = count
        self._closed = False
        self.reset()

    @property
    def state(self) -> StreamState:
        """The state, to be read and changed in place. Raises StreamError if closed."""
        self.require_open()
        return self._state

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def require_open(self) -> None:
        """Raise StreamError if closed."""
        if self._closed:
            raise StreamError("This stream is closed: open another from the talker.")

    @property
    def frames_ready(self) -> int:
        """Frames whose audio is there, counted from the first."""
        state = self._state
        return self.clock.frames_in(state.samples) if state.ended else self.clock.frames_ready(state.samples)

    @property
    def pending(self) -> int:
        """Frames that are ready and not yet computed."""
        return self.frames_ready - self._state.frame

    @property
    def finished(self) -> bool:
        """Whether the audio was ended and every frame computed."""
        return self._state.ended and self.pending == 0

    def push(self, pcm: npt.ArrayLike) -> None:
        """Check and copy audio. Raises AudioError, in which case nothing was taken, and StreamError."""
        state = self.state
        if state.ended:
            raise StreamError("This stream was flushed: call reset() before the next push.")
        samples = accepted(pcm, self.clock.rate)
        state.timeline.append(samples)
        state.samples += samples.size

    def flush(self) -> None:
        """End the audio; silence stands in for the lookahead of the last frames. Raises StreamError."""
        state = self.state
        if state.ended:
            raise StreamError("This stream was flushed already: call reset() to start again.")
        state.timeline.append_silence(self.clock.window_samples)
        state.ended = True

    def window(self, first_frame: int) -> Float32:
        """The window [window_samples] of the hop that begins with `first_frame`: a view for immediate use."""
        clock = self.clock
        return self._state.timeline.window(clock.window_start(first_frame), clock.window_samples)

    def encoded(self, first_frame: int) -> None:
        """Note that the hop which begins with `first_frame` has its features; audio before the next is dropped."""
        state = self._state
        state.encoded = first_frame + self.clock.hop
        state.timeline.drop_before(self.clock.window_start(state.encoded))

    def frame(self, index: int, vertices: Float32) -> Frame:
        """Frame `index`."""
        return Frame(index, index / self.clock.fps, vertices, self._weights)

    def reset(self) -> None:
        """Become as new."""
        clock = self.clock
        # Twice the window: the rest is moved at most once per window of audio.
        timeline = Timeline(2 * clock.window_samples + clock.context_samples, start=-clock.context_samples)
        timeline.append_silence(clock.context_samples)
        self._count[0] = 0
        self._state = StreamState(timeline, self._count)
        self.latency.clear()

    def restore(self, state: StreamState) -> None:
        """Take a copied state; statistics are kept."""
        self._count[0] = state.frame
        self._state = replace(state.copy(), count=self._count)

    def close(self) -> None:
        """Refuse all further use. The figures stay, and what the count lay in may serve another."""
        if not self._closed:
            self._closed = True
            self._count = self._count.copy()
            self._state.count = self._count

    def stats(self) -> StreamStats:
        """Figures since open or reset."""
        state = self._state
        return StreamStats(
            frames=state.frame,
            samples=state.samples,
            pending_frames=self.pending,
            compute_s=self.latency.total_ms / 1e3,
            latency_ms=self.latency.summary(),
        )
