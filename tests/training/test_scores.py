"""Scores of made-up clips whose answers are known, and a control that cannot pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from streamtalk_training import scores
from streamtalk_training.clips import with_silences
from streamtalk_training.coarticulation import ARKIT_INDEX, Style, arkit_weights, mouth_controls
from streamtalk_training.scores import Pair, Speech, moved_round, split_scores
from streamtalk_training.streaming import Reader
from streamtalk_training.visemes import Phone
from tests.training.tiny_face import tiny_face

FPS = 30.0
READER = Reader(tiny_face())
JAW = ARKIT_INDEX["jawOpen"]
CHANCE = 0.15  # what the project grants a control


def speech(seed: int) -> Speech:
    """/a/, /m/ and pauses in random order and of random length, about 12 s; silence at both ends."""
    random = np.random.default_rng(seed)
    end_s, phones = 0.5, []
    while end_s < 12:
        start_s, end_s = end_s, end_s + float(random.uniform(0.08, 0.3))
        name, viseme = (("a", "AA"), ("m", "PBM"), ("_", "SIL"))[random.choice(3, p=(0.6, 0.3, 0.1))]
        phones.append(Phone(start_s, end_s, name, viseme))
    samples = int((end_s + 0.5) * 16000)
    phones = with_silences(phones, samples / 16000)
    times_s = np.arange(int(samples * 30 // 16000)) / FPS
    weights = arkit_weights(mouth_controls(phones, times_s, Style()), Style())
    return Speech(str(seed), np.zeros(samples, np.float32), tuple(phones), weights)


def perfect(count: int = 12) -> list[Pair]:
    made = []
    for seed in range(count):
        spoken = speech(seed)
        track = READER.labelled(spoken.weights, 0)
        made.append(Pair(spoken, 0, track, track))
    return made


def test_a_perfect_model_reaches_everything_and_its_control_nothing() -> None:
    figures = split_scores(READER.face, perfect(), FPS)
    model, control = figures["model"], figures["control"]
    assert isinstance(model, dict) and isinstance(control, dict)
    assert model["closure_recall"] == 1.0
    assert model["false_closures"] < 0.1
    assert model["correlation_jaw"] == pytest.approx(1.0)
    assert model["correlation_gap"] == pytest.approx(1.0)
    assert model["lag_frames"] == 0
    assert model["jitter"] == pytest.approx(1.0)
    assert model["lve_mm2"] == model["mod_mm"] == 0
    assert "fdd_mm2" not in model  # nobody knows these clips' upper faces
    assert abs(control["correlation_jaw"]) < CHANCE and abs(control["correlation_close"]) < CHANCE
    assert control["closure_recall"] < 0.8
    assert control["false_closures"] > 2 * model["false_closures"]


def test_the_control_is_fair_where_shuffled_clips_are_not() -> None:
    """Clips of equal length with long silent ends: neighbours' clips agree on the silences, the control not."""
    pairs = []
    for seed in range(12):
        spoken = speech(seed)
        weights = np.concatenate(
            [np.zeros((150, 52), np.float32), spoken.weights[:200], np.zeros((10, 52), np.float32)]
        )
        track = READER.labelled(weights, 0)
        pairs.append(Pair(replace(spoken, weights=weights), 0, track, track))
    shuffled = [replace(pair, predicted=pairs[at - 1].predicted) for at, pair in enumerate(pairs)]
    assert scores.agreement(shuffled)["correlation_gap"] > 2 * CHANCE
    floor = [
        scores.agreement(moved_round(pairs, share))["correlation_gap"] for share in scores.CONTROL_SHIFTS
    ]
    assert abs(np.mean(floor)) < CHANCE


def test_the_control_is_all_the_motion_moved_round() -> None:
    pairs = perfect(3)
    moved = moved_round(pairs, 0.4)
    assert [len(pair.predicted) for pair in moved] == [len(pair.true) for pair in pairs]
    whole = np.concatenate([pair.predicted.gaps for pair in pairs])
    start = round(0.4 * len(whole))
    np.testing.assert_array_equal(
        np.concatenate([pair.predicted.gaps for pair in moved]), np.roll(whole, -start, 0)
    )


def test_controls_of_opposite_signs_do_not_cancel() -> None:
    floor = scores.floor_of(
        [{"correlation_jaw": 0.4, "fv_roll": 0.2}, {"correlation_jaw": -0.4, "fv_roll": 0.4}]
    )
    assert floor == pytest.approx({"correlation_jaw": 0.4, "fv_roll": 0.3})


@pytest.mark.parametrize("names", [("jaw", "fv"), ("fv", "jaw")])
def test_a_control_that_is_no_number_is_not_passed_over(names: tuple[str, str]) -> None:
    """In whichever order the figures come."""
    found = {f"correlation_{name}": {"jaw": 0.1, "fv": float("nan")}[name] for name in names}
    assert np.isnan(scores.largest_correlation(scores.floor_of([found, found])))


def test_late_lips_are_found_late() -> None:
    pairs = perfect(4)
    late = [replace(p, predicted=READER.labelled(np.roll(p.speech.weights, 2, axis=0), 0)) for p in pairs]
    assert scores.lag(late) == 2


def test_trembling_lips_are_jitter() -> None:
    pairs = []
    for pair in perfect(4):
        phones = (Phone(0.0, 12.0, "a", "AA"),)
        slow = np.zeros_like(pair.speech.weights)
        slow[:, JAW] = 0.4 + 0.1 * np.sin(np.arange(len(slow)) / 4)
        fast = slow + 0.05 * (np.arange(len(slow)) % 2)[:, None] * (slow > 0)
        spoken = replace(pair.speech, phones=phones)
        pairs.append(Pair(spoken, 0, READER.labelled(fast, 0), READER.labelled(slow, 0)))
    assert scores.jitter(pairs, FPS) > 10


def test_pauses_are_judged_by_themselves() -> None:
    pair = perfect(1)[0]
    phones = (Phone(0.0, 1.0, "a", "AA"), Phone(1.0, 3.0, "_", "SIL"))
    weights = np.zeros((90, 52), np.float32)
    weights[:45, JAW] = 0.5  # shut from 1.5 s on: later than the margin of .3 s allows
    spoken = replace(pair.speech, phones=phones)
    track = READER.labelled(weights, 0)
    figures = scores.pause_scores([Pair(spoken, 0, track, track)], FPS)
    assert figures["gap_max_mm"] == pytest.approx(10, rel=1e-2)
    later = READER.labelled(np.roll(weights, -6, axis=0)[:84], 0)
    assert scores.pause_scores([Pair(spoken, 0, later, later)], FPS)["gap_max_mm"] == 0


def test_without_a_pause_there_is_no_figure() -> None:
    pair = perfect(1)[0]
    talking = replace(pair.speech, phones=(Phone(0.0, 13.0, "a", "AA"),))
    figures = scores.pause_scores([replace(pair, speech=talking)], FPS)
    assert all(np.isnan(value) for value in figures.values()) and len(figures) == 3
