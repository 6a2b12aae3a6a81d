"""The status line on stderr."""

from __future__ import annotations

import sys
from time import monotonic

from streamtalk.app.progress import say
from streamtalk.app.run import Run

EVERY_S = 0.25


class StatusLine:
    """One line that is rewritten on a terminal, and printed once at the end elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr is not None and sys.stderr.isatty()
        self._next_s = 0.0
        self._width = 0

    def __call__(self, run: Run) -> None:
        """Show the state of a run, a few times a second."""
        now = monotonic()
        if self._live and now >= self._next_s:
            self._next_s = now + EVERY_S
            say("\r" + self._text(run), end="")

    def finish(self, run: Run) -> None:
        """Leave the last state on a line of its own."""
        if run.stream.stats().frames:
            say(("\r" if self._live else "") + self._text(run))

    def _text(self, run: Run) -> str:
        stats = run.stream.stats()
        latency = stats.latency_ms
        text = (
            f"{stats.samples / run.sample_rate:7.1f} s  {stats.frames} frames  latency p50 {latency.p50:.1f} "
            f"p99 {latency.p99:.1f} ms  late {run.late}  level {run.level_dbfs:.0f} dBFS"
        )
        self._width = max(self._width, len(text))
        return text.ljust(self._width) if self._live else text.strip()
