"""Many voices in one launch: each open stream has a slot of the batch, and a step runs those that have a frame due."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from time import perf_counter
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from streamtalk.backends.slots import Slots
from streamtalk.cuda.array import DeviceArray, device_vertices
from streamtalk.errors import StreamError
from streamtalk.identity import Speaker
from streamtalk.noise import NoiseFn
from streamtalk.stream import Snapshot
from streamtalk.voice import Counter, Float32, Frame, StreamStats, Voice


class VoiceMaker(Protocol):
    """Style [E] and voice for what a caller of `Batch.open` gave; the voice counts its frames in `count` [1]."""

    def __call__(
        self,
        count: Counter,
        speaker: Speaker,
        seed: int,
        template: npt.ArrayLike | None,
        noise: npt.ArrayLike | NoiseFn | None,
    ) -> tuple[Float32, Voice]: ...


class Batch:
    """The slots of an engine, opened by `Talker.batch`; a context manager. Not for use from two threads at once.

    Streams start, stop, starve and reset independently: a stream without audio takes no part in a step and keeps
    its state to the bit, and none waits for another. Its frames depend on its own audio, speaker and seed alone,
    whichever slot it has and whoever its neighbours are; where the audio encoder has fewer rows than there are slots,
    but for the rounding of its sums. Everything is allocated when the batch is opened.
    """

    def __init__(self, size: int, slots: Slots, voice: VoiceMaker) -> None:
        self._slots = slots
        self._make_voice = voice
        self._streams: list[BatchStream | None] = [None] * size
        self._due, self._active = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        # Every slot's next frame and, last, the number of turns: advanced by one addition that no interrupt can
        # fall into, so that counters and state never part.
        self._counts = np.zeros(size + 1, np.int64)
        self._advance = np.zeros(size + 1, np.int64)
        self._advance[-1] = 1
        self._closed = False

    @property
    def size(self) -> int:
        """How many streams can be open at once."""
        return len(self._streams)

    @property
    def free(self) -> int:
        """How many more can be opened now."""
        return self._streams.count(None)

    @property
    def streams(self) -> tuple[BatchStream, ...]:
        """The open streams, by slot."""
        return tuple(stream for stream in self._streams if stream)

    def open(
        self,
        speaker: Speaker = None,
        *,
        seed: int = 0,
        template: npt.ArrayLike | None = None,
        noise: npt.ArrayLike | NoiseFn | None = None,
    ) -> BatchStream:
        """Give a voice a free slot; arguments as for `Talker.open`.

        Raises StreamError when every slot is taken, SpeakerError and UsageError.
        """
        self._require_open()
        if None not in self._streams:
            raise StreamError(
                f"All {self.size} slots of this batch are taken: close a stream first, open another batch, or "
                "export with a larger --batch."
            )
        slot = self._streams.index(None)
        style, voice = self._make_voice(self._counts[slot : slot + 1], speaker, seed, template, noise)
        self._slots.start(slot, style, voice.template)
        stream = BatchStream(voice, self._slots, slot, self._counts[-1:], self._release)
        self._streams[slot] = stream
        return stream

    def step(self) -> list[tuple[BatchStream, Frame]]:
        """Compute one frame of every stream that has one due, in one launch; empty when none has.

        Frames are views that the next step overwrites. Raises StreamError where a stream's own `noise` fails;
        nothing was computed then, and the others go on once that stream is closed or reset.
        """
        self._require_open()
        began = perf_counter()
        running = [stream for stream in self._streams if stream and stream._voice.pending > 0]
        if not running:
            return []
        self._prepare(running)
        slots, counts = self._slots, self._counts
        if self._due.any():
            slots.encode(self._due)
            for stream in running:
                if self._due[stream.slot]:
                    stream._voice.encoded(stream._voice.state.frame)
        slots.frame(int(counts[-1]), counts[:-1], self._active)
        vertices = slots.vertices()
        made = [
            (stream, stream._voice.frame(stream._voice.state.frame, vertices[stream.slot]))
            for stream in running
        ]
        np.add(counts, self._advance, out=counts)
        milliseconds = (perf_counter() - began) * 1e3
        for stream in running:
            stream._voice.latency.add(milliseconds)
        return made

    @property
    def device_vertices(self) -> DeviceArray:
        """The newest step's vertices [B, V, 3] on the GPU, see `DeviceArray`; rows of streams that were not in it mean
        nothing. Raises BackendError on a CPU backend.
        """
        return device_vertices(self._slots)

    def close(self) -> None:
        """Close every stream and give the slots back. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            for stream in self.streams:
                stream.close()
            self._slots.close()

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StreamError("This batch is closed: open another from the talker.")

    def _prepare(self, running: list[BatchStream]) -> None:
        """Write the inputs of the streams that run, and who they are; the rest of the batch stays as it was."""
        self._due.fill(False)
        self._active.fill(False)
        for stream in running:
            voice, slot = stream._voice, stream.slot
            index = voice.state.frame
            try:
                voice.noise(index, self._slots.noise[slot])
            except Exception as error:  # the caller's own function may raise anything
                raise StreamError(
                    f"The `noise` of the stream in slot {slot} failed at its frame {index} ({error}). Close "
                    "or reset that stream; the others are unharmed."
                ) from error
            self._active[slot] = True
            if index >= voice.state.encoded:
                self._slots.pcm[slot] = voice.window(index)
                self._due[slot] = True
        self._advance[:-1] = self._active

    def _release(self, stream: BatchStream) -> None:
        if self._streams[stream.slot] is stream:
            self._streams[stream.slot] = None


