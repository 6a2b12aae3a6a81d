"""Audio time in whole samples: which samples a frame belongs to, waits for and is counted by.

Integers throughout, so that frame 10^9 is as exact as frame 1 and nothing can drift.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """The fixed relation between audio samples and animation frames.

    `rate` is in samples a second, `fps` in frames a second; neither need divide the other. A hop is the run
    of `hop` frames that one window of `window_samples` serves; `context_samples` of that window lie before
    the hop's first frame.
    """

    rate: int
    fps: int
    hop: int
    window_samples: int
    context_samples: int

    def sample_of(self, frame: int) -> int:
        """The sample that `frame` belongs to: round(frame * rate / fps), halves up, in exact integers."""
        return (2 * frame * self.rate + self.fps) // (2 * self.fps)

    def window_start(self, first_frame: int) -> int:
        """First sample of the window for the hop that begins with `first_frame`; negative means silence."""
        return self.sample_of(first_frame) - self.context_samples

    def frames_in(self, n_samples: int) -> int:
        """How many whole frames `n_samples` of audio yield."""
        return n_samples * self.fps // self.rate

    def frames_ready(self, n_samples: int) -> int:
        """How many frames `n_samples` allow while more audio may come: whole ones, in hops whose window is
        full.
        """
        # The last frame that could begin a hop: the largest f with sample_of(f) <= newest, solved for f.
        newest = n_samples - self.window_samples + self.context_samples
        last_start = (self.fps * (2 * newest + 1) - 1) // (2 * self.rate)
        return min(self.frames_in(n_samples), max(0, last_start // self.hop + 1) * self.hop)

    @property
    def delay_s(self) -> float:
        """Seconds of audio that a hop's first frame waits for, counted from its own time."""
        return (self.window_samples - self.context_samples) / self.rate
