"""Speech through a telephone or a call: encoded and decoded by FFmpeg (PyAV), and put back in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy.signal import correlate

Floats = NDArray[np.float32]

_MOST_DELAY_S = 0.15  # of an encoder and its decoder, priming included


@dataclass(frozen=True)
class Codec:
    """An encoder of FFmpeg, the rate it hears and the bit rates that a call might use (empty: it has one)."""

    name: str
    sample_rate: int
    sample_format: str
    bit_rates: tuple[int, ...] = ()


CODECS = (
    Codec("g722", 16000, "s16"),
    Codec("pcm_mulaw", 8000, "s16"),
    Codec("pcm_alaw", 8000, "s16"),
    Codec("libopencore_amrnb", 8000, "s16", (4750, 7950, 12200)),
    Codec("libopus", 16000, "s16", (8000, 12000, 16000, 24000)),
    Codec("libmp3lame", 16000, "s16p", (16000, 24000, 32000)),
    Codec("aac", 16000, "fltp", (14000, 20000, 32000)),
)


def through(pcm: Floats, sample_rate: int, codec: Codec, bit_rate: int | None = None) -> Floats:
    """`pcm` float32 [n] as `codec` returns it: the same length and, by cross-correlation, the same time.

    Raises ImportError without PyAV, av.codec.codec.UnknownCodecError where FFmpeg was built without it.
    """
    try:
        import av
        import av.audio.resampler
    except ImportError as error:
        raise ImportError("codecs need `pip install streamtalk[train]` (PyAV)") from error
    encoder = av.CodecContext.create(codec.name, "w")
    assert isinstance(encoder, av.AudioCodecContext)
    encoder.sample_rate, encoder.layout, encoder.format = codec.sample_rate, "mono", codec.sample_format
    encoder.time_base = Fraction(1, codec.sample_rate)
    encoder.thread_count = 1  # the bytes must not depend on the machine
    if bit_rate is not None:
        encoder.bit_rate = bit_rate
    encoder.open()
    to_encoder = av.audio.resampler.AudioResampler(
        codec.sample_format, "mono", codec.sample_rate, encoder.frame_size or 320
    )
    to_pcm = av.audio.resampler.AudioResampler("flt", "mono", sample_rate)

    whole = np.concatenate([pcm, np.zeros(int(_MOST_DELAY_S * sample_rate) + 4096, np.float32)])
    frame = av.AudioFrame.from_ndarray(whole[None], "flt", "mono")
    frame.sample_rate = sample_rate
    decoder: av.AudioCodecContext | None = None
    heard: list[Floats] = []

    def decode(packets: Sequence[av.Packet[av.AudioStream]]) -> None:
        nonlocal decoder
        if decoder is None:  # some encoders know their header only after the first frame
            created = av.CodecContext.create(encoder.codec.canonical_name, "r")
            assert isinstance(created, av.AudioCodecContext)
            decoder = created
            decoder.sample_rate, decoder.layout = codec.sample_rate, "mono"
            decoder.thread_count = 1
            if encoder.extradata is not None:
                decoder.extradata = encoder.extradata
        for packet in packets:
            for decoded in decoder.decode(packet):
                decoded.pts = None
                heard.extend(part.to_ndarray()[0] for part in to_pcm.resample(decoded))

    for ready in [*to_encoder.resample(frame), *to_encoder.resample(None)]:
        ready.pts = None
        if encoder.frame_size and ready.samples < encoder.frame_size:
            continue  # a torn last frame: behind the padding anyway
        decode(encoder.encode(ready))
    decode(encoder.encode(None))
    return aligned(np.concatenate(heard), pcm, sample_rate)


def aligned(late: Floats, pcm: Floats, sample_rate: int) -> Floats:
    """`late` [m] shifted to fit `pcm` [n] best, and cut or padded to its length."""
    most = int(_MOST_DELAY_S * sample_rate)
    match = correlate(late[: len(pcm) + most], pcm, "full", "fft")
    zero = len(pcm) - 1
    delay = int(match[zero - most : zero + most + 1].argmax()) - most
    shifted = late[delay:] if delay >= 0 else np.concatenate([np.zeros(-delay, np.float32), late])
    fitted = np.zeros(len(pcm), np.float32)
    fitted[: len(shifted)] = shifted[: len(pcm)]
    return fitted
