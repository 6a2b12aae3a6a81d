"""Raw mono samples from a pipe, such as stdin: no header, the model's rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from streamtalk.app.audio.wav import decode
from streamtalk.audio_window import require_sound

RawFormat = Literal["s16le", "f32le"]
FORMATS: dict[str, tuple[int, bool]] = {"s16le": (16, False), "f32le": (32, True)}


def read_raw(file: BinaryIO, raw_format: RawFormat, block_samples: int) -> Iterator[npt.NDArray[np.float32]]:
    """Blocks [n] of what has arrived, at most `block_samples` each, without waiting for a block to fill.

    `file` is unbuffered or has `read1`. A sample cut in two by the pipe is joined, one cut off by its end is
    dropped. Raises AudioError for samples that are not finite.
    """
    bits, is_float = FORMATS[raw_format]
    sample_bytes = bits // 8
    read = getattr(file, "read1", file.read)
    rest = b""
    position = 0
    while chunk := read(block_samples * sample_bytes):
        rest += chunk
        whole = len(rest) - len(rest) % sample_bytes
        samples = decode(rest[:whole], bits, is_float)
        rest = rest[whole:]
        require_sound(samples, "stdin", position)
        position += samples.size
        yield samples
