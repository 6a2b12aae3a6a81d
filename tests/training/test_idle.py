"""Blinks, glances and brows."""

from __future__ import annotations

import numpy as np
import pytest

from streamtalk_training.clips import relative_loudness
from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.idle import BROW_NOISE, RAISES, idle_weights

FPS = 30
MINUTES = 20
FRAMES = MINUTES * 60 * FPS
MOST_STEP = 0.6  # of a weight in one frame: a lid falls in about three
EYES_AND_BROWS = {
    *(f"eyeBlink{side}" for side in ("Left", "Right")),
    *(f"eyeLook{way}{side}" for way in ("In", "Out", "Up", "Down") for side in ("Left", "Right")),
    *("browInnerUp", "browOuterUpLeft", "browOuterUpRight", "browDownLeft", "browDownRight"),
}


def loudness() -> np.ndarray:
    """Syllables, four a second, for five seconds out of six."""
    times_s = np.arange(FRAMES) / FPS
    return (np.abs(np.sin(4 * np.pi * times_s)) * (times_s % 6 < 5)).astype(np.float32)


@pytest.fixture(scope="module")
def idle() -> np.ndarray:
    return idle_weights(FRAMES, FPS, loudness(), np.random.default_rng(0))


def blink_frames(idle: np.ndarray) -> list[np.ndarray]:
    lids = idle[:, ARKIT_INDEX["eyeBlinkLeft"]]
    moving = np.flatnonzero(lids > 0.02)
    return np.split(moving, np.flatnonzero(np.diff(moving) > 1) + 1)


def test_idle_motion_never_touches_the_mouth(idle: np.ndarray) -> None:
    assert {name for name, column in ARKIT_INDEX.items() if idle[:, column].any()} == EYES_AND_BROWS
    assert idle.min() >= 0
    assert idle.max() <= 1
    assert np.abs(np.diff(idle, axis=0)).max() < MOST_STEP


def test_blinks_are_as_frequent_as_people_s(idle: np.ndarray) -> None:
    assert 14.5 <= len(blink_frames(idle)) / MINUTES <= 20.5


def test_a_blink_shuts_the_eyes_and_takes_six_to_eight_frames(idle: np.ndarray) -> None:
    lids = idle[:, ARKIT_INDEX["eyeBlinkLeft"]]
    whole = [frames for frames in blink_frames(idle) if frames[0] > 0 and frames[-1] < FRAMES - 1]
    assert all(lids[frames].max() == 1 for frames in whole)
    lengths = np.array([len(frames) for frames in whole])
    assert np.quantile(lengths, 0.02) >= 5
    assert np.quantile(lengths, 0.98) <= 8


def test_blinks_prefer_pauses(idle: np.ndarray) -> None:
    shut = np.array(
        [frames[idle[frames, ARKIT_INDEX["eyeBlinkLeft"]].argmax()] for frames in blink_frames(idle)]
    )
    in_pause = np.mean((shut / FPS) % 6 >= 5)
    assert in_pause > 1.2 / 6  # chance alone gives 1/6


def test_brows_rise_on_stress_and_hardly_otherwise(idle: np.ndarray) -> None:
    quiet = idle_weights(FRAMES, FPS, np.zeros(FRAMES, np.float32), np.random.default_rng(1))
    brow = ARKIT_INDEX["browInnerUp"]
    assert quiet[:, brow].max() <= BROW_NOISE
    assert RAISES[1] * 0.9 < idle[:, brow].max() <= RAISES[1] + BROW_NOISE


def test_gaze_is_the_same_for_both_eyes(idle: np.ndarray) -> None:
    np.testing.assert_array_equal(
        idle[:, ARKIT_INDEX["eyeLookOutLeft"]], idle[:, ARKIT_INDEX["eyeLookInRight"]]
    )
    assert not (idle[:, ARKIT_INDEX["eyeLookOutLeft"]] * idle[:, ARKIT_INDEX["eyeLookInLeft"]]).any()


def test_the_level_of_the_sound_does_not_matter() -> None:
    """Idle motion knows the sound by relative loudness alone: speech forty decibels down moves it alike."""
    frames = 900
    random = np.random.default_rng(2)
    pcm = (
        np.repeat(loudness()[:frames], 16000 // FPS) * random.normal(0, 0.2, frames * (16000 // FPS))
    ).astype(np.float32)
    times_s = np.arange(frames) / FPS
    quietly = np.float32(2**-7)  # a power of two: every sum scales without rounding
    once, again = (
        idle_weights(frames, FPS, relative_loudness(level * pcm, times_s), np.random.default_rng(2))
        for level in (np.float32(1), quietly)
    )
    np.testing.assert_array_equal(once, again)
