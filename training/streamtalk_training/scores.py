"""Scores of streamed clips against the labels of their phones: what `evaluate` says about one split.

The model's figures come with those of the labels themselves, a ceiling, and with those of a control, a floor.

The control hears other clips' sound: all clips of a split, end to end, are moved round by a share of the whole
and then held against the labels as before. A clip's motion depends on its sound alone, so this is what the model
would have done had it heard that sound; and as clips differ in length, no pause meets the pause of another
clip but by chance (clips shuffled whole do: their leading and trailing silences alone correlate by .3).
Several shifts are tried. The control's correlations are means of their absolute values, since signed ones
would cancel; its other figures are plain means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from streamtalk import Talker
from streamtalk_training import metrics
from streamtalk_training.coarticulation import controls_from_weights
from streamtalk_training.face import Face
from streamtalk_training.setup import speaker_gains
from streamtalk_training.streaming import Reader, Track, end_to_end
from streamtalk_training.visemes import Phone, tables

Floats = NDArray[np.float32]
Figures = dict[str, float]

CONTROL_SHIFTS = (0.2, 0.4, 0.6, 0.8)  # of the whole: the mean of four controls varies less than one
APERTURE_ORDER = ("AA", "EH", "IY", "SZ", "PBM")  # widest first


@dataclass(frozen=True)
class Speech:
    """Sound whose face is known: `pcm` float32 [n] at 16 kHz, `weights` ARKit labels [L, 52] of the canonical
    talker; `idle` are blinks and brows [L, 52], None where nobody knows them."""

    name: str
    pcm: Floats
    phones: tuple[Phone, ...]
    weights: Floats
    idle: Floats | None = None


@dataclass(frozen=True)
class Pair:
    """What the model did on hearing a clip, and what the labels ask of the same speaker."""

    speech: Speech
    speaker: int
    predicted: Track
    true: Track


def pairs(reader: Reader, talker: Talker, speeches: Sequence[Speech]) -> list[Pair]:
    """All clips streamed, each by the next speaker, each in a stream of its own."""
    gains = speaker_gains(len(reader.face.templates))
    done = []
    for index, speech in enumerate(speeches):
        speaker = index % len(gains)
        wanted = speech.weights * np.float32(gains[speaker])
        if speech.idle is not None:
            wanted = np.clip(wanted + speech.idle, 0, 1)
        predicted = reader.streamed(talker, speech.pcm, speaker)
        true = reader.labelled(wanted, speaker)
        frames = min(len(predicted), len(true))
        done.append(Pair(speech, speaker, predicted[:frames], true[:frames]))
    return done


def split_scores(face: Face, streamed: Sequence[Pair], fps: float) -> dict[str, object]:
    """All figures of one split, ready for JSON."""
    controls = [moved_round(streamed, share) for share in CONTROL_SHIFTS]
    floor = floor_of([speech_scores(control, fps) | agreement(control) for control in controls])
    ideal = [replace(pair, predicted=pair.true) for pair in streamed]
    aperture = aperture_by_viseme(streamed, fps)
    return {
        "clips": len(streamed),
        "minutes": sum(len(pair.predicted) for pair in streamed) / fps / 60,
        "model": speech_scores(streamed, fps)
        | agreement(streamed)
        | vertex_scores(face, streamed)
        | {"lag_frames": lag(streamed), "jitter": jitter(streamed, fps)},
        "labels": speech_scores(ideal, fps),
        "control": floor,
        "pauses": pause_scores(streamed, fps),
        "aperture_mm": aperture,
        "control_largest": largest_correlation(floor),
        "aperture_in_order": float(
            sorted(aperture, key=aperture.__getitem__, reverse=True) == list(aperture)
        ),
    }


def floor_of(controls: Sequence[Figures]) -> Figures:
    """One control's figures out of several: means, of correlations those of the absolute values; nan stays."""
    return {
        name: float(
            np.mean([abs(figures[name]) if _correlates(name) else figures[name] for figures in controls])
        )
        for name in controls[0]
    }


def largest_correlation(figures: Figures) -> float:
    """The largest of all absolute correlations; nan, which meets no target, if any of them is."""
    return float(np.max([abs(value) for name, value in figures.items() if _correlates(name)]))


def _correlates(name: str) -> bool:
    return name.startswith("correlation_")


def moved_round(streamed: Sequence[Pair], share: float) -> list[Pair]:
    """The control: motions end to end, moved round by `share` of the whole, and cut as the clips were."""
    whole = end_to_end(pair.predicted for pair in streamed)
    start = round(share * len(whole))
    moved = end_to_end((whole[start:], whole[:start]))
    ends = np.cumsum([len(pair.predicted) for pair in streamed])
    return [
        replace(pair, predicted=moved[int(end) - len(pair.predicted) : int(end)])
        for pair, end in zip(streamed, ends, strict=True)
    ]


