"""What a face does besides speaking: blinks, glances and brows. It never touches the lips."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamtalk_export.blendshapes import ARKIT_NAMES
from streamtalk_training.coarticulation import ARKIT_INDEX

Floats = NDArray[np.float32]
Random = np.random.Generator

BLINK_GAP_S = 3.2  # median; with the spread below about 17 blinks a minute
BLINK_GAP_SPREAD = 0.5  # of the log
LEAST_BLINK_GAP_S = 0.6
BLINK_PAUSE_BIAS = 0.6  # share of the blinks that wait for, or hasten to, the quietest moment near by
_BIAS_REACH_S = 0.5
FIXATION_S = 0.9  # median
FIXATION_SPREAD = 0.7  # of the log
MOST_GAZE = 0.25  # weight of eyeLook* at the widest glance
RAISE_CHANCE = 0.3  # of a stressed syllable
RAISES = (0.15, 0.35)  # weights of a brow raise
BROW_NOISE = 0.07  # the most that a brow wanders otherwise
FROWN_NOISE = 0.05
_STRESS = 0.7  # of the loudest frame: a syllable this loud is stressed
_LEAST_RAISE_GAP_S = 0.8
_ALIKE = 0.02  # loudness: moments this near to the quietest are as good


def idle_weights(frames: int, fps: float, loudness: Floats, random: Random) -> Floats:
    """ARKit weights [frames, 52] of idle motion; `loudness` [frames] in 0..1 is all it knows of the sound."""
    weights = np.zeros((frames, len(ARKIT_NAMES)), np.float32)
    blink = _blinks(frames, fps, loudness, random)
    raised = _raises(frames, fps, loudness, random)
    brows = raised + BROW_NOISE / 2 * (1 + np.tanh(slow_noise(frames, fps, 0.3, random)))
    frown = FROWN_NOISE / 2 * (1 + np.tanh(slow_noise(frames, fps, 0.2, random))) * (1 - raised / RAISES[1])
    aside, up = _gaze(frames, fps, random)
    up = up - 0.1 * blink  # the eyes dip a little as the lids come down
    weights[:, ARKIT_INDEX["browInnerUp"]] = brows
    for side in ("Left", "Right"):
        weights[:, ARKIT_INDEX["eyeBlink" + side]] = blink
        weights[:, ARKIT_INDEX["browOuterUp" + side]] = 0.6 * brows
        weights[:, ARKIT_INDEX["browDown" + side]] = frown
        weights[:, ARKIT_INDEX["eyeLookUp" + side]] = np.maximum(up, 0)
        weights[:, ARKIT_INDEX["eyeLookDown" + side]] = np.maximum(-up, 0)
    for side, towards in (("Left", aside), ("Right", -aside)):
        weights[:, ARKIT_INDEX["eyeLookOut" + side]] = np.maximum(towards, 0)
        weights[:, ARKIT_INDEX["eyeLookIn" + side]] = np.maximum(-towards, 0)
    return np.clip(weights, 0, 1).astype(np.float32)


def slow_noise(frames: int, fps: float, cutoff_hz: float, random: Random) -> Floats:
    """Noise [frames] of unit variance, smoothed to about `cutoff_hz`."""
    width = max(int(fps / cutoff_hz / 2), 1)
    kernel = np.hanning(2 * width + 1)
    noise = np.convolve(random.standard_normal(frames + 2 * width), kernel / np.linalg.norm(kernel), "valid")
    return noise.astype(np.float32)


def _blinks(frames: int, fps: float, loudness: Floats, random: Random) -> Floats:
    """Lids [frames], 0 open to 1 shut: down within .13 s, shut for at least one frame, up within .17 s."""
    lids = np.zeros(frames, np.float32)
    reach = round(_BIAS_REACH_S * fps)
    time_s, before = float(random.uniform(0, 1.3 * BLINK_GAP_S)), -frames
    while time_s < frames / fps:
        frame = round(time_s * fps)
        if random.random() < BLINK_PAUSE_BIAS:
            first = min(max(frame - reach, 0), frames - 1)
            near = loudness[first : frame + reach + 1]
            frame = first + int(random.choice(np.flatnonzero(near <= near.min() + _ALIKE)))
        frame = max(frame, before + round(LEAST_BLINK_GAP_S * fps))
        closing_s, opening_s = random.uniform(0.1, 0.13), random.uniform(0.14, 0.17)
        since_s = (np.arange(frames) - frame) / fps
        held_s = np.where(since_s < 0, -since_s / closing_s, since_s / opening_s)
        lids = np.maximum(lids, (0.5 + 0.5 * np.cos(np.pi * np.clip(held_s, 0, 1))).astype(np.float32))
        before = frame
        time_s = frame / fps + float(random.lognormal(np.log(BLINK_GAP_S), BLINK_GAP_SPREAD))
    return lids


def _raises(frames: int, fps: float, loudness: Floats, random: Random) -> Floats:
    """Brow raises [frames] on some of the stressed syllables: quick up, slower down."""
    raised = np.zeros(frames, np.float32)
    peaks = np.flatnonzero((loudness[1:-1] > loudness[:-2]) & (loudness[1:-1] >= loudness[2:])) + 1
    before = -frames
    for peak in peaks[loudness[peaks] > _STRESS]:
        if peak - before < _LEAST_RAISE_GAP_S * fps or random.random() >= RAISE_CHANCE:
            continue
        before = int(peak)
        since_s = (np.arange(frames) - peak) / fps
        width_s = np.where(since_s < 0, random.uniform(0.1, 0.16), random.uniform(0.16, 0.3))
        bump = random.uniform(*RAISES) * np.exp(-((since_s / width_s) ** 2))
        raised = np.maximum(raised, bump.astype(np.float32))
    return raised


def _gaze(frames: int, fps: float, random: Random) -> tuple[Floats, Floats]:
    """Glances [frames] to the face's left and up, in -1..1 times `MOST_GAZE`: mostly straight ahead."""
    aside, up = np.zeros(frames), np.zeros(frames)
    start_s = 0.0
    while start_s < frames / fps:
        away = random.random() < 0.45
        reach = MOST_GAZE if away else MOST_GAZE / 6
        first = round(start_s * fps)
        aside[first:] = np.clip(random.normal(0, reach / 2), -reach, reach)
        up[first:] = np.clip(random.normal(-0.2 * reach, reach / 3), -reach, reach)
        held_s = float(random.lognormal(np.log(FIXATION_S), FIXATION_SPREAD))
        start_s += max(held_s * (0.6 if away else 1.4), 2 / fps)
    jump = np.hanning(5)[1:-1] / np.hanning(5).sum()  # a saccade takes three frames

    def smooth(gaze: NDArray[np.float64]) -> Floats:
        return np.convolve(np.pad(gaze, 1, "edge"), jump, "valid").astype(np.float32)

    return smooth(aside), smooth(up)
