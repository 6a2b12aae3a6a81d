"""What happens to speech before a microphone hands it over: room, band, background, level and line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq
from scipy.signal import fftconvolve

from streamtalk_training import codecs, sounds

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Random = np.random.Generator

_BACKGROUNDS = ("music", "music", "music", "hum", "modulated", "knocks", "typing", "beeps")
_QUIETEST = 1e-4  # of full scale: below it a sample is not speech


@dataclass(frozen=True)
class Chance:
    """How often each disturbance is met (0..1) and how strong it is."""

    reverb: float = 0.4
    equaliser: float = 0.7
    band: float = 0.12
    noise: float = 0.6
    babble: float = 0.1
    background: float = 0.18
    clipping: float = 0.1
    codec: float = 0.22
    dropout: float = 0.15
    level_db: tuple[float, float] = (-40.0, -12.0)  # RMS of the speech, re full scale
    snr_db: tuple[float, float] = (6.0, 40.0)
    background_snr_db: tuple[float, float] = (8.0, 30.0)


CLEAN = Chance(
    reverb=0,
    equaliser=0,
    band=0,
    noise=0,
    babble=0,
    background=0,
    clipping=0,
    codec=0,
    dropout=0,
    level_db=(-26, -20),
)


def augmented(
    pcm: Floats,
    sample_rate: int,
    random: Random,
    chance: Chance,
    pauses_s: Sequence[tuple[float, float]] = (),
    font: Path | None = None,
) -> Floats:
    """`pcm` float32 [n] after a random room, equaliser, band limit, background, level and line; the same length.

    Nothing here moves speech in time: the direct sound keeps its place. `pauses_s` are stretches (start, end)
    that may become digital silence, as a gate or a lost packet makes it.
    """
    sound = pcm.astype(np.float64)
    if random.random() < chance.reverb:
        sound = _reverberated(sound, sample_rate, random)
    if random.random() < chance.equaliser:
        sound = _filtered(sound, sample_rate, _equaliser(random))
    if random.random() < chance.band:
        sound = _filtered(sound, sample_rate, _band(random))
    loud = np.abs(sound) > _QUIETEST
    sound /= np.sqrt(np.mean(sound[loud] ** 2)) if loud.any() else 1.0
    if random.random() < chance.noise:
        sound += sounds.coloured_noise(len(sound), random) * _ratio(chance.snr_db, random)
    if random.random() < chance.babble:
        sound += sounds.sound("babble", len(sound), random) * _ratio(chance.background_snr_db, random)
    if random.random() < chance.background:
        kind = _BACKGROUNDS[random.integers(len(_BACKGROUNDS))]
        sound += sounds.sound(kind, len(sound), random, font) * _ratio(chance.background_snr_db, random)
    if random.random() < chance.clipping:
        sound = _clipped(sound, random)
    sound *= 10 ** (random.uniform(*chance.level_db) / 20)
    heard = np.clip(sound, -1, 1).astype(np.float32)
    if random.random() < chance.codec:
        heard = _through_a_line(heard, sample_rate, random)
    if random.random() < chance.dropout:
        for start_s, end_s in pauses_s:
            heard[round(start_s * sample_rate) : round(end_s * sample_rate)] = 0
    return heard


def _ratio(snr_db: tuple[float, float], random: Random) -> float:
    return float(10 ** (-random.uniform(*snr_db) / 20))


def _clipped(sound: Doubles, random: Random) -> Doubles:
    """`sound` of unit RMS, overdriven: its peaks are bent (a tube) or cut off (a converter)."""
    most = random.uniform(1.0, 3.0)
    return np.asarray(most * np.tanh(sound / most) if random.random() < 0.5 else np.clip(sound, -most, most))


def _through_a_line(pcm: Floats, sample_rate: int, random: Random) -> Floats:
    codec = codecs.CODECS[random.integers(len(codecs.CODECS))]
    bit_rate = int(random.choice(codec.bit_rates)) if codec.bit_rates else None
    return np.clip(codecs.through(pcm, sample_rate, codec, bit_rate), -1, 1)


def _reverberated(sound: Doubles, sample_rate: int, random: Random) -> Doubles:
    decay_s = random.uniform(0.1, 0.6)
    tail = random.standard_normal(int(decay_s * sample_rate))
    tail *= np.exp(-6.9 * np.arange(len(tail)) / len(tail))  # 60 dB over the tail
    tail *= random.uniform(0.1, 0.6) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return np.asarray(fftconvolve(sound, tail)[: len(sound)])


def _filtered(sound: Doubles, sample_rate: int, gain_db: tuple[Doubles, Doubles]) -> Doubles:
    size = next_fast_len(len(sound) + sample_rate, real=True)  # the filter rings for less than a second
    spectrum = rfft(sound, size)
    octaves = np.log2(np.maximum(rfftfreq(size, 1 / sample_rate), 20))
    spectrum *= 10 ** (np.interp(octaves, np.log2(gain_db[0]), gain_db[1]) / 20)
    return np.asarray(irfft(spectrum, size)[: len(sound)])


def _equaliser(random: Random) -> tuple[Doubles, Doubles]:
    return np.array([50.0, 200, 800, 2500, 7500]), random.uniform(-8, 8, 5)


def _band(random: Random) -> tuple[Doubles, Doubles]:
    low_hz, high_hz = random.uniform(100, 350), random.uniform(3000, 6000)
    corners = np.array([low_hz / 2, low_hz, high_hz, high_hz * 1.3])
    return corners, np.array([-40.0, 0, 0, -50])
