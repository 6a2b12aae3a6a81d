"""Streams: audio in, frames out, by a row of a hop graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from streamtalk.audio_window import Clock, Timeline, accepted
from streamtalk.errors import BackendError, StreamError
from streamtalk.latency import Latency, LatencyHistogram
from streamtalk.rows import Float32, Rows
from streamtalk.snapshot import Snapshot

if TYPE_CHECKING:
    from streamtalk.backends.cuda.device_array import DeviceArray


class Noise(Protocol):
    """Fills `out` [C] with the noise of a frame; any frame, in any order."""

    def __call__(self, frame: int, out: Float32) -> None: ...


class Solver(Protocol):
    """Finds blendshapes [52] of vertices [V, 3], in a buffer of its own."""

    def __call__(self, vertices: Float32) -> Float32: ...


@dataclass(frozen=True)
class Frame:
    """One animation frame. `vertices` [V, 3] float32, in the model's units, is a read-only view of a buffer that the
    next launch of the stream's rows overwrites: copy to keep. `time_s` is `index / fps`.
    """

    index: int
    time_s: float
    vertices: Float32
    solver: Solver | None = None

    @cached_property
    def blendshapes(self) -> Float32 | None:
        """ARKit weights [52] float32 in [0, 1], named by `Talker.blendshape_names`; None where the model's face has no
        shapes. They add up to the vertices within the error that the parity certificate states.

        Found when first read, which must be before the next launch; a read-only view that later ones overwrite.
        """
        return self.solver(self.vertices) if self.solver else None


@dataclass(frozen=True)
class StreamStats:
    """Figures of a stream since it was opened or reset.

    `frames` were handed out, `pending_frames` are ready and not yet computed. `latency_ms` is that of a hop: from its
    inputs to its vertices, audio encoder included. `compute_s` is the sum of all hops. In a batch a hop's latency is
    that of the launch which made it.
    """

    frames: int
    samples: int
    pending_frames: int
    compute_s: float
    latency_ms: Latency


@dataclass(frozen=True)
class Face:
    """Everything that sets one stream apart from others: `style` [E], `template` [V, 3], its noise, and for each
    frame of a hop what finds its blendshapes.
    """

    style: Float32
    template: Float32
    noise: Noise
    solvers: Sequence[Solver | None]


class Stream:
    """A stream of audio and its frames, opened by `Talker.open` or `Batch.open`; a context manager.

    Not for use from two threads at once. Everything is allocated at open; a hop costs the same after a second and after
    a year. In a batch frames come from `Batch.step`.
    """

    def __init__(
        self,
        model: str,
        clock: Clock,
        face: Face,
        rows: Rows,
        row: int,
        release: Callable[[Stream], None] | None,
    ) -> None:
        """Take `row` of `rows`. `release` is called at close; None for a stream that has `rows` for itself."""
        self._model, self._clock, self._face = model, clock, face
        self._at = rows, row  # one store moves a stream: no interrupt can leave it between two places
        self._release = release
        self._alone = np.ones(1, np.bool_)
        self._latency = LatencyHistogram()
        self._wait_frames = 0
        self._generation = 0
        self._ended = self._flushed = self._closed = False
        rows.start(row, face.style, face.template)
        self._begin()

    @property
    def template(self) -> Float32:
        """Face at rest [V, 3] that this stream moves."""
        return self._face.template

    @property
    def delay_s(self) -> float:
        """Seconds of audio that a frame waits for beyond its own time: its hop and the lookahead, and in a batch the
        wait for its group.
        """
        return self._clock.delay_s + self._wait_frames / self._clock.fps

    @property
    def finished(self) -> bool:
        """Whether the audio was ended by `flush` and every frame handed out: time to close or reset."""
        return self._ended and self._pending == 0

    @property
    def device_vertices(self) -> DeviceArray:
        """Vertices [V, 3] of the newest frame on the GPU, see `DeviceArray`. Raises BackendError on a CPU backend."""
        rows, row, place = self._newest or (*self._at, 0)
        array: DeviceArray = device_vertices(rows).at(row, place)
        return array

    def push(self, pcm: npt.ArrayLike) -> Iterator[Frame]:
        """Take audio and return the frames that are ready.

        `pcm` is float32 or float64 mono [n] at the model's rate (16 kHz), full scale 1.0, any n. It is checked and
        copied at the call. Frames are computed as the iterator is read; those not read come with the next call.
        However audio is cut into pushes, the frames are the same to the bit. In a batch frames come from `Batch.step`,
        and reading the iterator raises StreamError.

        Raises AudioError, in which case nothing was taken and the stream goes on unharmed, and StreamError after
        `flush` or `close`.
        """
        self._require_open()
        if self._ended:
            raise StreamError("This stream was flushed: call reset() before the next push.")
        self._timeline.append(accepted(pcm, self._clock.rate))
        self._count_ready()
        return self._ready()

    def flush(self) -> Iterator[Frame]:
        """End the audio and return all frames that are left, silence standing in for their lookahead.

        n samples yield n * fps // 16000 frames in all. Afterwards only `reset` is allowed. Raises StreamError.
        """
        self._require_open()
        if self._flushed:
            raise StreamError("This stream was flushed already: call reset() to start again.")
        self._ended = True
        self._count_ready()
        self._flushed = True
        return self._ready()

    def reset(self) -> None:
        """Become equal to a newly opened stream. Iterators of earlier calls end. Raises StreamError if closed."""
        self._require_open()
        rows, row = self._at
        rows.reset(row)
        self._begin()
        self._latency.clear()

    def state(self) -> Snapshot:
        """Copy all state as it was before the current hop, to go back to or to go on from elsewhere. Raises
        StreamError if closed.
        """
        self._require_open()
        frame, timeline = self._hop_frame, self._timeline
        start = max(self._clock.window_start(frame), timeline.start)
        pcm = timeline.window(start, max(0, timeline.end - start)).copy()
        rows, row = self._at
        return Snapshot(self._model, frame, self._next_frame, timeline.end, self._ended, pcm, rows.state(row))

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of any stream of the same model. Statistics are kept; iterators of earlier calls end.

        The hop that was under way is computed again, and its frames that were handed out are skipped. If the audio had
        ended, `flush` returns the frames that are left. Speaker, template and noise are this stream's own. Raises
        StreamError, in which case nothing has changed.
        """
        self._require_open()
        rows, row = self._at
        snapshot.require_fit(self._model, self._clock, rows.state(row))
        timeline = _timeline(self._clock, snapshot.samples - snapshot.pcm.size)
        timeline.append(snapshot.pcm)
        rows.restore(row, snapshot.frame, snapshot.row)
        self._take(timeline, snapshot.index, snapshot.ended)

    def stats(self) -> StreamStats:
        """Figures since open or reset; cheap, and allowed after close."""
        return StreamStats(
            frames=self._next_frame,
            samples=self._timeline.end,
            pending_frames=self._pending,
            compute_s=self._latency.total_ms / 1e3,
            latency_ms=self._latency.summary(),
        )

    def close(self) -> None:
        """Give the row back, whatever was queued. Closing twice is fine."""
        if self._closed:
            return
        self._index = self._next_frame  # the figures stay, and the row may serve another
        self._closed = True
        if self._release:
            self._release(self)
        else:
            self._at[0].close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StreamError("This stream is closed: open another from the talker.")

    def _begin(self) -> None:
        """Start at frame 0, behind silence."""
        context = self._clock.context_samples
        timeline = _timeline(self._clock, -context)
        timeline.append(np.zeros(context, np.float32))
        self._take(timeline, 0, False)

    def _take(self, timeline: Timeline, index: int, ended: bool) -> None:
        self._timeline, self._index, self._ended = timeline, index, ended
        self._flushed = False  # after the restore of a stream that was, it returns what is left
        self._computed = -1
        self._newest: tuple[Rows, int, int] | None = None
        self._placed = False
        self._count_ready()
        self._generation += 1

    def _count_ready(self) -> None:
        """Count the frames whose audio is there, from the first. A batch asks much more often than this changes."""
        clock, samples = self._clock, self._timeline.end
        self._frames_ready = clock.frames_in(samples) if self._ended else clock.frames_ready(samples)

    @property
    def _hop_frame(self) -> int:
        """First frame of the hop that comes next or is under way."""
        rows, row = self._at
        return int(rows.frames[row])

    @property
    def _next_frame(self) -> int:
        """Next frame to hand out: within the hop that is under way, or its first."""
        if self._closed:
            return self._index
        return min(max(self._index, self._hop_frame), self._frames_ready)

    @property
    def _pending(self) -> int:
        """Frames that are ready and not yet handed out."""
        return self._frames_ready - self._next_frame

    @property
    def _overdue_samples(self) -> int:
        """Samples that came after those that complete the next hop."""
        # Behind the end, silence comes at once.
        end = self._timeline.end + (self._clock.window_samples if self._ended else 0)
        return end - self._clock.sample_of(self._hop_frame) - self._clock.delay_samples

    def _ready(self) -> Iterator[Frame]:
        if self._release:
            return _raising(StreamError("This stream is one of a batch: its frames come from `Batch.step`."))
        return self._frames(self._generation)

    def _frames(self, generation: int) -> Iterator[Frame]:
        while generation == self._generation:
            frame = self._next()
            if frame is None:
                return
            yield frame

    def _next(self) -> Frame | None:
        """Hand out the next frame, if its audio is there; compute its hop first, if it has none yet."""
        self._require_open()
        index, first = self._next_frame, self._hop_frame
        if index >= self._frames_ready:
            return None
        rows, _ = self._at
        if self._computed != first:
            began = perf_counter()
            self._write_inputs()
            rows.launch(self._alone)
            self._vertices = rows.vertices()
            self._computed = first
            self._latency.add((perf_counter() - began) * 1e3)
        frame = self._frame(index, self._vertices)
        # Last: a frame that was interrupted before is made again. The first of these stores is enough.
        if index + 1 == first + self._clock.hop:
            rows.advance(self._alone)
        self._index = index + 1
        return frame

    def _write_inputs(self) -> None:
        """Write the window and the noise of the next hop to the rows' inputs."""
        clock, timeline, first, last = self._clock, self._timeline, self._hop_frame, self._frames_ready
        rows, row = self._at
        start = clock.window_start(first)
        timeline.drop_before(start)
        audio = timeline.window(start, min(max(0, timeline.end - start), clock.window_samples))
        window = rows.inputs["pcm"][row]
        window[: audio.size] = audio
        window[audio.size :] = 0  # behind the end
        for index, noise in enumerate(rows.inputs["noise"][row], first):
            if index < last:
                self._face.noise(index, noise)
            else:
                noise.fill(0)  # nobody reads that frame

    def _frame(self, index: int, vertices: Float32) -> Frame:
        """Frame `index` of the newest launch, whose vertices [B, hop, V, 3] are given."""
        rows, row = self._at
        place = index % self._clock.hop
        self._newest = rows, row, place
        return Frame(index, index / self._clock.fps, vertices[row, place], self._face.solvers[place])

    def _handed(self, vertices: Float32) -> list[Frame]:
        """All frames of the newest launch that are ready and were not handed out."""
        last = min(self._hop_frame + self._clock.hop, self._frames_ready)
        return [self._frame(index, vertices) for index in range(self._next_frame, last)]

    def _is_at(self, rows: Rows, row: int) -> bool:
        """Whether this stream is open and has that row."""
        return not self._closed and self._at[0] is rows and self._at[1] == row

    def _move(self, rows: Rows, row: int) -> None:
        """Go on in another row, which is free."""
        old, old_row = self._at
        rows.start(row, self._face.style, self._face.template)
        rows.restore(row, self._hop_frame, old.state(old_row))
        self._at = rows, row


def device_vertices(rows: Rows) -> DeviceArray:
    """Vertices [B, hop, V, 3] of the newest launch on the GPU. Raises BackendError on a CPU backend."""
    array: DeviceArray | None = getattr(rows, "device_vertices", None)
    if array is None:
        raise BackendError(
            "Vertices are on a device only where a GPU makes them, and this backend computes on the CPU: read "
            "`frame.vertices`, or load with tensorrt, tensorrt_rtx or onnxruntime-cuda."
        )
    return array


def _timeline(clock: Clock, start: int) -> Timeline:
    # Twice what it holds: a window, a hop that comes in, as long a wait for a batch's group, and pushes of 100 ms.
    held = clock.window_samples + 2 * clock.hop * clock.rate // clock.fps + clock.rate // 10
    return Timeline(2 * held, start=start)


def _raising(error: StreamError) -> Iterator[Frame]:
    raise error
    yield  # a generator: the error comes when it is read
