"""Sound files of many kinds, against samples that are known."""

from __future__ import annotations

import os
import struct
import threading
import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soxr

from streamtalk import AudioError
from streamtalk.app.audio.files import read_mono
from streamtalk.app.audio.resample import Resampler
from tests.runtime.toy import speech

Array = npt.NDArray[Any]
SIXTEEN_BITS = 1 / 32000


def read(path: Path, block_s: float = 0.05) -> Array:
    return np.concatenate([np.zeros(0, np.float32), *read_mono(path, 16000, block_s)])


def chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def wav(code: int, channels: int, rate: int, bits: int, data: bytes, extensible: bool = False) -> bytes:
    frame = channels * bits // 8
    fmt = struct.pack(
        "<HHIIHH", 0xFFFE if extensible else code, channels, rate, rate * frame % 2**32, frame, bits
    )
    if extensible:
        guid = struct.pack("<H", code) + bytes.fromhex("000000001000800000aa00389b71")
        fmt += struct.pack("<HHI", 22, bits, 0) + guid
    odd = chunk(b"LIST", b"odd")  # its padding must be skipped too
    body = b"WAVE" + odd + chunk(b"fmt ", fmt) + odd + chunk(b"data", data) + odd
    return b"RIFF" + struct.pack("<I", len(body)) + body


def encoded(pcm: Array, kind: str) -> tuple[int, int, bytes]:
    if kind == "u8":
        return 1, 8, (np.round(pcm * 128) + 128).clip(0, 255).astype(np.uint8).tobytes()
    if kind == "s24":
        return 1, 24, np.round(pcm * 2**23).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    if kind.startswith("f"):
        return 3, 8 * int(kind[1:]), pcm.astype(f"<f{kind[1:]}").tobytes()
    bits = int(kind[1:])
    return 1, bits, np.round(pcm.astype(float) * 2 ** (bits - 1)).astype(f"<i{bits // 8}").tobytes()


KINDS = {"u8": 1 / 200, "s16": SIXTEEN_BITS, "s24": 1e-6, "s32": 1e-6, "f4": 0, "f8": 0}


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(("kind", "tolerance"), KINDS.items())
def test_every_kind_of_wav(tmp_path: Path, kind: str, tolerance: float, extensible: bool) -> None:
    pcm = speech(5001)
    code, bits, data = encoded(pcm, kind)
    file = tmp_path / "a.wav"
    file.write_bytes(wav(code, 1, 16000, bits, data, extensible))
    np.testing.assert_allclose(read(file), pcm, rtol=0, atol=tolerance)


def test_python_and_we_agree(tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    samples = (speech(3000) * 32767).astype("<i2")
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(samples.tobytes())
    np.testing.assert_array_equal(read(file), samples / np.float32(32768))


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = speech(2000, 1), speech(2000, 2)
    file = tmp_path / "a.wav"
    file.write_bytes(wav(3, 2, 16000, 32, np.stack([left, right], 1).tobytes()))
    np.testing.assert_allclose(read(file), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_length_that_nobody_filled_in(tmp_path: Path, size: int) -> None:
    pcm = speech(2000)
    content = bytearray(wav(3, 1, 16000, 32, pcm.tobytes()))
    content = content[: content.rindex(b"LIST")]
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", size)
    file = tmp_path / "a.wav"
    file.write_bytes(content)
    np.testing.assert_array_equal(read(file), pcm)


def test_a_file_that_was_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    pcm = speech(2000)
    file = tmp_path / "a.wav"
    content = wav(3, 1, 16000, 32, pcm.tobytes())
    file.write_bytes(content[: content.index(b"data") + 8 + 4 * 1000 + 3])
    np.testing.assert_array_equal(read(file), pcm[:1000])


def test_what_follows_the_samples_is_not_sound(tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    file.write_bytes(wav(3, 1, 16000, 32, speech(100).tobytes()))
    assert len(read(file, 0.001)) == 100


def test_a_pipe_will_do(tmp_path: Path) -> None:
    pcm = speech(40_000)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(wav(3, 1, 16000, 32, pcm.tobytes()),))
    writer.start()
    np.testing.assert_array_equal(read(pipe), pcm)
    writer.join()


@pytest.mark.parametrize("block_s", [0.001, 0.01, 0.37, 100.0])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 11025])
def test_resampling_in_pieces_equals_the_whole(tmp_path: Path, rate: int, block_s: float) -> None:
    pcm = speech(rate)
    file = tmp_path / "a.wav"
    file.write_bytes(wav(3, 1, rate, 32, pcm.tobytes()))
    expected = soxr.resample(pcm, rate, 16000, quality="HQ")
    np.testing.assert_array_equal(read(file, block_s), expected)
    assert len(expected) == pytest.approx(16000, abs=1)


def test_other_formats_through_pyav(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    pcm = speech(44100)
    file = tmp_path / "a.flac"
    with av.open(str(file), "w") as container:
        track = container.add_stream("flac", rate=44100, layout="stereo")
        stereo = np.round(np.stack([pcm, pcm], 1) * 32767).astype("<i2")
        frame = av.AudioFrame.from_ndarray(stereo.reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate = 44100
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    expected = soxr.resample(pcm * np.float32(32767 / 32768), 44100, 16000, quality="HQ")
    got = read(file)
    assert len(got) == len(expected)
    np.testing.assert_allclose(got, expected, atol=2 * SIXTEEN_BITS)


HEADER = wav(3, 1, 16000, 32, b"")
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"this is no sound at all, but it is long enough to look at", "not a sound file"),
    "header cut": (HEADER[:20], "ends inside its header"),
    "no format": (b"RIFF\0\0\0\0WAVE" + chunk(b"data", b"\0" * 8), "without a format"),
    "short format": (b"RIFF\0\0\0\0WAVE" + chunk(b"fmt ", b"\1\0") + chunk(b"data", b""), "too short"),
    "no channels": (wav(1, 0, 16000, 16, b""), "0 channels"),
    "rate 0": (wav(1, 1, 0, 16, b""), "0 Hz"),
    "rate absurd": (wav(1, 1, 4_000_000_000, 16, b""), "4000000000 Hz"),
    "nan": (wav(3, 1, 16000, 32, np.array([0, 0, 0, np.nan], "<f4").tobytes()), "sample 3 is not a number"),
    "inf": (wav(3, 1, 16000, 64, np.array([0, np.inf], "<f8").tobytes()), "sample 1 is infinite"),
    "inf in float32": (wav(3, 1, 16000, 64, np.array([1e300], "<f8").tobytes()), "sample 0 is infinite"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.wav"
    file.write_bytes(content)
    with pytest.raises(AudioError, match=message) as caught:
        read(file)
    if "sample" not in message and "Hz" not in message:
        assert str(file) in str(caught.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="no sound file"):
        read(tmp_path / "none.wav")
    with pytest.raises(AudioError, match="folder"):
        read(tmp_path)


def test_a_film_without_sound(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(AudioError, match="no sound track"):
        read(file)


def test_the_models_own_rate_passes_untouched() -> None:
    pcm = speech(100)[:, None]
    resampler = Resampler(16000, 16000)
    np.testing.assert_array_equal(resampler.push(pcm), pcm[:, 0])
    assert resampler.finish().size == 0
