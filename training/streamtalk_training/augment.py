"""What happens to speech before a microphone hands it over: room, band, noise and level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import fftconvolve

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Chance:
    """How often each disturbance is met (0..1) and how strong it is."""

    reverb: float = 0.4
    equaliser: float = 0.7
    band: float = 0.15
    noise: float = 0.75
    level_db: tuple[float, float] = (-40.0, -14.0)  # RMS of the speech, re full scale
    snr_db: tuple[float, float] = (6.0, 40.0)


CLEAN = Chance(reverb=0, equaliser=0, band=0, noise=0, level_db=(-26, -20))


def augmented(pcm: Floats, sample_rate: int, random: np.random.Generator, chance: Chance) -> Floats:
    """`pcm` float32 [n] after a random room, equaliser, band limit, level and noise; the same length.

    The direct sound keeps its place: nothing here moves speech in time.
    """
    sound = pcm.astype(np.float64)
    if random.random() < chance.reverb:
        sound = _reverberated(sound, sample_rate, random)
    if random.random() < chance.equaliser:
        sound = _filtered(sound, sample_rate, _equaliser(random))
    if random.random() < chance.band:
        sound = _filtered(sound, sample_rate, _band(random))
    rms = np.sqrt(np.mean(sound[np.abs(sound) > 1e-4] ** 2)) if np.any(np.abs(sound) > 1e-4) else 1.0
    level = 10 ** (random.uniform(*chance.level_db) / 20)
    sound *= level / rms
    if random.random() < chance.noise:
        snr = 10 ** (random.uniform(*chance.snr_db) / 20)
        sound += coloured_noise(len(sound), random) * level / snr
    return np.clip(sound, -1, 1).astype(np.float32)


def coloured_noise(samples: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Noise [samples] of unit RMS whose power falls by a random 0 to 6 dB an octave (white to brown)."""
    spectrum = np.fft.rfft(random.standard_normal(samples))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1) ** -random.uniform(0, 1)
    noise = np.fft.irfft(spectrum, samples)
    return np.asarray(noise / np.sqrt(np.mean(noise**2)))


def tones(samples: int, sample_rate: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Notes [samples] of unit RMS: a few harmonics that start, glide a little and decay."""
    time_s = np.arange(samples) / sample_rate
    sound = np.zeros(samples)
    start_s = 0.0
    while start_s < time_s[-1]:
        pitch_hz = 110 * 2 ** random.uniform(0, 3)
        since_s = np.maximum(time_s - start_s, 0)
        envelope = np.where(time_s >= start_s, np.exp(-since_s * random.uniform(1, 8)), 0)
        for harmonic in range(1, int(random.integers(2, 7))):
            sound += envelope * np.sin(2 * np.pi * pitch_hz * harmonic * since_s) / harmonic**1.5
        start_s += float(random.uniform(0.1, 0.7))
    return np.asarray(sound / np.sqrt(np.mean(sound**2)))


def knocks(samples: int, sample_rate: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Clicks, typing and knocks [samples] of unit RMS: bursts of noise that die within 5 to 60 ms."""
    sound = np.zeros(samples)
    for _ in range(max(2, int(samples / sample_rate * random.uniform(1, 6)))):
        start = int(random.integers(0, samples - 1))
        length = min(int(sample_rate * random.uniform(0.02, 0.2)), samples - start)
        decay = np.exp(-np.arange(length) / (sample_rate * random.uniform(0.003, 0.03)))
        sound[start : start + length] += random.standard_normal(length) * decay * random.uniform(0.2, 1)
    return np.asarray(sound / np.sqrt(np.mean(sound**2)))


def _reverberated(
    sound: NDArray[np.float64], sample_rate: int, random: np.random.Generator
) -> NDArray[np.float64]:
    decay_s = random.uniform(0.1, 0.5)
    tail = random.standard_normal(int(decay_s * sample_rate))
    tail *= np.exp(-6.9 * np.arange(len(tail)) / len(tail))  # 60 dB over the tail
    tail *= random.uniform(0.1, 0.6) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return np.asarray(fftconvolve(sound, tail)[: len(sound)])


def _filtered(
    sound: NDArray[np.float64], sample_rate: int, gain_db: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> NDArray[np.float64]:
    spectrum = np.fft.rfft(sound, 2 * len(sound))
    octaves = np.log2(np.maximum(np.fft.rfftfreq(2 * len(sound), 1 / sample_rate), 20))
    spectrum *= 10 ** (np.interp(octaves, np.log2(gain_db[0]), gain_db[1]) / 20)
    return np.asarray(np.fft.irfft(spectrum)[: len(sound)])


def _equaliser(random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array([50.0, 200, 800, 2500, 7500]), random.uniform(-8, 8, 5)


def _band(random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low_hz, high_hz = random.uniform(100, 350), random.uniform(3000, 6000)
    corners = np.array([low_hz / 2, low_hz, high_hz, high_hz * 1.3])
    return corners, np.array([-40.0, 0, 0, -50])