class BatchStream:
    """A voice in a slot of a batch, opened by `Batch.open`; a context manager. As `Stream`, but audio is queued
    and frames come from `Batch.step`.
    """

    def __init__(
        self, voice: Voice, slots: Slots, slot: int, turn: Counter, release: Callable[[BatchStream], None]
    ) -> None:
        self._voice = voice
        self._slots = slots
        self._turn = turn
        self._release = release
        self.slot = slot
        """The row of the batch that is this stream's until it is closed."""

    @property
    def template(self) -> Float32:
        """The face at rest [V, 3] that this stream moves."""
        return self._voice.template

    @cached_property
    def device_vertices(self) -> DeviceArray:
        """The newest frame's vertices [V, 3] on the GPU, see `DeviceArray`: the stream's row of the batch's. Raises
        BackendError on a CPU backend.
        """
        return device_vertices(self._slots).row(self.slot)

    @property
    def delay_s(self) -> float:
        """Seconds of audio that a frame waits for beyond its own time: the window's lookahead."""
        return self._voice.clock.delay_s

    @property
    def finished(self) -> bool:
        """Whether the audio was ended by `flush` and every frame was computed: time to close or reset."""
        return self._voice.finished

    def push(self, pcm: npt.ArrayLike) -> None:
        """Queue audio: checked and copied at the call, as by `Stream.push`. Raises AudioError and StreamError."""
        self._voice.push(pcm)

    def flush(self) -> None:
        """End the audio; the frames that are left come with the next steps. Raises StreamError."""
        self._voice.flush()

    def reset(self) -> None:
        """Become equal to a newly opened stream. Raises StreamError if closed."""
        self._voice.require_open()
        self._slots.reset(self.slot)
        self._voice.reset()

    def state(self) -> Snapshot:
        """A copy of all state, to go back to with `restore`; a `Stream` of the same model takes it too."""
        lane = self._slots.state(self.slot, int(self._turn[0]))
        return Snapshot(self._voice.state.copy(), lane, self._voice.clock)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, of this or any other stream of the same model. Statistics are kept. Raises
        StreamError, in which case nothing has changed.
        """
        snapshot.require_fit(self.state())
        self._voice.restore(snapshot.stream)
        self._slots.restore(self.slot, int(self._turn[0]), snapshot.lane)

    def stats(self) -> StreamStats:
        """Figures since open or reset; cheap, and allowed after close."""
        return self._voice.stats()

    def close(self) -> None:
        """Give the slot back, whatever was queued. Closing twice is fine."""
        self._voice.close()
        self._release(self)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
