"""Speech comes back from every codec at its own time."""

from __future__ import annotations

import numpy as np
import pytest
import soxr

from streamtalk_training import espeak
from streamtalk_training.codecs import CODECS, Codec, aligned, through

av = pytest.importorskip("av")

RATE = 16000
# Codecs of speech (AMR) keep the envelope, not the wave; a frame of video lasts 33 ms, and a tenth of it is less
# than any label's precision.
MOST_LAG_S = 0.003
LEAST_LIKENESS = 0.7  # correlation of the waves; AMR at 4.75 kbit/s reaches .8


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    spoken = espeak.say("Bob put the copper pump up by the stamp, and then he went home.", "en-us")
    pcm = soxr.resample(spoken.pcm, spoken.sample_rate, RATE)
    return np.concatenate([np.zeros(3000), pcm, np.zeros(3000)]).astype(np.float32)


def envelope(pcm: np.ndarray) -> np.ndarray:
    smooth = np.sqrt(np.convolve(pcm.astype(np.float64) ** 2, np.full(160, 1 / 160), "same"))
    return np.asarray(smooth - smooth.mean())


@pytest.mark.parametrize(
    ("codec", "bit_rate"), [(codec, rate) for codec in CODECS for rate in codec.bit_rates or (None,)]
)
def test_a_codec_keeps_time(speech: np.ndarray, codec: Codec, bit_rate: int | None) -> None:
    heard = through(speech, RATE, codec, bit_rate)
    assert heard.shape == speech.shape
    assert heard.dtype == np.float32
    assert np.corrcoef(heard, speech)[0, 1] > LEAST_LIKENESS
    lags = np.arange(-400, 401)
    before, after = envelope(speech), envelope(heard)
    match = [np.dot(np.roll(after, -lag), before) for lag in lags]
    assert abs(lags[int(np.argmax(match))]) <= MOST_LAG_S * RATE


def test_a_codec_gives_the_same_bytes_again(speech: np.ndarray) -> None:
    for codec in CODECS:
        rate = codec.bit_rates[0] if codec.bit_rates else None
        np.testing.assert_array_equal(through(speech, RATE, codec, rate), through(speech, RATE, codec, rate))


@pytest.mark.parametrize("delay", [-300, 0, 1, 900])
def test_alignment_finds_a_delay(speech: np.ndarray, delay: int) -> None:
    late = np.roll(np.concatenate([speech, np.zeros(2000, np.float32)]), delay)
    np.testing.assert_array_equal(aligned(late, speech, RATE)[400:-400], speech[400:-400])


def test_silence_stays_silent() -> None:
    silence = np.zeros(8000, np.float32)
    for codec in CODECS:
        heard = through(silence, RATE, codec)
        assert heard.shape == silence.shape
        assert np.abs(heard).max() < 0.01


def test_an_encoder_that_ffmpeg_lacks_is_named() -> None:
    with pytest.raises(av.codec.codec.UnknownCodecError, match="no_such_codec"):
        through(np.zeros(100, np.float32), RATE, Codec("no_such_codec", 8000, "s16"))
