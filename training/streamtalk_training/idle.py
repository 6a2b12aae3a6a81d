"""What a face does besides speaking: blinks, glances and brows. It never touches the lips."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.face import ARKIT_NAMES

BLINK_GAP_S = 3.6  # median; with the spread below 15 to 20 blinks a minute
BLINK_GAP_SPREAD = 0.5  # of the log
_CLOSING_S, _OPENING_S = 0.07, 0.15


def idle_weights(
    frames: int, fps: float, loudness: NDArray[np.float32], random: np.random.Generator
) -> NDArray[np.float32]:
    """ARKit weights [frames, 52] of idle motion; `loudness` [frames] in 0..1 lets brows rise on stress.

    Blinks come at lognormal gaps; brows follow slow noise and rise on about a third of the loud syllables.
    """
    weights = np.zeros((frames, len(ARKIT_NAMES)), np.float32)
    blink = np.zeros(frames, np.float32)
    times_s = np.arange(frames) / fps
    next_s = float(random.uniform(0.5, BLINK_GAP_S))
    while next_s < frames / fps:
        since_s = times_s - next_s
        closing = np.clip(1 + since_s / _CLOSING_S, 0, 1)
        opening = np.clip(1 - since_s / _OPENING_S, 0, 1)
        blink = np.maximum(blink, np.minimum(closing, opening).astype(np.float32))
        next_s += float(random.lognormal(np.log(BLINK_GAP_S), BLINK_GAP_SPREAD))
    for side in ("Left", "Right"):
        weights[:, ARKIT_INDEX["eyeBlink" + side]] = blink

    brows = 0.04 * (1 + slow_noise(frames, fps, 0.3, random))
    peaks = np.flatnonzero((loudness[1:-1] > loudness[:-2]) & (loudness[1:-1] >= loudness[2:])) + 1
    for peak in peaks[loudness[peaks] > 0.7]:
        if random.random() < 0.3:
            brows = brows + 0.12 * np.exp(-(((np.arange(frames) - peak) / (0.12 * fps)) ** 2))
    weights[:, ARKIT_INDEX["browInnerUp"]] = brows
    for side in ("Left", "Right"):
        weights[:, ARKIT_INDEX["browOuterUp" + side]] = 0.6 * brows
    return np.clip(weights, 0, 1)


def slow_noise(frames: int, fps: float, cutoff_hz: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Noise [frames] of unit variance, smoothed to about `cutoff_hz`."""
    width = max(int(fps / cutoff_hz / 2), 1)
    kernel = np.hanning(2 * width + 1)
    noise = np.convolve(random.standard_normal(frames + 2 * width), kernel / np.linalg.norm(kernel), "valid")
    return noise.astype(np.float32)
