"""Excerpts: the inputs that graphs are compared on, the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.model import Manifest
from streamtalk_export.config import SAMPLE_RATE

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Excerpt:
    """Input of a stream of L frames: pcm [n], noise [L, C], style [E], start latent [C], template [V, 3].

    The audio is longer than its frames by a window: silence would be encoded as rounding noise where a normalisation
    follows zeros, and two correct implementations would disagree.
    """

    pcm: Array
    noise: Array
    style: Array
    start_latent: Array
    template: Array

    @classmethod
    def make(
        cls,
        manifest: Manifest,
        frames: int,
        identity: Mapping[str, Array],
        speech: bool = False,
        seed: int = 0,
    ) -> Excerpt:
        """An excerpt of this length for the first speaker of an identity file; with `speech` it sounds like speech.
        `seed` draws the noise.
        """
        sound = speech_audio if speech else babble
        # Whole hops, of which the last one's window is full.
        hops = -(-frames // manifest.hop)
        rows = np.random.default_rng(seed).standard_normal((hops * manifest.hop, manifest.latent_width))
        return cls(
            pcm=sound((hops * manifest.hop) / manifest.fps + manifest.window_samples / SAMPLE_RATE),
            noise=rows.astype(np.float32),
            style=identity["styles"][0],
            start_latent=identity["start_latent"],
            template=identity["templates"][0],
        )

    def window(self, manifest: Manifest, first_frame: int) -> Array:
        """Window [window_samples] of the hop that begins with `first_frame`, as the runtime cuts it."""
        start = manifest.clock.window_start(first_frame)
        samples = self.pcm[max(start, 0) : start + manifest.window_samples]
        return np.pad(samples, (manifest.window_samples - len(samples), 0))


def babble(seconds: float) -> Array:
    """Voiced bursts with moving formants and pauses, [n] float32 at 16 kHz; the same everywhere."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t)) / SAMPLE_RATE
    harmonics = np.arange(1, 25)[:, None]
    formant = 900 + 600 * np.sin(2 * np.pi * 2.3 * t)
    weight = np.exp(-(((harmonics * 130 - formant) / 500) ** 2)) + 0.1 / harmonics
    voice = (weight * np.sin(harmonics * pitch)).sum(0)
    envelope = np.clip(np.sin(2 * np.pi * 3.1 * t) + 0.4, 0, 1) * (np.sin(2 * np.pi * 0.45 * t) > -0.8)
    return (0.1 * envelope * voice + 1e-4 * np.sin(2 * np.pi * 3333 * t)).astype(np.float32)


_VOWELS_HZ = ((730, 1090, 2440), (270, 2290, 3010), (530, 1840, 2480), (300, 870, 2240), (570, 840, 2410))
_NASAL_HZ = (250, 1100, 2200)
_FORMANTS = ((1.0, 90.0), (0.5, 130.0), (0.25, 200.0))  # strength and width in Hz


def speech_audio(seconds: float) -> Array:
    """Vowels, stops, hisses, nasals and pauses of a made-up speaker, [n] float32 at 16 kHz; the same everywhere.

    A talker that was taught what is no speech keeps its mouth shut to `probe_audio`, and opens it to this. Formants
    after Peterson and Barney, "Control methods used in a study of the vowels" (1952).
    """
    random = np.random.default_rng(0)
    times_s, formants, voiced, hissed = [0.0], [_VOWELS_HZ[0]], [0.0], [0.0]

    def hold(duration_s: float, hz: tuple[int, int, int], voice: float, hiss: float) -> None:
        end_s = times_s[-1] + duration_s
        for at_s in (times_s[-1] + 0.02, end_s):
            times_s.append(at_s)
            formants.append(hz)
            voiced.append(voice)
            hissed.append(hiss)

    while times_s[-1] < seconds:
        vowel = _VOWELS_HZ[random.integers(len(_VOWELS_HZ))]
        hold(random.uniform(0.09, 0.2), vowel, 1.0, 0.0)
        consonant_s = random.uniform(0.05, 0.09)
        if random.random() < 0.25:
            hold(consonant_s, _NASAL_HZ, 0.3, 0.0)
        else:
            hold(consonant_s, vowel, 0.0, 0.3 * (random.random() < 1 / 3))
        if random.random() < 0.08:
            hold(random.uniform(0.3, 0.7), vowel, 0.0, 0.0)

    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tracks = [np.interp(t, times_s, track) for track in np.array(formants, np.float64).T]
    pitch_hz = 120 + 25 * np.sin(2 * np.pi * 0.6 * t) + 10 * np.sin(2 * np.pi * 2.1 * t)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE
    voice = np.zeros(len(t))
    for harmonic in range(1, 31):
        hz = harmonic * pitch_hz
        loud = sum(
            strength * np.exp(-np.abs(hz - track) / width)
            for track, (strength, width) in zip(tracks, _FORMANTS, strict=True)
        )
        voice += loud * np.sin(harmonic * phase) / harmonic**0.3
    noise = np.diff(random.normal(size=len(t)), prepend=0.0)
    sound = np.interp(t, times_s, voiced) * voice + np.interp(t, times_s, hissed) * noise
    return (0.1 * sound + 1e-4 * random.normal(size=len(t))).astype(np.float32)
