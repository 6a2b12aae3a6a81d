"""A long run: `python -m benchmarks.soak` streams an hour of varied speech and checks that nothing grows.

It runs as fast as it can, or with `--real-time` at a microphone's pace. Bounds: median latency of a hop in the last
minute at most 5 % above the first's, resident memory below 1 MB of growth an hour of audio, the same output for the
same audio, late frames at most 1 in 10,000. Every minute has other audio, but the last has the first's again. Exits
with 1 when a bound breaks, with 2 for bad arguments.

A frame is due `delay_s` after its own time, and late when it is there more than a frame's time after that. In an
accelerated run nobody waits: the frame's computing time then counts in a queue with the arrivals of a microphone.

Latency is compared between times when a shared machine may be differently busy. So a second process with the same
model, which slept in between, takes its hops in turns with this one in the first and the last minute, and the
change of its median is divided out; the plain change is printed beside it, and p99 without a bound (see
`soak_bounds`). In real time both must fit into a hop's time; a model that alone takes half of it wants
`--no-control`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.latency_rows import hardware, versions
from benchmarks.soak_audio import MINUTE_S, Programme, read_speech
from benchmarks.soak_bounds import Bound, judge
from benchmarks.soak_control import Control, ControlProcess, begins_hop, timed
from benchmarks.soak_record import COLUMNS, Record, Spread, resident_bytes
from streamtalk import Frame, StreamTalkError, Talker, UsageError
from streamtalk.backends import AUTO, available
from streamtalk.latency import LatencyHistogram
from streamtalk.model import Clock

SPEECH = Path("models/bundled/demo.wav")
BLOCK_S = 0.01
"""What a microphone gives at a time."""
WARM_UP_S = 10
MEMORY_WARM_UP = 0.1
"""Share of the run before which memory may still rise: caches and arenas that fill once."""
MEMORY_EVERY_S = 10
SCHEMA = 1


@dataclass(frozen=True)
class Machine:
    """Clock (s) and memory that a soak reads; tests have their own. `resident_bytes` is None where it is not known."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    resident_bytes: Callable[[], int | None] = resident_bytes


class Listener(Protocol):
    """The part of a stream that a soak uses."""

    @property
    def delay_s(self) -> float: ...

    @property
    def template(self) -> npt.NDArray[np.float32]: ...

    def push(self, pcm: npt.NDArray[np.float32]) -> Iterator[Frame]: ...


class Motion:
    """One number in millimetres a frame: how far the lips are open, or how far the face is from rest."""

    def __init__(
        self, template: npt.NDArray[np.float32], lip_pairs: npt.NDArray[np.int32] | None, metres: float
    ) -> None:
        self._template = template
        self._lips = lip_pairs
        self._scale = 1e3 * metres
        self.name = "RMS distance of the vertices from rest" if lip_pairs is None else "lip opening"

    def __call__(self, vertices: npt.NDArray[np.float32]) -> float:
        """The number for vertices [V, 3]; not finite where any of them is not."""
        if not np.isfinite(vertices).all():
            return float("nan")
        if self._lips is None:
            gap = vertices - self._template
            return self._scale * float(np.sqrt(np.square(gap).sum(axis=1).mean()))
        gap = vertices[self._lips[:, 0]] - vertices[self._lips[:, 1]]
        return self._scale * float(np.sqrt(np.square(gap).sum(axis=1)).mean())


