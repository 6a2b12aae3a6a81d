"""Stress figures on made-up motion: what holds passes, what drifts, freezes or explodes is caught."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk_training import stress
from streamtalk_training.clips import SAMPLE_RATE
from streamtalk_training.scores import Pair, Speech
from streamtalk_training.streaming import Reader
from tests.training.tiny_face import tiny_face, weights_of

FPS = 30.0
READER = Reader(tiny_face())
LEVEL_DB = 0.1


def one_pass() -> stress.Pass:
    return stress.Pass(0.01, 0.005, 0.2, 0.1, np.full(4, 0.004, np.float32), 0.02, 0.03)


def test_a_loop_that_holds_has_nothing_to_report() -> None:
    scores = stress.loop_scores([one_pass()] * 3)
    assert (scores["largest_change"], scores["frozen"], scores["exploded"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "figure", "value"),
    [
        ({"jaw_mean": 0.22}, "largest_change", 0.1),
        ({"gap_std": 0.004}, "largest_change", 0.2),
        ({"lip_spread": np.array([0.004, 0.001, 0.004, 0.004], np.float32)}, "frozen", 0.25),
        ({"farthest": 0.05}, "exploded", 1),
        ({"farthest_of_face": 0.07}, "exploded", 1),
        ({"farthest_of_face": float("nan")}, "exploded", 1),
        ({"farthest_of_face": float("inf")}, "exploded", 1),
    ],
)
def test_a_loop_that_does_not_hold_is_caught(change: dict[str, Any], figure: str, value: float) -> None:
    scores = stress.loop_scores([one_pass(), one_pass(), replace(one_pass(), **change)])
    assert scores[figure] == pytest.approx(value)


def test_a_face_that_explodes_and_recovers_is_caught() -> None:
    passes = [one_pass(), one_pass(), replace(one_pass(), farthest_of_face=1.0), one_pass()]
    assert stress.loop_scores(passes)["exploded"] == 1


def test_the_first_pass_may_differ() -> None:
    passes = [replace(one_pass(), jaw_mean=0.4), one_pass(), one_pass()]
    assert stress.loop_scores(passes)["largest_change"] == 0


def test_passes_are_cut_where_the_sound_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeTalker:
        fps = 30

    jaw = np.tile(np.linspace(0, 1, 60), 3)
    weights = weights_of(jawOpen=jaw)

    def frames(*_: object, **__: object) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from streamtalk_training.face import pose

        for at in range(0, 180, 50):  # blocks do not end with passes
            part = weights[at : at + 50]
            yield pose(READER.face, part, 0), part

    monkeypatch.setattr(stress, "frames_of", lambda *_, **__: None)
    monkeypatch.setattr(stress, "blocks", frames)
    two_seconds = np.zeros(2 * SAMPLE_RATE, np.float32)
    passes = list(stress.loop_passes(READER, FakeTalker(), two_seconds, 3))  # type: ignore[arg-type]
    assert len(passes) == 3
    for one in passes:
        assert one.jaw_mean == pytest.approx(0.5)
        assert one.farthest == pytest.approx(0.02, rel=1e-2)


def test_a_stretch_is_whole_seconds() -> None:
    clips = [np.zeros(SAMPLE_RATE * 40 + 7, np.float32)] * 2
    assert len(stress.stretch(clips, 60)) == 60 * SAMPLE_RATE
    assert len(stress.stretch(clips[:1], 60)) == 40 * SAMPLE_RATE


def test_sounds_have_their_levels_and_need_no_packages(tmp_path: Path) -> None:
    sounds = stress.sounds(tmp_path)
    assert {name.split()[0].strip(",") for name in sounds} == {"silence", "white", "music"}
    for name, pcm in sounds.items():
        assert len(pcm) == 10 * SAMPLE_RATE and pcm.dtype == np.float32 and np.abs(pcm).max() <= 1
        if name.endswith("-20 dB"):
            assert 20 * np.log10(np.sqrt(np.mean(pcm**2))) == pytest.approx(-20, abs=LEVEL_DB)
    assert not sounds["silence"].any()
    assert all((stress.sounds(tmp_path)[name] == pcm).all() for name, pcm in sounds.items())


def pair(jaw: np.ndarray, blink_frames: tuple[int, ...], brows: np.ndarray) -> Pair:
    blink = np.zeros(len(jaw))
    blink[list(blink_frames)] = 1
    weights = weights_of(
        jawOpen=jaw, eyeBlinkLeft=blink, eyeBlinkRight=blink, **dict.fromkeys(stress.BROW_SHAPES, brows)
    )
    track = READER.labelled(weights, 0)
    return Pair(Speech("", np.zeros(0, np.float32), (), weights), 0, track, track)


def test_seeds_share_lips_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    jaw = 0.3 + 0.3 * np.sin(np.arange(1800) / 5)
    first = pair(jaw, (100, 400, 900), random.random(1800)).true
    second = pair(jaw, (103, 700, 1500), random.random(1800)).true
    scores = stress.seed_scores(first, second, FPS)
    assert scores["blinks_per_minute"] == pytest.approx(3)
    assert scores["blinks_shared"] == pytest.approx(1 / 3)
    assert abs(scores["brows_correlation"]) < 0.1
    assert scores["closures_agree"] == 1 and scores["lips_correlation"] == pytest.approx(1)
    same = stress.seed_scores(first, first, FPS)
    assert same["blinks_shared"] == 1 and same["brows_correlation"] == pytest.approx(1)


def test_no_blinks_share_nothing() -> None:
    none, one = np.array([], np.int64), np.array([5])
    assert np.isnan(stress.shared(none, none, 6))
    assert stress.shared(none, one, 6) == 0


def test_sounds_are_judged_against_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    speech = pair(0.3 + 0.3 * np.sin(np.arange(300) / 5), (), np.zeros(300))
    quiet = weights_of(jawOpen=np.zeros(300))
    chatty = speech.true.weights
    heard = {"silence": np.zeros(1, np.float32), "music": np.ones(1, np.float32)}

    def streamed(_: Reader, __: object, pcm: np.ndarray, speaker: int) -> object:
        return READER.labelled(chatty if pcm[0] else quiet, speaker)

    monkeypatch.setattr(Reader, "streamed", streamed)
    scores = stress.sound_scores(READER, None, heard, [speech])  # type: ignore[arg-type]
    assert scores["silence"]["closed"] == 1 and scores["silence"]["lip_motion"] == 0
    assert scores["music"]["lip_motion"] == pytest.approx(1) and scores["music"]["closed"] < 0.5
    assert scores["music"]["gap_max_mm"] == pytest.approx(12, rel=2e-2)
