"""One run from a source to its outputs: the loop, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, perf_counter

from streamtalk.app.audio.level import LevelMeter
from streamtalk.app.audio.sources import Block, Source
from streamtalk.app.output import Output
from streamtalk.errors import AudioError, DeviceError, StreamTalkError
from streamtalk.latency import Latency
from streamtalk.signals import Interrupt
from streamtalk.stream import Frame, Stream
from streamtalk.talker import Talker


@dataclass(frozen=True)
class Report:
    """What a run did. Its fields are those of `--json`.

    `late` frames came more than a frame's time after the audio that they waited for. `rtf` is seconds of
    work per second of audio: for a fast run the whole loop with reading and writing, otherwise the loop
    without the wait for audio. `latency_ms` is the computation of a hop, without the outputs.
    """

    frames: int
    fps: int
    delay_s: float
    audio_s: float
    wall_s: float
    late: int
    rtf: float
    latency_ms: Latency
    level_dbfs: float
    clipped_share: float
    overflows: int
    reconnects: int
    interrupted: bool
    backend: str


class Run:
    """Plays `source` through `stream` into `outputs`, once."""

    def __init__(self, talker: Talker, stream: Stream, source: Source, outputs: Sequence[Output]) -> None:
        self._talker = talker
        self._stream = stream
        self._source = source
        self._outputs = outputs
        self._level = LevelMeter(talker.sample_rate)
        self._late = 0
        self._wall_s = 0.0
        self._work_s = 0.0
        self._paced = False
        self._interrupt = Interrupt()

    def play(self, progress: Callable[[Run], None]) -> StreamTalkError | None:
        """Run to the end of the audio or to Ctrl-C; `progress` is called after each block.

        However the audio ends, the frames that it allows are computed, and the outputs are closed with what
        they have. Returns the error that ended the audio early. Raises OutputError, after closing as well.
        """
        began = perf_counter()
        with self._interrupt:
            try:
                failure = self._listen(progress)
                self._put(self._stream.flush(), None)
            except BaseException:
                with suppress(StreamTalkError):  # the first error is the one to show
                    self._close()
                raise
            self._close()
        self._wall_s = perf_counter() - began
        if failure is None and not self._interrupt.requested:
            failure = self._too_short()
        return failure

    @property
    def level_dbfs(self) -> float:
        """The level of the last instants."""
        return self._level.recent_dbfs

    @property
    def late(self) -> int:
        """Late frames so far."""
        return self._late

    @property
    def clips(self) -> bool:
        """Whether a notable share of the audio is at full scale."""
        return self._level.clips

    @property
    def sample_rate(self) -> int:
        """Of the model, in Hz."""
        return self._talker.sample_rate

    @property
    def stream(self) -> Stream:
        """The stream that is played."""
        return self._stream

    def report(self) -> Report:
        """What was done, once `play` has returned or raised."""
        stats = self._stream.stats()
        events = self._source.events()
        audio_s = stats.samples / self._talker.sample_rate
        work_s = self._work_s if self._paced else self._wall_s
        return Report(
            frames=stats.frames,
            fps=self._talker.fps,
            delay_s=self._stream.delay_s,
            audio_s=audio_s,
            wall_s=self._wall_s,
            late=self._late,
            rtf=work_s / audio_s if audio_s else 0.0,
            latency_ms=stats.latency_ms,
            level_dbfs=self._level.mean_dbfs,
            clipped_share=self._level.clipped_share,
            overflows=events.overflows,
            reconnects=events.reconnects,
            interrupted=self._interrupt.requested,
            backend=self._talker.backend,
        )

    def _listen(self, progress: Callable[[Run], None]) -> StreamTalkError | None:
        blocks = self._source.blocks()
        try:
            while not self._interrupt.requested:
                with self._interrupt.waiting():
                    block = next(blocks, None)
                if block is None:
                    break
                self._take(block)
                progress(self)
        except KeyboardInterrupt:
            pass  # it was waiting; `requested` tells
        except (AudioError, DeviceError) as error:
            return error
        return None

    def _take(self, block: Block) -> None:
        began = perf_counter()
        self._paced |= block.arrival_s is not None
        self._level.add(block.samples)
        for output in self._outputs:
            output.audio(block.samples)
        self._put(self._stream.push(block.samples), block.arrival_s)
        self._work_s += perf_counter() - began

    def _put(self, frames: Iterable[Frame], arrival_s: float | None) -> None:
        for frame in frames:
            if arrival_s is not None and monotonic() - arrival_s > 1 / self._talker.fps:
                self._late += 1
            for output in self._outputs:
                output.frame(frame)

    def _close(self) -> None:
        """Close all outputs; then raise the first error among them."""
        failures: list[StreamTalkError] = []
        for output in self._outputs:
            try:
                output.close()
            except StreamTalkError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _too_short(self) -> AudioError | None:
        samples, rate = self._stream.stats().samples, self._talker.sample_rate
        if samples == 0:
            return AudioError(f"{self._source.label} holds no samples; expected speech.")
        if self._talker.fps * samples < rate:
            return AudioError(
                f"{self._source.label} is too short: {1e3 * samples / rate:.1f} ms, and one frame needs "
                f"{1e3 / self._talker.fps:.1f} ms."
            )
        return None
