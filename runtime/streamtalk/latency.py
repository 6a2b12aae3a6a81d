"""Latency percentiles in fixed memory, for runs of seconds or years."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import numpy as np

BIN_RATIO = 1.01
FLOOR_MS = 1e-3
CEILING_MS = 1e6
_SPAN = math.log(BIN_RATIO)
_BINS = math.ceil(math.log(CEILING_MS / FLOOR_MS) / _SPAN) + 1


@dataclass(frozen=True)
class Latency:
    """Milliseconds. `max` and `mean` are exact; percentiles are within .5 % (or 1 us). All 0 for no
    samples.
    """

    p50: float
    p95: float
    p99: float
    max: float
    mean: float


class LatencyHistogram:
    """Counts in logarithmic bins 1 % wide, from 1 us to 1000 s: 17 KiB whatever the run's length."""

    def __init__(self) -> None:
        self._counts = array("q", bytes(8 * _BINS))  # an item of it costs less than an item of a numpy array
        self._max_ms = 0.0
        self._sum_ms = 0.0
        self.n = 0

    def add(self, milliseconds: float) -> None:
        """Count one latency."""
        clamped = min(max(milliseconds, FLOOR_MS), CEILING_MS)
        self._counts[int(math.log(clamped / FLOOR_MS) / _SPAN)] += 1
        self._max_ms = max(self._max_ms, milliseconds)
        self._sum_ms += milliseconds
        self.n += 1

    def clear(self) -> None:
        """Forget everything."""
        self._counts = array("q", bytes(8 * _BINS))
        self._max_ms = self._sum_ms = 0.0
        self.n = 0

    @property
    def total_ms(self) -> float:
        """Sum of all latencies, exact."""
        return self._sum_ms

    def summary(self) -> Latency:
        """Percentiles by the nearest-rank rule, each the geometric middle of its bin."""
        if self.n == 0:
            return Latency(0.0, 0.0, 0.0, 0.0, 0.0)
        p50, p95, p99 = (self._percentile(q) for q in (0.50, 0.95, 0.99))
        return Latency(p50, p95, p99, self._max_ms, self._sum_ms / self.n)

    def _percentile(self, q: float) -> float:
        rank = max(1, math.ceil(q * self.n))
        index = int(np.searchsorted(np.cumsum(self._counts), rank))
        middle: float = FLOOR_MS * BIN_RATIO ** (index + 0.5)
        return min(middle, self._max_ms)
