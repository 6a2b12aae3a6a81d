"""Music made up from nothing: chords, bass, melody and drums, which must not open a mouth.

Timbres: additive pads, saw teeth, resonances that sweep as formants do, frequency modulation (Chowning, 1973),
plucked strings (Karplus and Strong, 1983) and, where a SoundFont is at hand, recorded instruments; any of them bright
or dark. A mix may be driven, echoed, pumped to the beat and swept as a whole, as dance music is. Sparse songs are the
hardest: short notes, rests and bursts of noise are the rhythm of syllables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, lfilter, sosfilt

from streamtalk_training import soundfont

Doubles = NDArray[np.float64]
Random = np.random.Generator
Instrument = Callable[[float, int, Random], Doubles]  # pitch in Hz, samples, randomness

SAMPLE_RATE = 16000
_CHORDS = ((0, 4, 7), (0, 3, 7), (0, 5, 9), (2, 5, 9), (-1, 2, 7), (0, 4, 7, 11), (-3, 0, 4), (-5, -1, 2, 5))
_SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), (0, 3, 5, 6, 7, 10))
_PARTS = {"chords": 0.8, "bass": 0.6, "melody": 0.7, "drums": 0.55}  # how often a song has each
_SPARSE = 0.4  # of the songs
_STACCATO = 0.7  # chords held for less of their time may follow each other faster
_SWEEP_STEP = 128  # samples between two settings of a moving filter
_TUNED_FROM_HZ = 261.6  # a recorded sample is taken to sound middle C: in tune with itself, as music needs


def song(samples: int, random: Random, font: Path | None = None) -> Doubles:
    """Music [samples] of unit RMS in a random key, tempo and line-up."""
    sparse = random.random() < _SPARSE
    score = _Score(
        beat=int(SAMPLE_RATE * random.uniform(0.28, 0.75)),
        root_hz=110 * 2 ** (random.integers(0, 12) / 12),
        scale=_SCALES[random.integers(len(_SCALES))],
        chords=tuple(_CHORDS[random.integers(len(_CHORDS))] for _ in range(4)),
        held=random.uniform(0.2, 0.9) if sparse else random.uniform(0.8, 1.2),
        rests=random.uniform(0.1, 0.6) if sparse else 0.15,
    )
    thinned = 0.6 if sparse else 1.0
    line_up = {part: random.random() < chance * thinned for part, chance in _PARTS.items()}
    if not any(line_up.values()):
        line_up["chords"] = True
    mixed = np.zeros(samples)
    for part, plays in line_up.items():
        if not plays:
            continue
        track = np.zeros(samples)
        if part == "drums":
            _drums(track, score.beat, random, font)
        else:
            _PLAYERS[part](track, score, _instrument(random, font), random)
        loud = float(np.sqrt(np.mean(track**2)))
        mixed += track / max(loud, 1e-9) * random.uniform(0.3, 1.0)
    mixed = _produced(mixed / max(float(np.sqrt(np.mean(mixed**2))), 1e-9), score.beat, random)
    return np.asarray(mixed / max(float(np.sqrt(np.mean(mixed**2))), 1e-9))


def _produced(mixed: Doubles, beat: int, random: Random) -> Doubles:
    """A mix of unit RMS as a studio may leave it."""
    if random.random() < 0.4:
        drive = random.uniform(0.5, 4)
        mixed = np.tanh(drive * mixed) / np.tanh(drive)
    if random.random() < 0.4:
        back = int(beat * random.choice([0.5, 0.75, 1]))
        feedback = np.zeros(back + 1)
        feedback[0], feedback[back] = 1, -random.uniform(0.2, 0.6)
        mixed = np.asarray(lfilter([1.0], feedback, mixed))
    if random.random() < 0.3:  # ducks at every beat, as under a loud kick
        since = np.arange(len(mixed)) % beat / beat
        mixed = mixed * (1 - random.uniform(0.3, 0.9) * np.exp(-since * random.uniform(3, 8)))
    if random.random() < 0.3:
        mixed = _swept(mixed, random, rate_hz=random.uniform(0.1, 0.8))
    return mixed


def _swept(sound: Doubles, random: Random, rate_hz: float) -> Doubles:
    """`sound` through one or two resonances that wander between 250 and 3500 Hz at about `rate_hz`."""
    frames = len(sound) // _SWEEP_STEP + 2
    time_s = np.arange(frames) * _SWEEP_STEP / SAMPLE_RATE
    swept = np.zeros_like(sound)
    for _ in range(int(random.integers(1, 3))):
        wander = np.sin(2 * np.pi * (rate_hz * random.uniform(0.7, 1.4) * time_s + random.random()))
        centre_hz = 900 * (3.6 ** (0.95 * wander))
        width = random.uniform(0.15, 0.8)  # of the centre
        state = np.zeros(2)
        for index in range(0, len(sound), _SWEEP_STEP):
            at_hz = float(np.clip(centre_hz[index // _SWEEP_STEP], 250, 3500))
            radius = float(np.exp(-np.pi * width * at_hz / SAMPLE_RATE))
            poles = [1.0, -2 * radius * np.cos(2 * np.pi * at_hz / SAMPLE_RATE), radius**2]
            part = slice(index, index + _SWEEP_STEP)
            out, state = lfilter([1 - radius], poles, sound[part], zi=state)
            swept[part] += out
    return swept


@dataclass(frozen=True)
class _Score:
    """What all parts of a song agree on: `beat` in samples, the root's pitch, a scale and its chords in semitones,
    the share of a note's time for which it is `held`, and the share of the notes that are `rests`."""

    beat: int
    root_hz: float
    scale: tuple[int, ...]
    chords: tuple[tuple[int, ...], ...]
    held: float
    rests: float


