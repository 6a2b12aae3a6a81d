"""Sound files in blocks: WAV by ourselves, everything else through PyAV where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from streamtalk.app.audio import wav
from streamtalk.app.audio.resample import Resampler
from streamtalk.audio_window import require_sound
from streamtalk.errors import AudioError, MissingDependencyError

Samples = npt.NDArray[np.float32]


def read_mono(path: Path, rate: int, block_s: float) -> Iterator[Samples]:
    """A file as mono [n] float32 at `rate`, in blocks of about `block_s` seconds: memory stays flat.

    Raises AudioError (missing, unreadable, not a number) and MissingDependencyError, the first ones at the
    call.
    """
    blocks, file_rate = _open(path, block_s)
    return _resampled(blocks, Resampler(file_rate, rate), path)


def _resampled(blocks: Iterator[Samples], resampler: Resampler, path: Path) -> Iterator[Samples]:
    position = 0
    for block in blocks:
        # Before the filter, which would spread one bad sample over many.
        require_sound(block.reshape(-1), str(path), position)
        position += block.size
        yield resampler.push(block)
    yield resampler.finish()


def _open(path: Path, block_s: float) -> tuple[Iterator[Samples], int]:
    """Blocks [n, channels] and their rate."""
    if path.is_dir():
        raise AudioError(f"{path} is a folder; expected a sound file.")
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise AudioError(f"There is no sound file {path}.") from error
    except OSError as error:
        raise AudioError(f"{path} cannot be read: {error.strerror}.") from error
    with ExitStack() as stack:
        stack.enter_context(file)
        if path.is_file() and path.stat().st_size == 0:
            raise AudioError(f"{path} is empty (0 bytes); expected a sound file.")
        found = wav.read_format(file, str(path))
        if found is not None:
            return _wav_blocks(stack.pop_all(), file, found, block_s), found.rate
    if not path.is_file():
        raise AudioError(f"{path} is not a file: what a pipe brings must be WAV.")
    return _decoded(path, block_s)


def _wav_blocks(stack: ExitStack, file: BinaryIO, found: wav.WavFormat, block_s: float) -> Iterator[Samples]:
    with stack:
        yield from wav.read_samples(file, found, max(1, round(found.rate * block_s)))


def _decoded(path: Path, block_s: float) -> tuple[Iterator[Samples], int]:
    """What PyAV makes of a file that is no plain WAV: the first sound track."""
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is no plain WAV file, and other formats need PyAV: pip install 'streamtalk[viewer]'."
        ) from error
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise AudioError(f"{path} is not a sound file that can be read ({_reason(error)}).") from error
    if not container.streams.audio:
        container.close()
        raise AudioError(f"{path} has no sound track.")
    rate = container.streams.audio[0].rate
    return _av_blocks(av, container, path, max(1, round(rate * block_s))), rate


def _av_blocks(av: Any, container: Any, path: Path, block_samples: int) -> Iterator[Samples]:
    with container:
        track = container.streams.audio[0]
        # Packed floats whatever the codec gives; rate and layout stay, and cut into blocks for pacing.
        convert = av.AudioResampler(
            format="flt", layout=track.layout, rate=track.rate, frame_size=block_samples
        )
        try:
            for frame in container.decode(track):
                for part in convert.resample(frame):
                    yield _packed(part)
        except av.error.FFmpegError as error:
            raise AudioError(f"{path} breaks off: {_reason(error)}.") from error
        for part in convert.resample(None):
            yield _packed(part)


def _packed(frame: Any) -> Samples:
    channels = len(frame.layout.channels)
    return np.asarray(frame.to_ndarray(), np.float32).reshape(-1, channels)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
