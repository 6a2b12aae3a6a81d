"""The audio of one stream by absolute sample number, in a buffer that does not grow with the stream."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]


class Timeline:
    """Samples `[start, end)` of a stream, float32; whatever lies before `start` was used and dropped.

    A linear buffer rather than a ring: a window is one contiguous slice, and dropping moves an index. When
    the end is reached the rest moves to the front, at most once per `capacity` appended samples. The buffer
    outgrows `capacity` only for a push that is longer, and shrinks back once that push was read.
    """

    def __init__(self, capacity: int, start: int = 0) -> None:
        self._capacity = capacity
        self._buffer: Samples = np.zeros(capacity, np.float32)
        self._head = 0
        self.start = start
        self.end = start

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._buffer.nbytes

    def append(self, samples: Samples) -> None:
        """Copy `samples` [n] onto the end."""
        self._reserve(samples.size)[:] = samples

    def append_silence(self, n: int) -> None:
        """Add `n` samples of silence to the end."""
        self._reserve(n)[:] = 0

    def window(self, start: int, n: int) -> Samples:
        """The samples `[start, start + n)`: a view that is valid until the next call of any other method."""
        first = self._head + start - self.start
        return self._buffer[first : first + n]

    def drop_before(self, sample: int) -> None:
        """Forget everything before `sample`, which may lie beyond the end."""
        dropped = min(max(sample - self.start, 0), self.end - self.start)
        self._head += dropped
        self.start += dropped
        if self._buffer.size > self._capacity and 2 * (self.end - self.start) <= self._capacity:
            self._move(np.empty(self._capacity, np.float32))

    def copy(self) -> Timeline:
        """An independent timeline with the same content."""
        twin = Timeline(self._capacity, self.start)
        twin.append(self.window(self.start, self.end - self.start))
        return twin

    def _reserve(self, n: int) -> Samples:
        """Extend the end by `n` samples and return that part of the buffer, to be filled."""
        used = self.end - self.start
        if self._head + used + n > self._buffer.size:
            if used + n <= self._buffer.size // 2:
                self._move(self._buffer)
            else:  # doubling keeps a stream of small, unread pushes linear in cost
                size = max(2 * self._buffer.size, used + n + self._capacity)
                self._move(np.empty(size, np.float32))
        self.end += n
        tail = self._head + used
        return self._buffer[tail : tail + n]

    def _move(self, target: Samples) -> None:
        used = self.end - self.start
        target[:used] = self._buffer[self._head : self._head + used]  # numpy copes with the overlap
        self._buffer = target
        self._head = 0
