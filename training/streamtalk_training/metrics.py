"""How good a talking face is: numbers from arrays, nothing else.

LVE, FDD and MOD follow the evaluation of StreamingTalker (arXiv 2511.14223) and its predecessors; closures
and the lag follow the project's own definitions, which each docstring states in full. L frames, V vertices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfiltfilt

from streamtalk_training.visemes import BILABIAL, LABIODENTAL, SILENCE, VOWELS, Phone

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

CLOSED_SHARE = 0.1  # of the clip's 95th percentile of the gap
CLOSURE_MARGIN_S = 0.04
QUIET_MARGIN_S = 0.3
SUSTAINED_S = 0.12
TREMBLE_HZ = 6.0  # syllables come at 3 to 6 a second; what is faster in the middle of a vowel is jitter
BLINK_LEVEL = 0.5


def lip_vertex_error(predicted: Floats, true: Floats, lips: NDArray[np.integer]) -> float:
    """LVE of vertices [L, V, 3]: mean over frames of the largest squared distance of a lip vertex (m^2)."""
    distance = np.square(predicted[:, lips] - true[:, lips]).sum(-1)
    return float(distance.max(1).mean())


def face_dynamics_deviation(
    predicted: Floats, true: Floats, template: Floats, upper: NDArray[np.integer]
) -> float:
    """FDD of vertices [L, V, 3] against template [V, 3]: mean over upper-face vertices of the temporal
    standard deviation of the squared displacement (m^2), truth minus prediction."""

    def dynamics(vertices: Floats) -> Floats:
        return np.asarray(np.square(vertices[:, upper] - template[upper]).sum(-1).std(0), np.float32)

    return float((dynamics(true) - dynamics(predicted)).mean())


def mouth_opening_difference(predicted: Floats, true: Floats, lip_pairs: NDArray[np.integer]) -> float:
    """MOD of vertices [L, V, 3]: mean absolute difference of the lip pairs' distances (m)."""
    return float(np.abs(lip_gaps(predicted, lip_pairs) - lip_gaps(true, lip_pairs)).mean())


def lip_gaps(vertices: Floats, lip_pairs: NDArray[np.integer]) -> Floats:
    """Distances [L, P] across lip pairs [P, 2] of vertices [L, V, 3]."""
    across = vertices[:, lip_pairs[:, 0]] - vertices[:, lip_pairs[:, 1]]
    return np.asarray(np.sqrt(np.square(across).sum(-1)), np.float32)


def closed_frames(gaps: Floats) -> Bools:
    """Frames [L] whose mouth is shut: most lip pairs are closed.

    A pair is closed where its gap [L, P] is below a tenth of the clip's 95th percentile.
    """
    closed = gaps < CLOSED_SHARE * np.percentile(gaps, 95, axis=0)
    return np.asarray(closed.mean(axis=1) > 0.5)


@dataclass(frozen=True)
class Share:
    """`count` of `total`."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else float("nan")


def pooled(shares: Iterable[Share]) -> Share:
    parts = list(shares)
    return Share(sum(part.count for part in parts), sum(part.total for part in parts))


def closure_recall(closed: Bools, phones: Sequence[Phone], fps: float) -> Share:
    """Bilabials (/p b m/) with a closed frame within 40 ms of the phone."""
    return _phones_with(closed, phones, fps, BILABIAL, CLOSURE_MARGIN_S)


def false_closures(closed: Bools, phones: Sequence[Phone], fps: float) -> Share:
    """Vowel frames that are closed."""
    vowels = [_inside(len(closed), p, fps, 0.0) for p in phones if p.viseme in VOWELS]
    return Share(sum(int(closed[rows].sum()) for rows in vowels), sum(map(len, vowels)))


def roll_rate(roll: Floats, phones: Sequence[Phone], fps: float) -> Share:
    """Labiodentals (/f v/) during which the lower lip's roll [L] passes half of its 95th percentile.

    The frame nearest to the phone's middle counts as inside even where the phone is shorter than a frame.
    """
    return _phones_with(roll > 0.5 * np.percentile(roll, 95), phones, fps, LABIODENTAL, 0.5 / fps)


def quiet_frames(frames: int, phones: Sequence[Phone], fps: float) -> Bools:
    """Frames [L] at least .3 s from any speech."""
    quiet = np.ones(frames, np.bool_)
    for phone in phones:
        if phone.viseme != SILENCE:
            quiet[_inside(frames, phone, fps, QUIET_MARGIN_S)] = False
    return quiet


def sustained(phones: Sequence[Phone]) -> list[Phone]:
    """The vowels of 120 ms or more."""
    return [
        phone for phone in phones if phone.viseme in VOWELS and phone.end_s - phone.start_s >= SUSTAINED_S
    ]


def sustained_frames(frames: int, phones: Sequence[Phone], fps: float) -> Bools:
    """Frames [L] within vowels of 120 ms or more."""
    inside = np.zeros(frames, np.bool_)
    for phone in sustained(phones):
        inside[_inside(frames, phone, fps, 0.0)] = True
    return inside


def tremble(lips: Floats, frames: Bools, fps: float) -> float:
    """Energy above 6 Hz (m^2, summed over the chosen `frames` [L], mean over vertices) of lips [L, k, 3].

    A Butterworth high-pass of fourth order, run both ways; 0 for clips too short to filter.
    """
    if len(lips) < fps or not frames.any():
        return 0.0
    high_pass = butter(4, TREMBLE_HZ, "highpass", fs=fps, output="sos")
    fast = sosfiltfilt(high_pass, lips.astype(np.float64), axis=0)[frames]
    return float(np.square(fast).sum(-1).mean(1).sum())


def blinks(lids: Floats) -> NDArray[np.int64]:
    """Frames at which lids [L] (0 open, 1 shut) come to stand more than half shut."""
    shut = lids > BLINK_LEVEL
    return np.flatnonzero(shut & ~np.concatenate([[False], shut[:-1]]))


def _phones_with(flags: Bools, phones: Sequence[Phone], fps: float, viseme: str, margin_s: float) -> Share:
    wanted = [phone for phone in phones if phone.viseme == viseme]
    return Share(sum(bool(flags[_inside(len(flags), p, fps, margin_s)].any()) for p in wanted), len(wanted))


def _inside(frames: int, phone: Phone, fps: float, margin_s: float) -> NDArray[np.int64]:
    times_s = np.arange(frames) / fps
    return np.flatnonzero((times_s >= phone.start_s - margin_s) & (times_s <= phone.end_s + margin_s))


def correlation(predicted: Floats, true: Floats) -> float:
    """Pearson's correlation of two tracks [L]; nan where either stands still."""
    if float(predicted.std()) < 1e-9 or float(true.std()) < 1e-9:
        return float("nan")
    return float(np.corrcoef(predicted, true)[0, 1])


def lag_frames(predicted: Floats, true: Floats, most: int = 10) -> int:
    """Frames that `predicted` [L] comes after `true` [L], at the peak of their cross-correlation."""
    length = min(len(predicted), len(true))

    def at(lag: int) -> float:
        late = predicted[max(lag, 0) : length + min(lag, 0)]
        early = true[max(-lag, 0) : length - max(lag, 0)]
        return correlation(late, early)

    lags = range(-most, most + 1)
    return max(lags, key=lambda lag: np.nan_to_num(at(lag), nan=-2.0))
