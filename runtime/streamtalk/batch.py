"""Many streams in few launches: groups of rows, each launched when its streams have a hop due."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from streamtalk.audio_window import Clock
from streamtalk.errors import StreamError
from streamtalk.identity import Speaker
from streamtalk.noise import NoiseFn
from streamtalk.rows import Mask, Rows
from streamtalk.stream import Face, Frame, Stream, device_vertices

if TYPE_CHECKING:
    from streamtalk.backends.cuda.device_array import DeviceArray


class FaceMaker(Protocol):
    """Makes a face of what a caller of `Batch.open` gave."""

    def __call__(
        self,
        speaker: Speaker,
        seed: int,
        template: npt.ArrayLike | None,
        noise: npt.ArrayLike | NoiseFn | None,
    ) -> Face: ...


@dataclass(eq=False)
class Group:
    """Rows that are launched together, on ticks of one `phase` (tick mod hop). `streams` [B] are listed by row."""

    rows: Rows
    phase: int
    streams: list[Stream | None]
    active: Mask = field(init=False)
    launched: int = 0
    """Number of the newest launch, counted over the batch."""

    def __post_init__(self) -> None:
        self.active = np.zeros(len(self.streams), np.bool_)

    def at(self, row: int) -> Stream | None:
        """Stream in a row; None is free. An interrupted move or close may leave a stream listed that is gone."""
        stream = self.streams[row]
        return stream if stream and stream._is_at(self.rows, row) else None

    def __iter__(self) -> Iterator[Stream]:
        return (stream for row in range(len(self.streams)) if (stream := self.at(row)))

    @property
    def free(self) -> list[int]:
        """Rows that are free."""
        return [row for row in range(len(self.streams)) if not self.at(row)]

    @property
    def due(self) -> list[Stream]:
        """Streams that have a hop due."""
        return [stream for stream in self if stream._pending]

    @property
    def paused(self) -> list[Stream]:
        """Streams that have nothing due, and had nothing on the last tick of this phase."""
        return [stream for stream in self if not stream._placed and not stream._pending]


class Batch:
    """Rows of one or more launches, opened by `Talker.batch`; a context manager. Not for use from two threads at once.

    Streams start, stop, starve and reset independently: a stream without audio takes no part in a launch and keeps its
    state to the bit. Its frames depend on its own audio, speaker and seed alone, whichever row it has and whoever its
    neighbours are. Everything is allocated when the batch is opened.
    """

    def __init__(
        self,
        size: int,
        row_groups: list[Rows],
        rows_each: int,
        model: str,
        clock: Clock,
        make_face: FaceMaker,
    ) -> None:
        self._size, self._model, self._clock, self._make_face = size, model, clock, make_face
        self._groups = [
            Group(rows, place * clock.hop // len(row_groups), [None] * rows_each)
            for place, rows in enumerate(row_groups)
        ]
        self._tick: int | None = None
        self._ticks_passed = 1
        self._launches = 0
        self._closed = False

    @property
    def size(self) -> int:
        """How many streams can be open at once."""
        return self._size

    @property
    def free(self) -> int:
        """How many more can be opened now."""
        return self._size - len(self.streams)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Streams that are open, by group and row."""
        return tuple(stream for group in self._groups for stream in group)

    def open(
        self,
        speaker: Speaker = None,
        *,
        seed: int = 0,
        template: npt.ArrayLike | None = None,
        noise: npt.ArrayLike | NoiseFn | None = None,
    ) -> Stream:
        """Open a stream in a free row; arguments as for `Talker.open`.

        On a batch that is stepped by ticks it goes to the group whose phase comes soonest after its first hop is due;
        that wait counts in its `delay_s`. Raises StreamError when the batch is full or closed, SpeakerError and
        UsageError.
        """
        self._require_open()
        if not self.free:
            raise StreamError(
                f"Expected a free row, got a batch whose {self._size} streams are all open: close one first, or open "
                "another batch."
            )
        face, clock = self._make_face(speaker, seed, template, noise), self._clock
        due = None if self._tick is None else self._tick - (-clock.delay_samples * clock.fps // clock.rate)
        group = self._nearest(due, (group for group in self._groups if group.free))
        row = group.free[0]
        stream = Stream(self._model, clock, face, group.rows, row, self._release)
        stream._wait_frames = self._wait_frames(group, due)
        group.streams[row] = stream
        return stream

    def step(self, tick: int | None = None) -> list[tuple[Stream, list[Frame]]]:
        """Launch one group that has a hop due, that with the oldest one; empty when none has.

        Returns the frames of every stream of the group that had a hop due: views until the group's next launch. Without
        `tick` any group may be launched. With a `tick`, the number of a frame on the caller's clock, only groups of its
        phase may, and those of ticks that were left out: call until nothing is left, at every tick. Groups that are
        late by a hop or more take turns, so that a stream with seconds of audio queued cannot starve the others.

        Raises StreamError where a stream's own `noise` fails; nothing was computed then, and the others go on once that
        stream is closed or reset.
        """
        self._require_open()
        if tick is not None:
            self._place(tick)
        due = [(g, streams) for g in self._groups if self._has_phase(g, tick) and (streams := g.due)]
        if not due:
            return []
        began = perf_counter()
        group = self._oldest(due)
        if tick is None:
            self._gather(group, due)
        running = self._write_inputs(group)
        group.rows.launch(group.active)
        vertices = group.rows.vertices()
        made = [(stream, stream._handed(vertices)) for stream in running]
        self._launches += 1
        group.launched = self._launches
        milliseconds = (perf_counter() - began) * 1e3
        for stream in running:
            stream._latency.add(milliseconds)
        group.rows.advance(group.active)  # last: a launch that was interrupted before is made again
        return made

    @property
    def device_vertices(self) -> tuple[DeviceArray, ...]:
        """Vertices [B, hop, V, 3] of each group's newest launch on the GPU, see `DeviceArray`; rows that were not in it
        mean nothing. Raises BackendError on a CPU backend.
        """
        return tuple(device_vertices(group.rows) for group in self._groups)

    def close(self) -> None:
        """Close every stream and give the rows back. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            for stream in self.streams:
                stream.close()
            for group in self._groups:
                group.rows.close()

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StreamError("This batch is closed: open another from the talker.")

    def _release(self, stream: Stream) -> None:
        for group in self._groups:
            if stream in group.streams:
                group.streams[group.streams.index(stream)] = None

    def _wait_frames(self, group: Group, due: int | None) -> int:
        """Ticks from `due` to the next one of a group's phase; none on a batch that is stepped without ticks."""
        return 0 if due is None else (group.phase - due) % self._clock.hop

    def _nearest(self, due: int | None, groups: Iterable[Group], moves: Stream | None = None) -> Group:
        """That of `groups` whose phase comes first from tick `due` on.

        Of several the one with the most streams that are not paused, then the fullest: that makes few launches. A
        stream that `moves` stays where it is if no other is better.
        """

        def rank(group: Group) -> tuple[int, int, int, bool]:
            others = [stream for stream in group if stream is not moves]
            busy = sum(stream._placed for stream in others)
            return self._wait_frames(group, due), -busy, -len(others), len(others) == len(list(group))

        return min(groups, key=rank)

    def _room(self, group: Group) -> int:
        """How many streams could move to a group. If there is a free row elsewhere, paused streams make room."""
        spare = any(other.free for other in self._groups if other is not group)
        return len(group.free) + (len(group.paused) if spare else 0)

    def _has_phase(self, group: Group, tick: int | None) -> bool:
        """Whether a group's phase is that of `tick`, or of one that was left out before it; without ticks it is."""
        return tick is None or (tick - group.phase) % self._clock.hop < self._ticks_passed

    def _oldest(self, due: list[tuple[Group, list[Stream]]]) -> Group:
        """The group that has the oldest hop due; of those that are late by a hop the one that has waited longest."""
        late = self._clock.hop * self._clock.rate // self._clock.fps

        def age(entry: tuple[Group, list[Stream]]) -> tuple[int, int]:
            group, streams = entry
            return min(late, max(stream._overdue_samples for stream in streams)), -group.launched

        return max(due, key=age)[0]

    def _place(self, tick: int) -> None:
        """Move streams whose hop is due for the first time, or after a pause, to the group whose phase is nearest."""
        begins = tick != self._tick
        if begins:
            self._ticks_passed = 1 if self._tick is None else max(1, tick - self._tick)
            self._tick = tick
        for group in self._groups:
            begins_pause = begins and self._has_phase(group, tick)  # of those that have nothing due
            for stream in list(group):
                if stream._placed:
                    stream._placed = not (begins_pause and not stream._pending)
                elif stream._pending:
                    rooms = [other for other in self._groups if other is group or self._room(other)]
                    nearest = self._nearest(tick, rooms, stream)
                    if nearest is not group:
                        self._move(stream, group, nearest)
                    stream._wait_frames = self._wait_frames(nearest, tick)
                    stream._placed = True

    def _gather(self, group: Group, due: list[tuple[Group, list[Stream]]]) -> None:
        """Spare launches: move the streams of other groups that are due too to this one, where all of a group's fit."""
        for other, streams in due:
            if other is not group and len(streams) <= self._room(group):
                for stream in streams:
                    self._move(stream, other, group)

    def _move(self, stream: Stream, old: Group, new: Group) -> None:
        if not new.free:
            self._move(new.paused[0], new, next(group for group in self._groups if group.free))
        row = new.free[0]
        new.streams[row] = stream
        stream._move(new.rows, row)
        old.streams[old.streams.index(stream)] = None

    def _write_inputs(self, group: Group) -> list[Stream]:
        """Write the inputs of the streams that have a hop due, mark their rows active, and return them."""
        group.active.fill(False)
        running = []
        for row in range(len(group.streams)):
            stream = group.at(row)
            if stream and stream._pending:
                try:
                    stream._write_inputs()
                except Exception as error:  # the caller's own noise may raise anything
                    raise StreamError(
                        f"The `noise` of `batch.streams[{self.streams.index(stream)}]` failed in the hop that begins "
                        f"with frame {stream._hop_frame} ({error}). Close or reset that stream; the others go on."
                    ) from error
                group.active[row] = True
                running.append(stream)
        return running
