"""What a talker does outside of plain speech: silence, noise, music, half an hour on end, another seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamtalk import Talker
from streamtalk_training import metrics
from streamtalk_training.clips import SAMPLE_RATE
from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.real_speech import MUSIC, decoded
from streamtalk_training.scores import Figures, Pair
from streamtalk_training.streaming import BLINK_SHAPES, Reader, Track, blocks, end_to_end, frames_of

Floats = NDArray[np.float32]

SOUND_S = 10.0
NOISE_LEVELS_DB = (-40, -20, -10)
MUSIC_LEVEL_DB = -20
MUSIC_START_S = 20.0  # past the introduction
LOOP_S = 60.0
SEEDS_S = 180.0
FROZEN = 0.5  # of a lip vertex's spread in the second pass: below it, it has stopped moving
EXPLODED = 2.0  # times the second pass's widest excursion: of lip vertices, and of all vertices
BROW_SHAPES = ("browInnerUp", "browOuterUpLeft", "browOuterUpRight", "browDownLeft", "browDownRight")
SAME_BLINK_S = 0.2


def sounds(debian: Path | None, seed: int = 0) -> dict[str, Floats]:
    """Ten seconds each that hold no speech: PCM float32 [n] at 16 kHz by name.

    `debian` is where `asterisk-moh-opsound-g722` was unpacked; without it, made-up music alone.
    """
    random = np.random.default_rng(seed)
    count = round(SOUND_S * SAMPLE_RATE)
    made = {"silence": np.zeros(count, np.float32)}
    for level_db in NOISE_LEVELS_DB:
        made[f"white noise {level_db} dB"] = at_level(random.standard_normal(count), level_db)
    made["music, made up"] = at_level(music(count, random), MUSIC_LEVEL_DB)
    recorded = [] if debian is None else sorted((debian / MUSIC).glob("*.g722"))
    first = round(MUSIC_START_S * SAMPLE_RATE)
    for path in recorded:
        made[f"music, {path.stem}"] = at_level(decoded(path)[first : first + count], MUSIC_LEVEL_DB)
    return made


def at_level(sound: NDArray[np.floating], level_db: float) -> Floats:
    """`sound` [n] with an RMS of `level_db` below full scale, clipped there."""
    scale = 10 ** (level_db / 20) / max(float(np.sqrt(np.mean(np.square(sound)))), 1e-9)
    return np.clip(sound * scale, -1, 1).astype(np.float32)


def music(samples: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Chords of plucked and held notes over a bass and a hi-hat: [samples], of no particular level."""
    time_s = np.arange(samples) / SAMPLE_RATE
    mix = np.zeros(samples)
    beat_s = 0.5
    for beat in range(int(samples / SAMPLE_RATE / beat_s)):
        since_s = time_s - beat * beat_s
        after = np.flatnonzero((since_s >= 0) & (since_s < 4 * beat_s))
        root = 110 * 2 ** (random.choice((0, 3, 5, 7, 8, 10)) / 12)
        for step in (0, 7, 12, random.choice((15, 16))):
            pitch = root * 2 ** (step / 12)
            decay = np.exp(-since_s[after] / random.choice((0.3, 1.5)))
            for harmonic in range(1, 7):
                turn = 2 * np.pi * harmonic * pitch * since_s[after]
                mix[after] += decay * np.sin(turn + random.uniform(0, 6.3)) / harmonic**1.5
        hat = after[: SAMPLE_RATE // 20]
        mix[hat] += 0.7 * random.standard_normal(len(hat)) * np.exp(-since_s[hat] / 0.02)
    return mix


def sound_scores(
    reader: Reader, talker: Talker, heard: Mapping[str, Floats], speech: Sequence[Pair]
) -> dict[str, Figures]:
    """Of each sound: the lips' gap in mm (95th percentile, widest), the share of frames with a closed mouth, and
    motion of lips and face as shares of that in `speech`.

    Closed is the mouth whose lip pairs mostly stand below a tenth of speech's 95th percentile. Blinks are no
    motion.
    """
    spoken = end_to_end(pair.predicted for pair in speech)
    shut = metrics.CLOSED_SHARE * np.percentile(spoken.gaps, 95, axis=0)
    scores = {}
    for name, pcm in heard.items():
        track = reader.streamed(talker, pcm, speaker=0)
        widest = track.gaps.max(1)
        scores[name] = {
            "gap_p95_mm": float(np.percentile(widest, 95)) * 1e3,
            "gap_max_mm": float(widest.max()) * 1e3,
            "closed": float(((track.gaps < shut).mean(1) > 0.5).mean()),
            "lip_motion": float(track.lip_moves.mean() / spoken.lip_moves.mean()),
            "face_motion": float(track.face_moves.mean() / spoken.face_moves.mean()),
        }
    return scores


@dataclass(frozen=True)
class Pass:
    """One pass through the loop. Mean and spread of the lips' gap (m) and of the jaw's weight; of the lips'
    vertices [k] the spread, and the farthest any came from rest (m); the same of all vertices of the face, nan
    where one is no number."""

    gap_mean: float
    gap_std: float
    jaw_mean: float
    jaw_std: float
    lip_spread: Floats
    farthest: float
    farthest_of_face: float


def loop_passes(reader: Reader, talker: Talker, pcm: Floats, passes: int) -> Iterator[Pass]:
    """`pcm`, a whole number of frames, heard `passes` times by one stream without a break."""
    frames = int(len(pcm) * talker.fps // SAMPLE_RATE)
    rest = reader.face.templates[0][reader.face.lips]
    kept: list[Track] = []
    for track in reader.tracks(blocks(frames_of(talker, np.tile(pcm, passes), speaker=0, seed=0)), speaker=0):
        kept.append(track)
        while sum(map(len, kept)) >= frames:
            whole = end_to_end(kept)
            yield _pass(whole[:frames], rest)
            kept = [whole[frames:]]


def _pass(track: Track, rest: Floats) -> Pass:
    gap, jaw = track.gaps.mean(1), track.weights[:, ARKIT_INDEX["jawOpen"]]
    away = np.linalg.norm(track.lips - rest, axis=-1)
    spread = np.sqrt(track.lips.var(0).sum(-1))
    return Pass(
        float(gap.mean()),
        float(gap.std()),
        float(jaw.mean()),
        float(jaw.std()),
        spread,
        float(away.max()),
        float(track.farthest.max()),
    )


def loop_scores(passes: Sequence[Pass]) -> dict[str, object]:
    """The last pass against the second (the first begins from stillness): relative changes of lip statistics,
    the share of lip vertices that froze, and whether any vertex of the face exploded or is no number (in any
    pass)."""
    second, last = passes[1], passes[-1]
    names = ("gap_mean", "gap_std", "jaw_mean", "jaw_std")
    changes = {name: abs(getattr(last, name) / getattr(second, name) - 1) for name in names}
    farthest = ("farthest", "farthest_of_face")
    finite = all(np.isfinite([getattr(one, name) for one in passes for name in farthest]))
    wide = any(getattr(one, n) > EXPLODED * getattr(second, n) for one in passes[1:] for n in farthest)
    return {
        "passes": len(passes),
        "changes": changes,
        "largest_change": max(changes.values()),
        "frozen": float((last.lip_spread < FROZEN * second.lip_spread).mean()),
        "exploded": float(not finite or wide),
        "by_pass": {name: [getattr(one, name) for one in passes] for name in names},
    }


def stretch(clips: Sequence[Floats], seconds: float) -> Floats:
    """PCM float32 [n] of so many seconds, cut from clips end to end; all that there is, to whole seconds, where
    that is less."""
    whole = np.concatenate(clips)[: round(seconds * SAMPLE_RATE)]
    return whole[: len(whole) // SAMPLE_RATE * SAMPLE_RATE]


def seed_scores(first: Track, second: Track, fps: float) -> Figures:
    """The same speech under two seeds: what must differ (blinks, brows) and what must not (lips).

    `blinks_shared` is the share of blinks of either seed with one of the other within .2 s;
    `closures_agree` the share of frames that are closed under both or neither.
    """
    ours, theirs = (metrics.blinks(mean_weight(track, BLINK_SHAPES)) for track in (first, second))
    brows = [mean_weight(track, BROW_SHAPES) for track in (first, second)]
    closed = [metrics.closed_frames(track.gaps) for track in (first, second)]
    minutes = len(first) / fps / 60
    return {
        "minutes": minutes,
        "blinks_per_minute": (len(ours) + len(theirs)) / 2 / minutes,
        "blinks_shared": shared(ours, theirs, round(SAME_BLINK_S * fps)),
        "brows_correlation": metrics.correlation(brows[0], brows[1]),
        "brows_std": float(brows[0].std()),
        "closures_agree": float((closed[0] == closed[1]).mean()),
        "lips_correlation": metrics.correlation(first.gaps.mean(1), second.gaps.mean(1)),
    }


def mean_weight(track: Track, names: Sequence[str]) -> Floats:
    return np.asarray(track.weights[:, [ARKIT_INDEX[name] for name in names]].mean(1), np.float32)


def shared(ours: NDArray[np.int64], theirs: NDArray[np.int64], within: int) -> float:
    """Share of the frames of either list that have one of the other's within `within`; nan without any."""
    if not len(ours) and not len(theirs):
        return float("nan")
    if not len(ours) or not len(theirs):
        return 0.0
    near = np.abs(ours[:, None] - theirs[None]) <= within
    return float((near.any(1).sum() + near.any(0).sum()) / (len(ours) + len(theirs)))
