"""Audio of a soak: recorded speech cut, paused and turned up and down, another minute each minute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamtalk import StreamTalkError
from streamtalk.app.audio.files import read_mono

Samples = npt.NDArray[np.float32]

MINUTE_S = 60
PHRASE_S = (0.6, 5.0)
PAUSE_S = (0.05, 2.5)
GAIN_DB = (-24.0, 3.0)
ROOM_DBFS = (-80.0, -50.0)
FADE_S = 0.01
"""A cut without it clicks, which no microphone hears between two sentences."""


def read_speech(path: Path, rate: int) -> Samples:
    """A recording [n] at `rate`. Raises AudioError, and StreamTalkError where it is too short to cut."""
    speech = np.concatenate(list(read_mono(path, rate, 1.0)))
    if len(speech) <= PHRASE_S[1] * rate:
        raise StreamTalkError(
            f"{path} lasts {len(speech) / rate:.1f} s; a soak cuts phrases of up to {PHRASE_S[1]:g} s."
        )
    return speech


class Programme:
    """One minute of audio at a time, in a buffer that is filled anew: memory stays what it is at the start.

    A minute is drawn from `(seed, key)`: phrases of the recording from anywhere in it, each at a level of its
    own, with pauses of room noise between them. Equal keys give equal minutes.
    """

    def __init__(self, speech: Samples, rate: int, seed: int = 0) -> None:
        self._speech = speech
        self._rate = rate
        self._seed = seed
        self.minute: Samples = np.zeros(MINUTE_S * rate, np.float32)
        fade = max(1, round(FADE_S * rate))
        self._rise = np.linspace(0, 1, fade, dtype=np.float32)

    def fill(self, key: int) -> None:
        """Draw the minute `key` into `minute`."""
        rng = np.random.default_rng([self._seed, key])
        out, speech, rate = self.minute, self._speech, self._rate
        rng.standard_normal(out=out, dtype=np.float32)
        out *= 10 ** (rng.uniform(*ROOM_DBFS) / 20)
        position = 0
        while position < len(out):
            wanted = round(rng.uniform(*PHRASE_S) * rate)
            start = int(rng.integers(len(speech) - wanted))
            length = min(wanted, len(out) - position)
            phrase = speech[start : start + length] * np.float32(10 ** (rng.uniform(*GAIN_DB) / 20))
            edge = min(len(self._rise), length)
            phrase[:edge] *= self._rise[:edge]
            phrase[-edge:] *= self._rise[:edge][::-1]
            out[position : position + length] += phrase
            position += wanted + round(rng.uniform(*PAUSE_S) * rate)
        np.clip(out, -1, 1, out=out)