def _play_chords(track: Doubles, score: _Score, instrument: Instrument, random: Random) -> None:
    bar = score.beat * float(random.choice([0.5, 1, 2, 4] if score.held < _STACCATO else [2, 4]))
    for index, start in enumerate(range(0, len(track), int(bar))):
        if random.random() < score.rests / 2:
            continue
        for step in score.chords[index % len(score.chords)]:
            _add(track, start, instrument(score.root_hz * 2 ** (step / 12), int(bar * score.held), random))


def _play_bass(track: Doubles, score: _Score, instrument: Instrument, random: Random) -> None:
    for index, start in enumerate(range(0, len(track), score.beat)):
        if random.random() >= score.rests:
            pitch_hz = score.root_hz / 2 * 2 ** (score.chords[index // 4 % len(score.chords)][0] / 12)
            _add(track, start, instrument(pitch_hz, int(score.beat * score.held), random))


def _play_melody(track: Doubles, score: _Score, instrument: Instrument, random: Random) -> None:
    scale, octave = score.scale, float(random.choice([0.5, 1, 1]))
    start, degree = 0, int(random.integers(0, len(scale)))
    while start < len(track):
        length = int(score.beat * random.choice([0.25, 0.5, 0.5, 1, 1, 2]))
        degree = int(np.clip(degree + random.integers(-2, 3), -len(scale), 2 * len(scale)))
        step = scale[degree % len(scale)] + 12 * (degree // len(scale))
        if random.random() >= score.rests:
            pitch_hz = 2 * octave * score.root_hz * 2 ** (step / 12)
            _add(track, start, instrument(pitch_hz, int(length * score.held), random))
        start += length


_PLAYERS = {"chords": _play_chords, "bass": _play_bass, "melody": _play_melody}


def _drums(track: Doubles, beat: int, random: Random, font: Path | None) -> None:
    """Kick, snare and hat, synthesised, with recorded percussion mixed in where there is some.

    The snare is a burst of noise in a band of its own, as short as a click or as long as a fricative.
    """
    decay = float(np.exp(random.uniform(np.log(8), np.log(40))))
    low_hz = float(np.exp(random.uniform(np.log(100), np.log(3000))))
    band = butter(
        1, [low_hz, min(low_hz * random.uniform(3, 20), 7500)], "bandpass", fs=SAMPLE_RATE, output="sos"
    )
    steady = random.random() < 0.5  # else hits fall where they like
    for index, start in enumerate(range(0, len(track), max(beat // 2, 1))):
        if not steady and random.random() < 0.4:
            continue
        time_s = np.arange(int(0.35 * SAMPLE_RATE)) / SAMPLE_RATE
        hiss = random.standard_normal(len(time_s))
        hit = 0.3 * np.diff(hiss, prepend=0.0) * np.exp(-time_s * 60)
        if index % 4 == 0:
            hit = hit + 2 * np.sin(2 * np.pi * (45 * time_s + 3 * (1 - np.exp(-time_s * 30)))) * np.exp(
                -time_s * 18
            )
        elif index % 4 == 2:
            hit = hit + 2 * np.asarray(sosfilt(band, hiss)) * np.exp(-time_s * decay)
        _add(track, start, hit * random.uniform(0.7, 1.0))
    if font is not None:
        shots = [sample for sample in soundfont.samples(font) if sample.loop is None]
        shot = shots[random.integers(len(shots))]
        for start in range(0, len(track), beat):
            _add(track, start, soundfont.note(shot, beat, SAMPLE_RATE, 1.0))


def _add(track: Doubles, start: int, sound: Doubles) -> None:
    kept = sound[: max(len(track) - start, 0)]
    track[start : start + len(kept)] += kept


def _instrument(random: Random, font: Path | None) -> Instrument:
    if font is not None and random.random() < 0.5:
        looped = [sample for sample in soundfont.samples(font) if sample.loop is not None]
        return _recorded(looped[random.integers(len(looped))])
    makers = (_pad, _saw, _unison, _resonant, _modulated, _plucked)
    made = makers[random.integers(len(makers))](random)
    return _dark(made, random) if random.random() < 0.35 else made


def _dark(instrument: Instrument, random: Random) -> Instrument:
    """`instrument` without what lies above a corner between 500 Hz and 3 kHz."""
    corner_hz = float(np.exp(random.uniform(np.log(500), np.log(3000))))
    low = butter(3, corner_hz, "low", fs=SAMPLE_RATE, output="sos")

    def play(pitch_hz: float, samples: int, random: Random) -> Doubles:
        return np.asarray(sosfilt(low, instrument(pitch_hz, samples, random)))

    return play


def _envelope(samples: int, attack_s: float, release_s: float) -> Doubles:
    time_s = np.arange(samples) / SAMPLE_RATE
    left_s = time_s[-1] - time_s if samples else time_s
    return np.clip(time_s / max(attack_s, 1e-3), 0, 1) * np.clip(left_s / max(release_s, 1e-3), 0, 1)


def _vibrato(pitch_hz: float, samples: int, depth: float, rate_hz: float) -> Doubles:
    """The phase, in cycles, of a note that wavers by `depth` (share of its pitch)."""
    time_s = np.arange(samples) / SAMPLE_RATE
    return pitch_hz * (time_s - depth * np.cos(2 * np.pi * rate_hz * time_s) / (2 * np.pi * rate_hz))


def _recorded(sample: soundfont.Sample) -> Instrument:
    def play(pitch_hz: float, samples: int, random: Random) -> Doubles:
        del random
        transpose = float(np.clip(pitch_hz / _TUNED_FROM_HZ, 0.25, 4))
        return soundfont.note(sample, samples, SAMPLE_RATE, transpose) * _envelope(samples, 0.005, 0.08)

    return play


def _pad(random: Random) -> Instrument:
    shares = random.uniform(0, 1, int(random.integers(2, 12))) ** 2
    depth, rate_hz, attack_s = random.uniform(0, 0.01), random.uniform(3, 7), random.uniform(0.005, 0.3)

    def play(pitch_hz: float, samples: int, random: Random) -> Doubles:
        phase = _vibrato(pitch_hz, samples, depth, rate_hz) + random.random()
        sound = np.zeros(samples)
        for harmonic, share in enumerate(shares, 1):
            if pitch_hz * harmonic < SAMPLE_RATE / 2.2:
                sound += share / harmonic * np.sin(2 * np.pi * harmonic * phase)
        return sound * _envelope(samples, attack_s, 0.1)

    return play


def _saw(random: Random) -> Instrument:
    depth, rate_hz = random.uniform(0, 0.012), random.uniform(3, 7)
    cutoff_hz, square = float(np.exp(random.uniform(np.log(300), np.log(6000)))), random.random() < 0.3

    def play(pitch_hz: float, samples: int, random: Random) -> Doubles:
        del random
        phase = _vibrato(pitch_hz, samples, depth, rate_hz)
        sound = np.sign(np.sin(2 * np.pi * phase)) if square else 2 * (phase % 1) - 1
        low = butter(2, cutoff_hz, "low", fs=SAMPLE_RATE, output="sos")
        return np.asarray(sosfilt(low, sound)) * _envelope(samples, 0.01, 0.06)

    return play


def _unison(random: Random) -> Instrument:
    saw, voices, detuned = _saw(random), int(random.integers(2, 6)), random.uniform(0.002, 0.02)

    def play(pitch_hz: float, samples: int, random: Random) -> Doubles:
        pitches = pitch_hz * (1 + detuned * random.standard_normal(voices))
        return np.asarray(sum(saw(float(pitch), samples, random) for pitch in pitches))

    return play


def _resonant(random: Random) -> Instrument:
    rate_hz = float(np.exp(random.uniform(np.log(0.5), np.log(8))))
    saw = _saw(random)

    def play(pitch_hz: float, samples: int, random: Random) -> Doubles:
        return _swept(saw(pitch_hz, samples, random), random, rate_hz)

    return play


def _modulated(random: Random) -> Instrument:
    ratio, index = float(random.choice([0.5, 1, 1.41, 2, 3, 3.5, 7])), random.uniform(0.5, 8)
    decay = random.uniform(0.5, 8)

    def play(pitch_hz: float, samples: int, random: Random) -> Doubles:
        del random
        time_s = np.arange(samples) / SAMPLE_RATE
        fading = np.exp(-decay * time_s)
        carrier = 2 * np.pi * pitch_hz * time_s
        sound = np.sin(carrier + index * fading * np.sin(ratio * carrier))
        return sound * fading * _envelope(samples, 0.003, 0.02)

    return play


def _plucked(random: Random) -> Instrument:
    keep = random.uniform(0.985, 0.999)

    def play(pitch_hz: float, samples: int, random: Random) -> Doubles:
        period = max(int(SAMPLE_RATE / pitch_hz), 2)
        burst = np.zeros(samples)
        burst[:period] = random.uniform(-1, 1, min(period, samples))
        feedback = np.zeros(period + 2)
        feedback[0], feedback[period], feedback[period + 1] = 1, -keep / 2, -keep / 2
        return np.asarray(lfilter([1.0], feedback, burst)) * _envelope(samples, 0.001, 0.03)

    return play
