"""What a microphone hears besides speech: noise, hum, knocks, music. None of it opens the mouth."""

from __future__ import annotations

import random as plain_random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from streamtalk_training import espeak, music
from streamtalk_training.foreign import foreign_sentence
from streamtalk_training.idle import slow_noise
from streamtalk_training.music import SAMPLE_RATE
from streamtalk_training.visemes import UnknownPhoneError

Doubles = NDArray[np.float64]
Random = np.random.Generator

_BABBLE_LANGUAGES = ("de", "fr", "it", "pl", "nl", "sv", "pt-br", "id")
# Kind of sound, and how often it is met among clips without speech.
SHARES = {
    "white": 0.04,
    "noise": 0.12,
    "modulated": 0.07,
    "hum": 0.05,
    "beeps": 0.05,
    "knocks": 0.05,
    "typing": 0.04,
    "music": 0.52,  # of all sounds without speech the most like it
    "babble": 0.02,
    "silence": 0.04,
}
LOUDEST_BABBLE_DB = -46.0  # RMS: far away; nearer voices would be speech


def sound(kind: str, samples: int, random: Random, font: Path | None = None) -> Doubles:
    """`kind` (a key of `SHARES`, or `pink`) as [samples] of unit RMS, zeros for silence.

    Raises KeyError for another kind.
    """
    if kind == "music":
        return music.song(samples, random, font)
    made = _MAKERS[kind](samples, random)
    return np.asarray(made / max(float(np.sqrt(np.mean(made**2))), 1e-9))


def coloured_noise(samples: int, random: Random, slope: float | None = None) -> Doubles:
    """Noise [samples] of unit RMS whose power falls by 6 dB times `slope` an octave (0 white, .5 pink, 1 brown)."""
    if slope is None:
        slope = random.uniform(0, 1)
    size = next_fast_len(samples, real=True)
    spectrum = rfft(random.standard_normal(size))
    spectrum *= (
        np.maximum(np.arange(len(spectrum)), max(20 * size / SAMPLE_RATE, 1)) ** -slope
    )  # flat below 20 Hz
    noise = irfft(spectrum, size)[:samples]
    return np.asarray(noise / np.sqrt(np.mean(noise**2)))


def _modulated(samples: int, random: Random) -> Doubles:
    """Noise that swells and fades: wind, waves, traffic; some as fast as syllables."""
    rate_hz = float(np.exp(random.uniform(np.log(0.3), np.log(6))))
    swell = np.exp(random.uniform(0.5, 1.2) * slow_noise(samples // 160 + 2, 100, rate_hz, random))
    return coloured_noise(samples, random) * np.interp(np.arange(samples) / 160, np.arange(len(swell)), swell)


def _hum(samples: int, random: Random) -> Doubles:
    time_s = np.arange(samples) / SAMPLE_RATE
    pitch_hz = random.choice([50.0, 60.0, 100.0, 120.0, float(random.uniform(40, 400))])
    humming = np.zeros(samples)
    for harmonic in range(1, int(random.integers(2, 20))):
        share = random.uniform(0, 1) / harmonic
        humming += share * np.sin(2 * np.pi * (pitch_hz * harmonic * time_s + random.random()))
    return humming + 0.1 * random.random() * coloured_noise(samples, random)


def _beeps(samples: int, random: Random) -> Doubles:
    """Beeps, chirps and rings: tones that start, glide a little and stop or decay."""
    beeping = np.zeros(samples)
    start = 0
    while start < samples:
        length = min(int(SAMPLE_RATE * random.uniform(0.05, 0.7)), samples - start)
        since_s = np.arange(length) / SAMPLE_RATE
        pitch_hz = 150 * 2 ** random.uniform(0, 4.5) * (1 + random.uniform(-0.5, 0.5) * since_s)
        tone = np.sin(2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE)
        shape = np.exp(-since_s * random.uniform(0, 12)) * np.clip((length - np.arange(length)) / 80, 0, 1)
        beeping[start : start + length] += tone * shape
        start += length + int(SAMPLE_RATE * random.uniform(0.0, 0.6))
    return beeping


def _knocks(samples: int, random: Random) -> Doubles:
    """Knocks, steps and doors: bursts of noise through a resonance that die within a tenth of a second."""
    knocking = np.zeros(samples)
    for _ in range(max(2, int(samples / SAMPLE_RATE * random.uniform(0.5, 5)))):
        start = int(random.integers(0, samples))
        length = min(int(SAMPLE_RATE * 0.3), samples - start)
        since_s = np.arange(length) / SAMPLE_RATE
        burst = random.standard_normal(length) * np.exp(-since_s / random.uniform(0.003, 0.03))
        ring = np.sin(2 * np.pi * random.uniform(80, 1500) * since_s) * np.exp(
            -since_s / random.uniform(0.01, 0.08)
        )
        knocking[start : start + length] += (burst + random.uniform(0, 3) * ring) * random.uniform(0.2, 1)
    return knocking


def _typing(samples: int, random: Random) -> Doubles:
    typing = np.zeros(samples)
    start = 0
    while start < samples:
        length = min(int(SAMPLE_RATE * random.uniform(0.01, 0.04)), samples - start)
        click = np.diff(random.standard_normal(length), prepend=0.0)
        typing[start : start + length] += click * np.exp(-np.arange(length) / 60) * random.uniform(0.3, 1)
        start += int(SAMPLE_RATE * random.lognormal(np.log(0.15), 0.6)) + 1
    return typing


def babble(samples: int, random: Random) -> Doubles:
    """Several voices at once, each in a language of its own; every one starts somewhere else."""
    mixed = np.zeros(samples)
    words = plain_random.Random(int(random.integers(2**31)))
    for _ in range(int(random.integers(3, 7))):
        language, variant = (
            words.choice(_BABBLE_LANGUAGES),
            words.choice(("f1", "f2", "f4", "m1", "m3", "m7")),
        )
        track = np.zeros(samples)
        start = -int(random.integers(0, SAMPLE_RATE))
        while start < samples:
            text = foreign_sentence(language, words)
            try:
                spoken = espeak.say(
                    text, f"{language}+{variant}", words.randint(140, 200), words.randint(20, 80)
                )
            except UnknownPhoneError:  # a phone that the tables lack
                continue
            heard = soxr.resample(spoken.pcm, spoken.sample_rate, SAMPLE_RATE)[max(-start, 0) :]
            start = max(start, 0)
            track[start : start + len(heard)] += heard[: samples - start]
            start += max(len(heard), 1)
        mixed += track / max(float(np.sqrt(np.mean(track**2))), 1e-9) * random.uniform(0.4, 1)
    return mixed


_MAKERS: dict[str, Callable[[int, Random], Doubles]] = {
    "white": lambda samples, random: coloured_noise(samples, random, 0.0),
    "pink": lambda samples, random: coloured_noise(samples, random, 0.5),
    "noise": coloured_noise,
    "modulated": _modulated,
    "hum": _hum,
    "beeps": _beeps,
    "knocks": _knocks,
    "typing": _typing,
    "babble": babble,
    "silence": lambda samples, _: np.zeros(samples),
}
