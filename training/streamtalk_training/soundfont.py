"""Single notes of real instruments from a SoundFont 2 file (Debian: `timgm6mb-soundfont`), for background music.

Only the sample headers (`shdr`) and the samples (`smpl`) are read; of the format's presets and envelopes nothing
is needed to make a mouth stay shut.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("<20sIIIIIBbHH")
_SUNG = ("doo", "aahs", "vox", "choir")  # voices: a mouth might well open to them
_LEAST_SAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """`sound` float32 [n] in -1..1 at `sample_rate` Hz; `loop` (start, end) in samples, None to play once."""

    name: str
    sound: NDArray[np.float32]
    sample_rate: int
    loop: tuple[int, int] | None


@cache
def samples(path: Path) -> tuple[Sample, ...]:
    """All instruments of a file, by file order. Raises ValueError for a file without samples."""
    content = path.read_bytes()
    smpl, shdr = content.find(b"smpl"), content.find(b"shdr")
    if content[:4] != b"RIFF" or min(smpl, shdr) < 0:
        raise ValueError(f"{path} is no SoundFont 2 file: expected RIFF with smpl and shdr chunks")
    size = int.from_bytes(content[smpl + 4 : smpl + 8], "little")
    stored = np.frombuffer(content, "<i2", size // 2, smpl + 8)
    rows = int.from_bytes(content[shdr + 4 : shdr + 8], "little") // _HEADER.size
    found = []
    for row in range(rows):
        raw, start, end, loop_start, loop_end, rate, *_ = _HEADER.unpack_from(
            content, shdr + 8 + row * _HEADER.size
        )
        name = raw.partition(b"\0")[0].decode("latin1")
        if end - start < _LEAST_SAMPLES or any(word in name.lower() for word in _SUNG):
            continue
        loop = (loop_start - start, loop_end - start)
        looped = 8 <= loop[1] - loop[0] < 0.95 * (end - start) and loop[1] <= end - start
        sound = (stored[start:end] / 32768).astype(np.float32)
        found.append(Sample(name, sound, rate, loop if looped else None))
    return tuple(found)


def note(sample: Sample, samples_out: int, sample_rate: int, transpose: float) -> NDArray[np.float64]:
    """`sample` played for `samples_out` samples at `sample_rate`, `transpose` times its own pitch."""
    position = np.arange(samples_out) * (transpose * sample.sample_rate / sample_rate)
    last = len(sample.sound) - 1
    if sample.loop is None:
        return np.interp(position, np.arange(last + 1), sample.sound, right=0.0)
    start, end = sample.loop
    position = np.where(position < end, position, start + (position - start) % (end - start))
    return np.interp(position, np.arange(last + 1), sample.sound)