class Soak:
    """One run. Everything that it keeps is allocated here: `record`, one minute of audio and two histograms."""

    def __init__(
        self,
        stream: Listener,
        programme: Programme,
        minutes: int,
        clock: Clock,
        motion: Motion,
        *,
        real_time: bool = False,
        control: Control | None = None,
        machine: Machine | None = None,
    ) -> None:
        self.record = Record(minutes)
        self.record.statistic = motion.name
        self._stream, self._programme, self._motion = stream, programme, motion
        self._minutes, self._frame_s, self._rate, self._hop = minutes, 1 / clock.fps, clock.rate, clock.hop
        self._real_time, self._control, self._machine = real_time, control, machine or Machine()
        self._latency, self._control_latency = LatencyHistogram(), LatencyHistogram()
        self._spread = Spread()
        self._frames = self._late = self._pushed = 0
        self._busy_s = 0.0
        self._resident_mb = float("nan")

    def run(self, progress: Callable[[int, Record], None] = lambda _minute, _record: None) -> Record:
        """Warm up, then stream all minutes; `progress` is called after each."""
        self._began_s = self._machine.now()
        self._play(self._minutes, WARM_UP_S, controlled=True)
        for minute in range(self._minutes):
            last = minute == self._minutes - 1
            if last and self._control:
                self._control.reset()
            self._clear()
            # The last minute has the first one's audio.
            self._play(0 if last else minute, MINUTE_S, controlled=minute == 0 or last, memory=minute)
            self._note(minute)
            progress(minute, self.record)
        return self.record

    def _play(self, key: int, seconds: int, controlled: bool, memory: int | None = None) -> None:
        self._programme.fill(key)
        block = round(BLOCK_S * self._rate)
        given = 0  # to the control
        for start in range(0, seconds * self._rate, block):
            pcm = self._programme.minute[start : start + block]
            self._pushed += len(pcm)
            made = self._push(pcm)
            if made and controlled and self._control:
                for milliseconds in self._control.push(self._programme.minute[given : start + block]):
                    self._control_latency.add(float(milliseconds))
                given = start + block
            if memory is not None and start % (MEMORY_EVERY_S * self._rate) == 0:
                self._weigh(60 * memory + start / self._rate)

    def _push(self, pcm: npt.NDArray[np.float32]) -> int:
        """Give one block when it is there, and take what comes of it; returns the number of frames."""
        machine, arrival_s = self._machine, self._pushed / self._rate
        if self._real_time:
            machine.sleep(max(0.0, self._began_s + arrival_s - machine.now()))
        made = 0
        for frame, milliseconds in timed(self._stream.push(pcm), machine.now):
            if self._real_time:
                ready_s = machine.now() - self._began_s
            else:
                ready_s = self._busy_s = max(arrival_s, self._busy_s) + milliseconds / 1e3
            due_s = frame.time_s + self._stream.delay_s
            self._late += ready_s - due_s > self._frame_s
            if begins_hop(frame, self._hop):
                self._latency.add(milliseconds)
            value = self._motion(frame.vertices)
            if np.isfinite(value):
                self._spread.add(value)
            else:
                self.record.not_finite += 1
            made += 1
        self._frames += made
        return made

    def _weigh(self, audio_s: float) -> None:
        resident = self._machine.resident_bytes()
        if resident is None:
            return
        self._resident_mb = resident / 1e6
        warm_s = MEMORY_WARM_UP * MINUTE_S * self._minutes
        if audio_s >= warm_s:
            self.record.memory.add(audio_s / 3600, resident)
            self.record.memory_s = audio_s - warm_s

    def _clear(self) -> None:
        self._frames = 0
        self._latency.clear()
        self._control_latency.clear()
        self._spread.clear()
        self._late = 0
        self._resident_mb = float("nan")

    def _note(self, minute: int) -> None:
        own, control = self._latency.summary(), self._control_latency.summary()
        beside = (control.p50, control.p99) if self._control_latency.n else (np.nan, np.nan)
        self.record.rows[minute] = (
            *(self._frames, self._late, own.p50, own.p99, own.max),
            *(*beside, self._resident_mb, self._spread.mean, self._spread.std),
        )


def document(record: Record, bounds: Sequence[Bound], talker: Talker, real_time: bool) -> dict[str, object]:
    """Contents of the file of `--json`."""
    return {
        "schema": SCHEMA,
        "model": talker.manifest.name,
        "backend": talker.backend,
        "mode": "real-time" if real_time else "accelerated",
        "hardware": hardware(),
        "versions": versions(),
        "statistic": record.statistic,
        "bounds": [asdict(bound) for bound in bounds],
        "minutes": [
            {name: None if np.isnan(value) else value for name, value in zip(COLUMNS, row, strict=True)}
            for row in record.rows.tolist()
        ],
    }


