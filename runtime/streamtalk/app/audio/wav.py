"""WAV, read forwards in blocks: integer PCM, IEEE float and WAVE_FORMAT_EXTENSIBLE.

The standard library's `wave` knows neither float nor, before Python 3.12, extensible headers, which is what
recorders write for more than 16 bits. Nothing is sought, so a pipe will do, and a header whose sizes a
recorder never filled in is read to the end of the file.

Layout: https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/WAVE/WAVE.html
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from streamtalk.errors import AudioError

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)
MAX_CHANNELS = 256
Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WavFormat:
    """The sample format of a WAV file. `data_bytes` is None where the header does not know the length."""

    rate: int
    channels: int
    bits: int
    is_float: bool
    data_bytes: int | None

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample of all channels."""
        return self.channels * self.bits // 8


def read_format(file: BinaryIO, name: str) -> WavFormat | None:
    """Read up to the first sample. None if this is no WAV of a kind that is read here; then try another
    reader. Raises AudioError for a WAV that is broken.
    """
    riff = file.read(12)
    if len(riff) < 12 or riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        return None
    fields: tuple[int, int, int, int] | None = None
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise AudioError(f"{name} is a WAV file without samples: it ends inside its header.")
        kind, size = head[:4], struct.unpack("<I", head[4:])[0]
        if kind == b"data":
            break
        body = _skip(file, size + size % 2, keep=40 if kind == b"fmt " else 0)
        if kind == b"fmt ":
            fields = _format_fields(body, name)
    if fields is None:
        raise AudioError(f"{name} is a WAV file without a format chunk.")
    code, channels, rate, bits = fields
    if (code, bits) not in [(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)]:
        return None
    if not 1 <= channels <= MAX_CHANNELS or rate < 1:
        raise AudioError(f"{name} claims {channels} channels at {rate} Hz; its header is broken.")
    return WavFormat(rate, channels, bits, code == FLOAT, None if size in UNKNOWN_SIZES else size)


def read_samples(file: BinaryIO, wav: WavFormat, block_samples: int) -> Iterator[Samples]:
    """Blocks [n, channels] of at most `block_samples`, full scale 1.0, from a file that `read_format` has
    read.

    Ends early where the file is shorter than its header says; a part of a sample at the end is dropped.
    """
    left = wav.data_bytes
    while True:
        want = block_samples * wav.frame_bytes
        raw = _read(file, want if left is None else min(want, left))
        whole = len(raw) - len(raw) % wav.frame_bytes
        if whole:
            yield decode(raw[:whole], wav.bits, wav.is_float).reshape(-1, wav.channels)
        if left is not None:
            left -= len(raw)
        if len(raw) < want:
            return


def decode(raw: bytes, bits: int, is_float: bool) -> Samples:
    """Little-endian samples as float32, full scale 1.0. 8-bit WAV is unsigned, as ever."""
    values: npt.NDArray[Any]
    if is_float:
        with np.errstate(over="ignore"):  # found later, as infinite
            return np.frombuffer(raw, f"<f{bits // 8}").astype(np.float32)
    if bits == 8:
        values = np.frombuffer(raw, np.uint8).astype(np.float32) - 128
    elif bits == 24:
        # Into the upper three bytes of an int32, so that the sign comes for free.
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        values, bits = wide.view("<i4")[:, 0], 32
    else:
        values = np.frombuffer(raw, f"<i{bits // 8}")
    samples: Samples = values.astype(np.float32)
    samples /= 2 ** (bits - 1)
    return samples


def _format_fields(body: bytes, name: str) -> tuple[int, int, int, int]:
    """Format code, channels, rate and bits of a `fmt ` chunk."""
    if len(body) < 16:
        raise AudioError(f"{name} is a WAV file with a format chunk that is too short.")
    code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
    if code == EXTENSIBLE and len(body) >= 26:
        code = struct.unpack("<H", body[24:26])[0]  # the first field of the SubFormat GUID
    return code, channels, rate, bits


def _skip(file: BinaryIO, n: int, keep: int) -> bytes:
    """Read over `n` bytes without holding them all; return the first `keep`."""
    kept = _read(file, min(n, keep))
    n -= len(kept)
    while n > 0 and (block := file.read(min(n, 1 << 16))):
        n -= len(block)
    return kept


def _read(file: BinaryIO, n: int) -> bytes:
    """`n` bytes, or fewer at the end: a pipe may give less at a time."""
    parts = []
    while n > 0 and (part := file.read(n)):
        parts.append(part)
        n -= len(part)
    return b"".join(parts)
