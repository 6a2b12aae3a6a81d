"""The WAV files that speech engines write."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def read_wave(path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples [n] in -1..1 of a mono file of 16 bits, and their rate in Hz."""
    with wave.open(str(path)) as file:
        stored = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return (stored / 32768).astype(np.float32), file.getframerate()
