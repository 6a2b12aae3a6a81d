"""Record of a soak, all of it allocated before the first frame: a row of figures a minute, and five sums."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

COLUMNS = (
    "frames late p50_ms p99_ms max_ms control_p50_ms control_p99_ms resident_mb output_mean_mm output_std_mm"
).split()
STATM = Path("/proc/self/statm")


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now; None where `/proc/self/statm` does not exist."""
    try:
        return int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


class Trend:
    """Slope of a least-squares line through points that are not kept."""

    def __init__(self) -> None:
        self.n = 0
        self._t = self._y = self._tt = self._ty = 0.0
        self._origin: tuple[float, float] | None = None

    def add(self, t: float, y: float) -> None:
        """Count one point."""
        # Sums about the first point: squares of bytes since boot would eat the digits.
        t0, y0 = self._origin = self._origin or (t, y)
        t, y = t - t0, y - y0
        self.n += 1
        self._t += t
        self._y += y
        self._tt += t * t
        self._ty += t * y

    @property
    def slope(self) -> float | None:
        """Rise of y for each unit of t; None below two different t."""
        spread = self.n * self._tt - self._t**2
        return (self.n * self._ty - self._t * self._y) / spread if spread > 0 else None


class Spread:
    """Mean and standard deviation of a minute's values, without the values."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.n = 0
        self._mean = self._square = 0.0

    def add(self, value: float) -> None:
        """Count one value (Welford's update)."""
        self.n += 1
        step = value - self._mean
        self._mean += step / self.n
        self._square += step * (value - self._mean)

    @property
    def mean(self) -> float:
        return self._mean if self.n else float("nan")

    @property
    def std(self) -> float:
        return float((self._square / self.n) ** 0.5) if self.n else float("nan")


class Record:
    """The figures of a soak of `minutes` minutes. `memory` is in bytes over hours of audio."""

    def __init__(self, minutes: int) -> None:
        self.rows: npt.NDArray[np.float64] = np.full((minutes, len(COLUMNS)), np.nan)
        self.memory = Trend()
        self.memory_s = 0.0
        """Seconds of audio that `memory` spans."""
        self.not_finite = 0
        self.statistic = ""
        """Name of the quantity of `output_*`."""

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """One figure over the minutes [minutes]: a view."""
        return self.rows[:, COLUMNS.index(name)]

    @property
    def frames(self) -> int:
        return int(np.nansum(self.column("frames")))

    @property
    def late(self) -> int:
        return int(np.nansum(self.column("late")))