def speech_scores(streamed: Sequence[Pair], fps: float) -> Figures:
    """Closure recall, false closures and f/v rolls."""
    recall, false, roll = [], [], []
    fv = tables().controls.index("fv")
    for pair in streamed:
        closed = metrics.closed_frames(pair.predicted.gaps)
        phones = pair.speech.phones
        recall.append(metrics.closure_recall(closed, phones, fps))
        false.append(metrics.false_closures(closed, phones, fps))
        roll.append(metrics.roll_rate(controls_from_weights(pair.predicted.weights)[:, fv], phones, fps))
    pools = {"closure_recall": recall, "false_closures": false, "fv_roll": roll}
    return {name: metrics.pooled(shares).value for name, shares in pools.items()}


def agreement(streamed: Sequence[Pair]) -> Figures:
    """Correlation of every control, and of the lips' gap, over all frames of all clips."""
    predicted, true = _controls(streamed)
    found = {
        f"correlation_{name}": metrics.correlation(predicted[:, column], true[:, column])
        for column, name in enumerate(tables().controls)
    }
    return found | {"correlation_gap": metrics.correlation(*_both(streamed, _mean_gap))}


def lag(streamed: Sequence[Pair]) -> float:
    """Frames by which the lips' gap comes after that of the labels."""
    return float(metrics.lag_frames(*_both(streamed, _mean_gap)))


def vertex_scores(face: Face, streamed: Sequence[Pair]) -> Figures:
    """LVE and FDD in mm^2 (FDD where the labels know the upper face), MOD in mm: means over clips."""
    lips = np.arange(len(face.lips))
    lve = [metrics.lip_vertex_error(pair.predicted.lips, pair.true.lips, lips) for pair in streamed]
    mod = [float(np.abs(pair.predicted.gaps - pair.true.gaps).mean()) for pair in streamed]
    fdd = [
        float((pair.true.upper.std(0) - pair.predicted.upper.std(0)).mean())
        for pair in streamed
        if pair.speech.idle is not None
    ]
    found = {"lve_mm2": float(np.mean(lve)) * 1e6, "mod_mm": float(np.mean(mod)) * 1e3}
    return found | ({"fdd_mm2": float(np.mean(fdd)) * 1e6} if fdd else {})


def jitter(streamed: Sequence[Pair], fps: float) -> float:
    """Energy of the lips above 6 Hz within vowels of 120 ms or more, as a multiple of the labels' own."""
    model, labels = 0.0, 0.0
    for pair in streamed:
        frames = metrics.sustained_frames(len(pair.predicted), pair.speech.phones, fps)
        model += metrics.tremble(pair.predicted.lips, frames, fps)
        labels += metrics.tremble(pair.true.lips, frames, fps)
    return model / labels if labels else float("nan")


def pause_scores(streamed: Sequence[Pair], fps: float) -> Figures:
    """What the mouth does at least .3 s from any speech: gaps in mm, mean speed of the lips in mm/s.

    nan where no clip has such a pause.
    """
    gaps: list[float] = []
    moves: list[float] = []
    for pair in streamed:
        quiet = metrics.quiet_frames(len(pair.predicted), pair.speech.phones, fps)
        gaps += pair.predicted.gaps[quiet].max(1).tolist()
        moves += pair.predicted.lip_moves[1:][quiet[1:] & quiet[:-1]].tolist()
    return {
        "gap_p95_mm": float(np.percentile(gaps, 95)) * 1e3 if gaps else float("nan"),
        "gap_max_mm": max(gaps) * 1e3 if gaps else float("nan"),
        "lip_speed_mm_s": float(np.mean(moves)) * fps * 1e3 if moves else float("nan"),
    }


def aperture_by_viseme(streamed: Sequence[Pair], fps: float) -> Figures:
    """Mean lip gap in mm in the middle of each viseme of `APERTURE_ORDER`."""
    found: dict[str, list[float]] = {name: [] for name in APERTURE_ORDER}
    for pair in streamed:
        gaps = _mean_gap(pair.predicted)
        for phone in pair.speech.phones:
            middle = round((phone.start_s + phone.end_s) / 2 * fps)
            if phone.viseme in found and middle < len(gaps):
                found[phone.viseme].append(float(gaps[middle]))
    return {name: float(np.mean(values)) * 1e3 for name, values in found.items() if values}


def _mean_gap(track: Track) -> Floats:
    return np.asarray(track.gaps.mean(1), np.float32)


def _controls(streamed: Sequence[Pair]) -> tuple[Floats, Floats]:
    return _both(streamed, lambda track: controls_from_weights(track.weights))


def _both(streamed: Sequence[Pair], reading: Callable[[Track], Floats]) -> tuple[Floats, Floats]:
    """A reading of all predictions, and of all labels, end to end."""
    return (
        np.concatenate([reading(pair.predicted) for pair in streamed]),
        np.concatenate([reading(pair.true) for pair in streamed]),
    )
