"""The noise that drives the diffusion head: a function of (seed, frame) and of nothing else.

Philox is a counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011):
the seed is its key, the frame the highest word of its counter. Any frame's row can be drawn at any time,
whatever the chunking and whatever other streams do. The normal deviates are made here, by Box and Muller,
and not by `numpy.random.Generator`, whose streams may change between numpy versions (NEP 19); raw Philox
may not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.errors import UsageError

Row = npt.NDArray[np.float32]
NoiseFn = Callable[[int], npt.NDArray[Any]]
MAX_SEED = 2**64 - 1


class SeededNoise:
    """`noise(frame, out)` fills `out` [C] float32 with the standard normal row of `frame`."""

    def __init__(self, seed: int, width: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= MAX_SEED:
            raise UsageError(f"A seed is an integer from 0 to 2^64 - 1; got {seed!r}.")
        self._pairs = (width + 1) // 2
        self._philox = np.random.Philox(key=int(seed))
        self._start: Any = self._philox.state

    def __call__(self, frame: int, out: Row) -> None:
        self._start["state"]["counter"][:] = (0, 0, 0, frame)
        self._philox.state = self._start
        raw = self._philox.random_raw(2 * self._pairs)
        uniform = (raw >> np.uint64(11)) * 2.0**-53  # [0, 1), all 53 bits
        radius = np.sqrt(-2.0 * np.log1p(-uniform[: self._pairs]))
        angle = (2.0 * np.pi) * uniform[self._pairs :]
        out[: self._pairs] = radius * np.cos(angle)
        out[self._pairs :] = (radius * np.sin(angle))[: out.size - self._pairs]


class GivenNoise:
    """Noise from the caller: rows of an array [L, C], or whatever `callable(frame)` returns, each [C]."""

    def __init__(self, source: npt.ArrayLike | NoiseFn, width: int) -> None:
        self._width = width
        if callable(source):
            self._rows: NoiseFn = source
            return
        try:
            table = np.asarray(source, np.float32)
        except (ValueError, TypeError) as error:
            raise UsageError(f"`noise` must be [frames, {width}] numbers or a callable ({error}).") from error
        if table.ndim != 2 or table.shape[1] != width:
            raise UsageError(
                f"`noise` must be [frames, {width}] or a callable; got shape {list(table.shape)}."
            )
        self._rows = _rows_of(table.copy())

    def __call__(self, frame: int, out: Row) -> None:
        row = np.asarray(self._rows(frame), np.float32)
        if row.shape != (self._width,) or not np.isfinite(row).all():
            raise UsageError(
                f"The noise of frame {frame} must be {self._width} finite numbers; "
                f"got shape {list(row.shape)}."
            )
        out[:] = row


def _rows_of(table: Row) -> NoiseFn:
    def row(frame: int) -> Row:
        if frame >= len(table):
            raise UsageError(
                f"`noise` has {len(table)} rows and frame {frame} needs another; pass more, or a callable."
            )
        return np.asarray(table[frame])

    return row
