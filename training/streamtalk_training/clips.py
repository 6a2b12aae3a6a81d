"""One clip of the corpus: what to say, and the sound and motion that come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import soxr
from numpy.typing import NDArray

from streamtalk_training import augment, espeak
from streamtalk_training.coarticulation import Style, arkit_weights, mouth_controls
from streamtalk_training.espeak import Utterance
from streamtalk_training.idle import idle_weights, slow_noise
from streamtalk_training.visemes import SILENCE, Phone

SAMPLE_RATE = 16000
Floats = NDArray[np.float32]
Speak = Callable[[str, str, float], Utterance]  # text, voice, pace (1 is usual)


@dataclass(frozen=True)
class ClipSpec:
    """All that a clip is made from; `engine` is espeak, flite or sounds (no speech at all).

    `varied` clips differ in style and pass through a room and a microphone; others are the canonical talker
    in clean sound, as evaluation wants it.
    """

    index: int
    seed: int
    engine: str
    voice: str
    sentences: tuple[str, ...]
    varied: bool
    fps: float = 30.0


@dataclass(frozen=True)
class Clip:
    """`pcm` float32 [n] at 16 kHz; `weights` and `idle` ARKit weights [L, 52] with `L = n * fps // 16000`."""

    spec: ClipSpec
    pcm: Floats
    weights: Floats
    idle: Floats
    phones: tuple[Phone, ...] = field(repr=False)


def render(spec: ClipSpec, flite: Speak | None = None) -> Clip:
    """Speak, articulate and disturb one clip. `flite` speaks for specs of that engine."""
    random = np.random.default_rng([spec.seed, spec.index])
    if spec.engine == "sounds":
        return _sounds(spec, random)
    pace = float(np.exp(random.normal(0, 0.18))) if spec.varied else float(random.uniform(0.9, 1.15))
    chunks: list[Floats] = [_silence(random.uniform(0.15, 1.2))]
    phones: list[Phone] = []
    for sentence in spec.sentences:
        start_s = sum(map(len, chunks)) / SAMPLE_RATE
        try:
            spoken = _spoken(spec, sentence, pace, random, flite)
        except KeyError:  # a foreign word with a phone that the tables lack: its sentence is left out
            continue
        phones += [Phone(start_s + p.start_s, start_s + p.end_s, p.name, p.viseme) for p in spoken.phones]
        chunks += [
            np.asarray(soxr.resample(spoken.pcm, spoken.sample_rate, SAMPLE_RATE), np.float32),
            _silence(random.uniform(0.1, 0.9)),
        ]
    pcm = np.concatenate(chunks)
    phones = with_silences(phones, len(pcm) / SAMPLE_RATE)

    times_s = np.arange(frame_count(len(pcm), spec.fps)) / spec.fps
    style = _style(pace, random) if spec.varied else Style()
    mouth = arkit_weights(mouth_controls(phones, times_s, style), style)
    idle = idle_weights(len(times_s), spec.fps, _loudness(pcm, times_s), random)
    chance = augment.Chance() if spec.varied else augment.CLEAN
    heard = augment.augmented(pcm, SAMPLE_RATE, random, chance)
    return Clip(spec, heard, mouth, idle, tuple(phones))


def frame_count(samples: int, fps: float) -> int:
    return int(samples * fps // SAMPLE_RATE)


def with_silences(phones: list[Phone], total_s: float) -> list[Phone]:
    """`phones` with every gap, and the time before and after, filled by silence."""
    filled: list[Phone] = []
    end_s = 0.0
    for phone in phones:
        if phone.start_s > end_s:
            filled.append(Phone(end_s, phone.start_s, "_", SILENCE))
        filled.append(phone)
        end_s = phone.end_s
    if total_s > end_s:
        filled.append(Phone(end_s, total_s, "_", SILENCE))
    return filled


def _spoken(
    spec: ClipSpec, sentence: str, pace: float, random: np.random.Generator, flite: Speak | None
) -> Utterance:
    if spec.engine == "flite":
        if flite is None:
            raise ValueError("a clip asks for flite, and no flite was given")
        return flite(sentence, spec.voice, pace)
    pitch, pitch_range = random.integers(15, 85), random.integers(25, 80)
    return espeak.say(sentence, spec.voice, round(165 * pace), int(pitch), int(pitch_range))


def _style(pace: float, random: np.random.Generator) -> Style:
    effort = random.normal(0, 0.08) - 0.15 * np.log(pace)  # fast speech moves less
    return Style(
        jaw_gain=float(np.exp(effort + random.normal(0, 0.06))),
        lip_gain=float(np.exp(effort + random.normal(0, 0.06))),
        theta_scale=float(np.exp(random.normal(0, 0.06))),
        lead_s=float(random.normal(0.02, 0.005)),
        asymmetry=float(random.normal(0, 0.04)),
        smile=float(max(random.normal(0, 0.02), 0)),
    )


def _loudness(pcm: Floats, times_s: NDArray[np.float64]) -> Floats:
    power = np.convolve(pcm**2, np.full(1600, 1 / 1600), "same")
    heard = np.sqrt(power[np.minimum((times_s * SAMPLE_RATE).astype(int), len(pcm) - 1)])
    return np.asarray(heard / max(float(heard.max()), 1e-6), np.float32)


def _silence(duration_s: float) -> Floats:
    return np.zeros(int(duration_s * SAMPLE_RATE), np.float32)


def _sounds(spec: ClipSpec, random: np.random.Generator) -> Clip:
    """Noise, music and knocks, or nothing at all: the mouth stays shut."""
    samples = int(random.uniform(2.0, 6.0) * SAMPLE_RATE)
    kind = int(random.integers(0, 5))
    if kind == 0:
        sound = (
            augment.coloured_noise(samples, random)
            * np.exp(slow_noise(samples // 1600 + 1, 10, 0.5, random))[np.arange(samples) // 1600]
        )
    elif kind == 1:
        sound = augment.tones(samples, SAMPLE_RATE, random)
    elif kind == 2:
        sound = augment.knocks(samples, SAMPLE_RATE, random)
    elif kind == 3:
        sound = augment.coloured_noise(samples, random)
    else:
        sound = np.zeros(samples)
    level = 10 ** (random.uniform(-60, -14) / 20)
    pcm = np.clip(sound * level / max(float(np.sqrt(np.mean(sound**2))), 1e-9), -1, 1).astype(np.float32)
    frames = frame_count(samples, spec.fps)
    phones = (Phone(0.0, samples / SAMPLE_RATE, "_", SILENCE),)
    times_s = np.arange(frames) / spec.fps
    mouth = arkit_weights(mouth_controls(phones, times_s, Style()), Style())
    return Clip(
        spec, pcm, mouth, idle_weights(frames, spec.fps, np.zeros(frames, np.float32), random), phones
    )
