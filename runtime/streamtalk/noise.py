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
BLOCK = 8
"""Frames whose rows are drawn together."""


class SeededNoise:
    """`noise(frame, out)` fills `out` [C] float32 with the standard normal row of `frame`."""

    def __init__(self, seed: int, width: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= MAX_SEED:
            raise UsageError(f"A seed is an integer from 0 to 2^64 - 1; got {seed!r}.")
        self._width = width
        self._philox = np.random.Philox(key=int(seed))
        self._start: Any = self._philox.state
        # Rows are drawn a block at a time: numpy's calls cost more than what they compute, most of all where a
        # frame's weights have just driven their code out of the caches.
        self._rows = np.empty((BLOCK, width), np.float32)
        # Where blocks begin: not at the same frame for all streams of a batch, whose launch would wait for every draw.
        self._offset = int(seed) % BLOCK
        self._first: int | None = None

    def __call__(self, frame: int, out: Row) -> None:
        row = (frame + self._offset) % BLOCK
        if frame - row != self._first:
            self._draw(frame - row)
        out[:] = self._rows[row]

    def _draw(self, first: int) -> None:
        """Make the rows of the block that begins with frame `first`."""
        pairs = (self._width + 1) // 2
        raw = np.zeros((BLOCK, 2 * pairs), np.uint64)
        for row in range(max(-first, 0), BLOCK):  # none before frame 0
            self._start["state"]["counter"][:] = (0, 0, 0, first + row)
            self._philox.state = self._start
            raw[row] = self._philox.random_raw(2 * pairs)
        uniform = (raw >> np.uint64(11)) * 2.0**-53  # [0, 1), all 53 bits
        radius = np.sqrt(-2.0 * np.log1p(-uniform[:, :pairs]))
        angle = (2.0 * np.pi) * uniform[:, pairs:]
        self._first = None  # while rows of two blocks lie here
        self._rows[:, :pairs] = radius * np.cos(angle)
        self._rows[:, pairs:] = (radius * np.sin(angle))[:, : self._width - pairs]
        self._first = first


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
