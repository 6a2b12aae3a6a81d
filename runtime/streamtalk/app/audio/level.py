"""How loud the input is, and whether it clips."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

QUIETEST_DBFS = -120.0
FULL_SCALE = 0.999
CLIPPED_SHARE = 0.001


class LevelMeter:
    """Running level of the samples [n] that pass, full scale 1.0."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._power = 0.0
        self._total = 0.0
        self._samples = 0
        self._clipped = 0

    def add(self, samples: npt.NDArray[np.float32]) -> None:
        """Count samples; the recent level forgets with a time constant of .3 s."""
        if samples.size == 0:
            return
        energy = float(np.square(samples, dtype=np.float64).sum())
        keep = math.exp(-samples.size / (0.3 * self._rate))
        self._power = keep * self._power + (1 - keep) * energy / samples.size
        self._total += energy
        self._samples += samples.size
        self._clipped += int(np.count_nonzero(np.abs(samples) >= FULL_SCALE))

    @property
    def recent_dbfs(self) -> float:
        """RMS of the last instants in dB below full scale, at least -120."""
        return _dbfs(self._power)

    @property
    def mean_dbfs(self) -> float:
        """RMS of everything so far in dB below full scale, at least -120."""
        return _dbfs(self._total / max(self._samples, 1))

    @property
    def clipped_share(self) -> float:
        """Share of the samples at full scale."""
        return self._clipped / max(self._samples, 1)

    @property
    def clips(self) -> bool:
        """Whether so much is clipped that the input gain must be too high."""
        return self.clipped_share > CLIPPED_SHARE


def _dbfs(power: float) -> float:
    return max(QUIETEST_DBFS, 10 * math.log10(max(power, 1e-30)))