def plot(record: Record, title: str, path: Path) -> None:
    """Draw latency, memory and output over the minutes. Raises OSError."""
    from matplotlib.figure import Figure

    minutes = np.arange(1, len(record.rows) + 1)
    figure = Figure(figsize=(10, 8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    latency, memory, output = figure.subplots(3, 1, sharex=True)
    for name, style in (
        ("p50_ms", "C0-"),
        ("p99_ms", "C1-"),
        ("control_p50_ms", "C0x"),
        ("control_p99_ms", "C1x"),
    ):
        latency.plot(minutes, record.column(name), style, label=name.removesuffix("_ms").replace("_", "'s "))
    latency.set_ylabel("latency of a hop, ms")
    latency.set_ylim(bottom=0)
    latency.legend(fontsize=8, ncols=4)
    memory.plot(minutes, record.column("resident_mb"), "C2-")
    memory.set_ylabel("resident memory, MB")
    memory.ticklabel_format(useOffset=False)
    low, high = memory.get_ylim()
    memory.set_ylim(
        (low + high) / 2 - max(1, high - low), (low + high) / 2 + max(1, high - low)
    )  # no magnified pages
    mean, std = record.column("output_mean_mm"), record.column("output_std_mm")
    output.plot(minutes, mean, "C3-", label="mean")
    output.plot(minutes, std, "C4-", label="standard deviation")
    output.plot(minutes[[0, -1]], mean[[0, -1]], "C3o", minutes[[0, -1]], std[[0, -1]], "C4o")
    output.set_ylabel(f"{record.statistic}, mm\n(o: the same audio)")
    output.set_ylim(bottom=0)
    output.set_xlabel("minute of audio")
    output.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a soak; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add(
        "--engine",
        type=Path,
        default=Path("engines/bundled"),
        metavar="DIR",
        help="what export.py wrote (%(default)s)",
    )
    add("--backend", default=AUTO, help=f"{', '.join((AUTO, *available()))} (%(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads of a model run (the cores, at most 4)")
    add("--minutes", type=int, default=60, metavar="N", help="of audio, at least 2 (%(default)s)")
    add("--real-time", action="store_true", help="paced as a microphone paces, instead of as fast as it goes")
    add("--wav", type=Path, default=SPEECH, metavar="FILE", help="speech to cut and mix (%(default)s)")
    add("--no-control", action="store_true", help="without the process that measures the machine")
    add("--json", type=Path, metavar="FILE", help="all figures")
    add("--plot", type=Path, metavar="FILE", help="a picture of them")
    arguments = parser.parse_args(argv)
    try:
        return _soak(arguments)
    except (StreamTalkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _soak(arguments: argparse.Namespace) -> int:
    # Before an hour is spent.
    if arguments.minutes < 2:
        raise UsageError(f"--minutes {arguments.minutes}: at least 2, the first and the last.")
    for path in filter(None, (arguments.json, arguments.plot)):
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise UsageError(f"{path} cannot be written: it is a folder, or lies in none.")
    if arguments.plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install matplotlib.")
    talker = Talker.load(arguments.engine, arguments.backend, threads=arguments.threads)
    programme = Programme(read_speech(arguments.wav, talker.sample_rate), talker.sample_rate)
    with ExitStack() as stack:
        stream = stack.enter_context(talker.open())
        control = None
        if not arguments.no_control:
            control = stack.enter_context(ControlProcess(arguments.engine, talker.backend, arguments.threads))
        pairs = talker.landmarks.get("lip_pairs")
        motion = Motion(stream.template, pairs, talker.manifest.metres_per_unit)
        soak = Soak(
            stream,
            programme,
            arguments.minutes,
            talker.manifest.clock,
            motion,
            real_time=arguments.real_time,
            control=control,
        )
        record = soak.run(_progress)
    bounds = judge(record)
    print("\n".join(bound.line for bound in bounds))
    if arguments.json:
        text = json.dumps(document(record, bounds, talker, arguments.real_time), indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        mode = "real time" if arguments.real_time else "accelerated"
        plot(
            record,
            f"{talker.manifest.name} on {talker.backend}, {arguments.minutes} min, {mode}",
            arguments.plot,
        )
    return int(any(bound.met is False for bound in bounds))


def _progress(minute: int, record: Record) -> None:
    row = dict(zip(COLUMNS, record.rows[minute], strict=True))
    print(
        f"minute {minute + 1}: p50 {row['p50_ms']:.2f}  p99 {row['p99_ms']:.2f} ms  late {row['late']:.0f}  "
        f"{row['resident_mb']:.1f} MB  {record.statistic} {row['output_mean_mm']:.2f} mm",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
