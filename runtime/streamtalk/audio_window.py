"""Audio of one stream: which samples a frame needs, the samples that are kept, and what is accepted as audio.

Audio time is in whole samples, so that frame 10^9 is as exact as frame 1 and nothing can drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.errors import AudioError

LOUDEST = 2.0**15
"""Samples beyond this are refused. 16-bit samples that nobody scaled still pass; what overflows in a model does not."""
FLOAT32 = np.dtype(np.float32)
Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clock:
    """The fixed relation between audio samples and animation frames.

    `rate` is in samples a second, `fps` in frames a second; neither need divide the other. A hop is `hop` frames
    that one window of audio serves. `context_samples` of that window lie before the hop's first frame,
    `lookahead_samples` after its last.
    """

    rate: int
    fps: int
    hop: int
    context_samples: int
    lookahead_samples: int

    @cached_property
    def window_samples(self) -> int:
        """Length of a window."""
        last_frame = -(-(self.hop - 1) * self.rate // self.fps)
        return self.context_samples + last_frame + self.lookahead_samples

    def sample_of(self, frame: int) -> int:
        """Sample that `frame` belongs to: round(frame * rate / fps), halves up, in exact integers."""
        return (2 * frame * self.rate + self.fps) // (2 * self.fps)

    def window_start(self, first_frame: int) -> int:
        """First sample of the window for the hop that begins with `first_frame`; negative means silence."""
        return self.sample_of(first_frame) - self.context_samples

    def frames_in(self, n_samples: int) -> int:
        """Number of whole frames that `n_samples` of audio yield."""
        return n_samples * self.fps // self.rate

    def frames_ready(self, n_samples: int) -> int:
        """Number of frames that `n_samples` allow while more audio may come: whole hops whose window is full."""
        # The last frame that could begin a hop: the largest f with sample_of(f) <= newest, solved for f.
        newest = n_samples - self.window_samples + self.context_samples
        last_start = (self.fps * (2 * newest + 1) - 1) // (2 * self.rate)
        return self.hop * max(0, min(last_start // self.hop + 1, self.frames_in(n_samples) // self.hop))

    @cached_property
    def delay_samples(self) -> int:
        """Samples that a hop's first frame waits for, counted from its own: its window, and its hop."""
        return max(self.window_samples - self.context_samples, -(-self.hop * self.rate // self.fps))

    @property
    def delay_s(self) -> float:
        """Seconds of audio that a hop's first frame waits for, counted from its own time."""
        return self.delay_samples / self.rate


class Timeline:
    """Samples `[start, end)` of a stream, float32; whatever lies before `start` was used and dropped.

    A linear buffer rather than a ring: a window is one contiguous slice, and dropping moves an index. When
    the end is reached the rest moves to the front, at most once per `capacity` appended samples. The buffer
    outgrows `capacity` only for a push that is longer, and shrinks back once that push was read.

    Each method changes what others see by one store, its last, so that an interrupt leaves no half of it.
    """

    def __init__(self, capacity: int, start: int = 0) -> None:
        self._capacity = capacity
        # Samples, and which of the stream is the first: they change together.
        self._held: tuple[Samples, int] = np.zeros(capacity, np.float32), start
        self.start = start
        self.end = start

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._held[0].nbytes

    def append(self, samples: Samples) -> None:
        """Copy `samples` [n] onto the end."""
        self._reserve(samples.size)
        self.window(self.end, samples.size)[:] = samples
        self.end += samples.size

    def window(self, start: int, n: int) -> Samples:
        """The samples `[start, start + n)`: a view that is valid until the next call of any other method."""
        buffer, origin = self._held
        return buffer[start - origin : start - origin + n]

    def drop_before(self, sample: int) -> None:
        """Forget everything before `sample`, which may lie beyond the end."""
        self.start = min(max(sample, self.start), self.end)
        if self._held[0].size > self._capacity and 2 * (self.end - self.start) <= self._capacity:
            self._move(np.empty(self._capacity, np.float32))

    def _reserve(self, n: int) -> None:
        """Make room for `n` samples after the end."""
        buffer, origin = self._held
        if self.end - origin + n <= buffer.size:
            return
        used = self.end - self.start
        if used + n <= buffer.size // 2:
            self._move(buffer)  # from its second half to its first: the two do not overlap
        else:  # doubling keeps a stream of small, unread pushes linear in cost
            self._move(np.empty(max(2 * buffer.size, used + n + self._capacity), np.float32))

    def _move(self, target: Samples) -> None:
        kept = self.window(self.start, self.end - self.start)
        target[: kept.size] = kept
        self._held = target, self.start


def accepted(pcm: npt.ArrayLike, rate: int) -> Samples:
    """`pcm` as finite mono float32 [n], full scale 1.0; float64 is cast. Raises AudioError."""
    # What callers mostly bring comes first: this runs for every frame, just after a model has emptied the caches.
    if isinstance(pcm, np.ndarray) and pcm.dtype == FLOAT32 and pcm.ndim == 1:
        samples: Samples = pcm
    else:
        samples = _converted(pcm, rate)
    require_sound(samples)
    return samples


def _converted(pcm: npt.ArrayLike, rate: int) -> Samples:
    wanted = f"Expected float32 (or float64) mono samples [n] at {rate} Hz, full scale 1.0"
    try:
        array: npt.NDArray[Any] = np.asarray(pcm)
    except ValueError as error:
        raise AudioError(f"{wanted}; got something that is no array ({error}).") from error
    if array.dtype.kind == "i":
        full_scale = 2.0 ** (8 * array.dtype.itemsize - 1)
        raise AudioError(f"{wanted}; got {array.dtype}. Convert: `pcm.astype(numpy.float32) / {full_scale}`.")
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise AudioError(f"{wanted}; got {array.dtype}.")
    if array.ndim != 1:
        raise AudioError(f"{wanted}; got shape {list(array.shape)}. Average the channels and flatten.")
    with np.errstate(over="ignore"):  # reported by the caller, as infinite
        return array.astype(np.float32, copy=False)


def require_sound(samples: npt.NDArray[Any], source: str = "Audio", offset: int = 0) -> None:
    """Raise AudioError naming the first sample that is no number or beyond all reason.

    `samples[0]` is sample `offset` of the `source`. One NaN would stay in a stream's state for good.
    """
    if not samples.size or (
        np.maximum.reduce(samples) <= LOUDEST and np.minimum.reduce(samples) >= -LOUDEST  # false for NaN
    ):
        return
    first = int(np.argmin(np.abs(samples) <= LOUDEST))
    value = samples[first]
    what = "not a number" if np.isnan(value) else "infinite" if np.isinf(value) else f"{value:.3g}"
    raise AudioError(
        f"{source}: sample {offset + first} is {what}; expected finite samples, full scale 1.0. Check the source."
    )
