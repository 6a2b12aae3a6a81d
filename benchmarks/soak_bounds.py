"""The four bounds of a stream that runs for hours, and whether a record is within them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.soak_record import Record

SLOWER = 0.05
"""The last minute's median latency over the first's, less one."""
GROWTH_MB_PER_HOUR = 1.0
DRIFT = 0.05
"""The last minute's mean and spread of the output over the first's."""
LATE_PER_10000 = 1.0

MEMORY_MINUTES = 10
"""A page more or less is 4 kB: over a shorter time that alone is a notable part of 1 MB an hour."""


@dataclass(frozen=True)
class Bound:
    """One bound: `met` is None where this run cannot tell, and `note` says why, or how it was measured."""

    name: str
    value: float | None
    limit: float
    unit: str
    met: bool | None
    note: str

    @property
    def line(self) -> str:
        """For people."""
        verdict = {True: "met", False: "MISSED", None: "not judged"}[self.met]
        value = "n/a" if self.value is None else f"{self.value:.3g}"
        return f"{verdict:10}  {self.name:8}  {value} {self.unit} (limit {self.limit:g}); {self.note}"


def judge(record: Record) -> tuple[Bound, ...]:
    """The bounds of a whole run."""
    return (latency(record), memory(record), output(record), late(record))


def latency(record: Record) -> Bound:
    """The median alone is bound: what grows with time shifts every hop and so the median, while the 99th
    percentile of a minute is at most 18 hops, on a shared machine the neighbours' doing. Late frames bound the tail.

    Where a control ran, each minute's median is taken relative to the control's, whose hops took turns with
    these: a machine that got slower or faster in between cancels. The plain ratio is shown as well.
    """
    p50, p99, control = (record.column(name)[[0, -1]] for name in ("p50_ms", "p99_ms", "control_p50_ms"))
    raw = float(p50[1] / p50[0]) - 1
    note = f"p50 {p50[0]:.3f} -> {p50[1]:.3f} ms ({100 * raw:+.1f} %), p99 {p99[0]:.3f} -> {p99[1]:.3f} ms (shown only)"
    if np.isfinite(control).all():
        speed = float(control[1] / control[0])
        value = (1 + raw) / speed - 1
        note += f"; control's p50 {control[0]:.3f} -> {control[1]:.3f} ms: the machine took {speed:.3f} times as long"
    else:
        value = raw
        note += "; no control: a busy machine shows up as our own"
    return Bound("latency", 100 * value, 100 * SLOWER, "% slower", bool(value <= SLOWER), note)


def memory(record: Record) -> Bound:
    """Growth of resident memory for each hour of audio, least squares after the warm-up."""
    slope = record.memory.slope
    value = None if slope is None else slope / 1e6
    minutes = record.memory_s / 60
    if not np.isfinite(record.column("resident_mb")).any():
        met, note = None, "this system has no /proc/self/statm"
    elif value is None or minutes < MEMORY_MINUTES:
        met, note = None, f"{minutes:.0f} min after the warm-up; at least {MEMORY_MINUTES} are needed"
    else:
        met = value < GROWTH_MB_PER_HOUR
        now = record.column("resident_mb")[-1]
        note = f"{record.memory.n} samples over {minutes:.0f} min of audio, now {now:.1f} MB"
    return Bound("memory", value, GROWTH_MB_PER_HOUR, "MB an hour", met, note)


def output(record: Record) -> Bound:
    """The first and the last minute have the same audio: mean and spread of the output must agree."""
    mean, std = (record.column(f"output_{name}_mm")[[0, -1]] for name in ("mean", "std"))
    drift = max(abs(float(pair[1] / pair[0]) - 1) if pair[0] else 0.0 for pair in (mean, std))
    note = f"{record.statistic}: mean {mean[0]:.3f} -> {mean[1]:.3f}, std {std[0]:.3f} -> {std[1]:.3f} mm"
    if record.not_finite:
        note += f"; {record.not_finite} frames were not finite"
    met = bool(drift <= DRIFT) and not record.not_finite
    return Bound("output", 100 * drift, 100 * DRIFT, "% drift", met, note)


def late(record: Record) -> Bound:
    """Frames that came more than a frame's time after they were due."""
    value = 1e4 * record.late / max(1, record.frames)
    note = f"{record.late} of {record.frames} frames"
    return Bound("late", value, LATE_PER_10000, "in 10,000 frames", value <= LATE_PER_10000, note)
