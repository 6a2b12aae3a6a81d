"""Raw samples through a pipe that cuts them anywhere."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from streamtalk import AudioError
from streamtalk.app.audio.raw import RawFormat, read_raw
from tests.runtime.toy import speech


class Dribble(io.RawIOBase):
    """A pipe that gives `n` bytes at a time."""

    def __init__(self, content: bytes, n: int) -> None:
        self._rest = content
        self._n = n

    def read(self, size: int = -1) -> bytes:
        part, self._rest = self._rest[: min(self._n, size)], self._rest[min(self._n, size) :]
        return part


@pytest.mark.parametrize("n", [1, 3, 7, 1000])
@pytest.mark.parametrize("raw_format", ["s16le", "f32le"])
def test_samples_are_joined_whatever_the_pipe_does(n: int, raw_format: RawFormat) -> None:
    pcm = speech(500)
    s16 = np.round(pcm * 32767).astype("<i2")
    content = s16.tobytes() if raw_format == "s16le" else pcm.astype("<f4").tobytes()
    pipe: Any = Dribble(content + b"\1", n)  # and a part of one, which is dropped
    got = np.concatenate(list(read_raw(pipe, raw_format, 160)))
    np.testing.assert_array_equal(got, s16 / np.float32(32768) if raw_format == "s16le" else pcm)


def test_the_first_bad_sample_is_named() -> None:
    pcm = speech(500)
    pcm[321] = np.nan
    pipe: Any = Dribble(pcm.tobytes(), 100)
    with pytest.raises(AudioError, match="stdin: sample 321 is not a number"):
        list(read_raw(pipe, "f32le", 160))
