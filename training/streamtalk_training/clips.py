"""One clip of the corpus: what to say, and the sound and motion that come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from streamtalk_training import augment, sounds
from streamtalk_training.coarticulation import Style, arkit_weights, mouth_controls
from streamtalk_training.espeak import Utterance
from streamtalk_training.idle import idle_weights
from streamtalk_training.visemes import SILENCE, Phone, UnknownPhoneError, tables

SAMPLE_RATE = 16000
EVALUATED_SOUND_S = 10.0  # length of a clip without speech, where evaluation hears it
TRAINED_SOUND_S = (3.0, 9.0)  # and where training does
Floats = NDArray[np.float32]
Random = np.random.Generator

_BREATH_CHANCE = 0.2  # before a phrase
_BREATH_S = (0.25, 0.5)
_BREATH_JAW = (0.1, 0.2)
_FILLED_PAUSE_CHANCE = 0.2  # a clip's: something sounds in one of its pauses
_DROPOUT_MARGIN_S = 0.08  # kept on both sides of a phrase
_QUIETEST_DB, _LOUDEST_DB = -60.0, -6.0  # RMS of sounds without speech
_FULL_SCALE_CHANCE = 0.12  # of noise: as loud as it goes, beyond clipping


@dataclass(frozen=True)
class ClipSpec:
    """All that a clip is made from; `engine` is espeak, flite, festival, pico, neural, statistical or sounds
    (no speech at all).

    `voice` is a key of `sounds.SHARES` where the engine is sounds; `pace` 1 is usual, 2 twice as fast, and
    `warp` plays the voice faster and higher by its factor. `varied` clips differ in style and pass through a
    room and a microphone; others are the canonical talker in clean sound, as evaluation wants it.
    """

    index: int
    seed: int
    engine: str
    voice: str
    sentences: tuple[str, ...]
    varied: bool
    fps: float = 30.0
    pace: float = 1.0
    warp: float = 1.0


Speak = Callable[[ClipSpec, str, Random], Utterance]


@dataclass(frozen=True)
class Clip:
    """`pcm` float32 [n] at 16 kHz; `weights` and `idle` ARKit weights [L, 52] with `L = n * fps // 16000`."""

    spec: ClipSpec
    pcm: Floats
    weights: Floats
    idle: Floats
    phones: tuple[Phone, ...] = field(repr=False)


def render(spec: ClipSpec, speak: Speak, font: Path | None = None) -> Clip:
    """Speak, articulate and disturb one clip; `font` has recorded instruments for its music."""
    random = np.random.default_rng([spec.seed, spec.index])
    if spec.engine == "sounds":
        return _sounds(spec, random, font)
    chunks: list[Floats] = [_silence(random.uniform(0.15, 1.2))]
    phones: list[Phone] = []
    breaths: list[_Breath] = []
    for sentence in spec.sentences:
        try:
            spoken = warped(speak(spec, sentence, random), spec.warp)
        except UnknownPhoneError:  # in a foreign word, mostly: its sentence is left out
            continue
        start_s = sum(map(len, chunks)) / SAMPLE_RATE
        if spec.varied and random.random() < _BREATH_CHANCE:
            breaths += _breathe(chunks[-1], start_s, random)
        phones += [Phone(start_s + p.start_s, start_s + p.end_s, p.name, p.viseme) for p in spoken.phones]
        heard = soxr.resample(spoken.pcm, spoken.sample_rate, SAMPLE_RATE)
        chunks += [np.asarray(heard, np.float32), _silence(random.uniform(0.1, 0.9))]
    filled = spec.varied and random.random() < _FILLED_PAUSE_CHANCE
    if filled:
        chunks.append(_filled_pause(chunks, random, font))
        chunks.append(_silence(random.uniform(0.05, 0.3)))
    pcm = np.concatenate(chunks)
    phones = with_silences(phones, len(pcm) / SAMPLE_RATE)

    times_s = np.arange(frame_count(len(pcm), spec.fps)) / spec.fps
    style = _style(spec.pace * spec.warp, random) if spec.varied else Style()
    controls = mouth_controls(phones, times_s, style)
    jaw = tables().controls.index("jaw")
    for breath in breaths:
        controls[:, jaw] = np.maximum(controls[:, jaw], breath.opening(times_s))
    idle = idle_weights(len(times_s), spec.fps, relative_loudness(pcm, times_s), random)
    chance = augment.Chance() if spec.varied else augment.CLEAN
    pauses_s = [] if filled or breaths else _pauses(phones)
    heard = augment.augmented(pcm, SAMPLE_RATE, random, chance, pauses_s, font)
    return Clip(spec, heard, arkit_weights(controls, style), idle, tuple(phones))


def frame_count(samples: int, fps: float) -> int:
    return int(samples * fps // SAMPLE_RATE)


def warped(spoken: Utterance, factor: float) -> Utterance:
    """`spoken` played `factor` times faster, pitch and formants with it: another throat, exact phone times."""
    if factor == 1.0:
        return spoken
    rate = round(spoken.sample_rate / factor)
    pcm = soxr.resample(spoken.pcm, spoken.sample_rate, rate)
    share = len(pcm) / len(spoken.pcm)
    phones = tuple(Phone(p.start_s * share, p.end_s * share, p.name, p.viseme) for p in spoken.phones)
    return Utterance(np.asarray(pcm, np.float32), spoken.sample_rate, phones)


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


@dataclass(frozen=True)
class _Breath:
    start_s: float
    end_s: float
    jaw: float

    def opening(self, times_s: NDArray[np.float64]) -> Floats:
        share = np.clip((times_s - self.start_s) / (self.end_s - self.start_s), 0, 1)
        return (self.jaw * np.sin(np.pi * share) ** 2).astype(np.float32)


def _breathe(pause: Floats, end_s: float, random: Random) -> list[_Breath]:
    """Draw breath at the end of `pause` (changed in place), which ends at `end_s`; none where it is short."""
    length = int(random.uniform(*_BREATH_S) * SAMPLE_RATE)
    if length > len(pause):
        return []
    shape = np.sin(np.pi * np.linspace(0, 1, length)) ** 2
    air = sounds.coloured_noise(length, random, random.uniform(0.1, 0.5)) * shape
    pause[-length:] += (air * 10 ** (random.uniform(-48, -34) / 20)).astype(np.float32)
    return [_Breath(end_s - length / SAMPLE_RATE, end_s, random.uniform(*_BREATH_JAW))]


def _filled_pause(chunks: list[Floats], random: Random, font: Path | None) -> Floats:
    """A second or more of something that is not speech, about as loud as the speech was."""
    samples = int(random.uniform(0.8, 3.0) * SAMPLE_RATE)
    kinds = [kind for kind in sounds.SHARES if kind not in ("silence", "babble")]
    sound = sounds.sound(kinds[random.integers(len(kinds))], samples, random, font)
    speech = np.concatenate(chunks)
    loud = np.sqrt(np.mean(speech[np.abs(speech) > 1e-3] ** 2)) if np.any(np.abs(speech) > 1e-3) else 0.1
    fade = np.minimum(1, np.minimum(np.arange(samples), np.arange(samples)[::-1]) / 320)
    return (sound * fade * loud * 10 ** (random.uniform(-20, 6) / 20)).astype(np.float32)


def _pauses(phones: list[Phone]) -> list[tuple[float, float]]:
    long = 4 * _DROPOUT_MARGIN_S
    pauses = [p for p in phones if p.viseme == SILENCE and p.end_s - p.start_s > long]
    return [(p.start_s + _DROPOUT_MARGIN_S, p.end_s - _DROPOUT_MARGIN_S) for p in pauses]


def _style(pace: float, random: Random) -> Style:
    effort = random.normal(0, 0.08) - 0.15 * np.log(pace)  # fast speech moves less
    return Style(
        jaw_gain=float(np.exp(effort + random.normal(0, 0.06))),
        lip_gain=float(np.exp(effort + random.normal(0, 0.06))),
        theta_scale=float(np.exp(random.normal(0, 0.06))),
        lead_s=float(random.normal(0.02, 0.005)),
        asymmetry=float(random.normal(0, 0.04)),
        smile=float(max(random.normal(0, 0.02), 0)),
    )


def relative_loudness(pcm: Floats, times_s: NDArray[np.float64]) -> Floats:
    """RMS [L] of `pcm` [n] around each of `times_s` [L], in units of the loudest: 0..1."""
    energy = np.concatenate([[0.0], np.cumsum(pcm.astype(np.float64) ** 2)])
    middle = (times_s * SAMPLE_RATE).astype(int)
    first, last = np.maximum(middle - 800, 0), np.minimum(middle + 800, len(pcm))  # a tenth of a second
    heard = np.sqrt((energy[last] - energy[first]) / (last - first))
    return np.asarray(heard / max(float(heard.max()), 1e-6), np.float32)


def _silence(duration_s: float) -> Floats:
    return np.zeros(int(duration_s * SAMPLE_RATE), np.float32)


def _sounds(spec: ClipSpec, random: Random, font: Path | None) -> Clip:
    """Noise, music and knocks, or nothing at all: the mouth stays shut."""
    samples = int((random.uniform(*TRAINED_SOUND_S) if spec.varied else EVALUATED_SOUND_S) * SAMPLE_RATE)
    sound = sounds.sound(spec.voice, samples, random, font)
    most_db = sounds.LOUDEST_BABBLE_DB if spec.voice == "babble" else _LOUDEST_DB
    level_db = random.uniform(_QUIETEST_DB if spec.varied else most_db - 34, most_db)
    if spec.voice in ("white", "noise", "modulated") and random.random() < _FULL_SCALE_CHANCE:
        level_db = random.uniform(_LOUDEST_DB, 6.0)
    pcm = sound * 10 ** (level_db / 20)
    if spec.varied:  # even silence is rarely digital
        floor = random.random() < 0.5
        pcm = pcm + floor * 10 ** (random.uniform(-80, -50) / 20) * sounds.coloured_noise(samples, random)
    frames = frame_count(samples, spec.fps)
    phones = (Phone(0.0, samples / SAMPLE_RATE, "_", SILENCE),)
    times_s = np.arange(frames) / spec.fps
    mouth = arkit_weights(mouth_controls(phones, times_s, Style()), Style())
    idle = idle_weights(frames, spec.fps, np.zeros(frames, np.float32), random)
    return Clip(spec, np.clip(pcm, -1, 1).astype(np.float32), mouth, idle, phones)
