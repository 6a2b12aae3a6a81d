"""Phones to motion."""

from __future__ import annotations

import numpy as np
import pytest

from streamtalk_training.coarticulation import (
    ARKIT_INDEX,
    Style,
    arkit_weights,
    controls_from_weights,
    mouth_controls,
)
from streamtalk_training.visemes import Phone, cmu_phones, espeak_phones, tables

TIMES_S = np.arange(60) / 30
CONTROLS = tables().controls


def track(controls: np.ndarray, name: str) -> np.ndarray:
    return np.asarray(controls[:, CONTROLS.index(name)])


def test_stress_and_diphthongs() -> None:
    first, second = espeak_phones("'aI", 1.0, 2.0)
    assert (first.viseme, second.viseme) == ("AA", "IY")
    assert first.end_s == second.start_s == pytest.approx(1.45)
    assert espeak_phones(";", 0, 1) == []
    assert cmu_phones("AY1", 0, 1)[1].viseme == "IY"
    with pytest.raises(KeyError, match=r"unknown phone 'QQ'.*visemes\.json"):
        espeak_phones("QQ", 0, 1)


def test_every_table_names_known_visemes_and_controls() -> None:
    rules = tables()
    singles = {*rules.espeak_phones.values(), *rules.cmu_phones.values()}
    pairs = {v for pair in (*rules.diphthongs.values(), *rules.cmu_diphthongs.values()) for v in pair}
    assert singles | pairs <= rules.viseme_targets.keys()
    for targets in (*rules.viseme_targets.values(), *rules.dominance_alpha.values(), rules.theta_per_s):
        assert targets.keys() <= set(rules.controls)


def test_a_bilabial_between_vowels_seals_the_lips() -> None:
    phones = [Phone(0, 0.9, "a", "AA"), Phone(0.9, 0.98, "m", "PBM"), Phone(0.98, 2, "a", "AA")]
    controls = mouth_controls(phones, TIMES_S, Style())
    close = track(controls, "close")
    assert close.argmax() / 30 == pytest.approx(0.92, abs=1 / 30)  # the middle, 20 ms early
    assert close.max() > 0.9
    assert close[:20].max() < 0.05
    weights = arkit_weights(controls, Style())
    shut = weights[close.argmax()]
    assert shut[ARKIT_INDEX["mouthClose"]] == pytest.approx(shut[ARKIT_INDEX["jawOpen"]], rel=0.1)


def closing(phones: list[Phone]) -> tuple[np.ndarray, np.ndarray]:
    """Times of every millisecond of two seconds, and `close` at them."""
    times_s = np.arange(2000) / 1000
    return times_s, track(mouth_controls(phones, times_s, Style()), "close")


def test_a_vowel_sounds_through_open_lips() -> None:
    phones = [Phone(0, 0.5, "a", "AA"), Phone(0.5, 0.9, "i", "IY"), Phone(0.9, 1, "m", "PBM")]
    times_s, close = closing([*phones, Phone(1, 2, "a", "AA")])
    assert close[times_s < 0.889].max() == pytest.approx(0.6)  # near, in the second half of a diphthong too
    assert close[(times_s >= 0.9) & (times_s < 0.97)].min() > 0.95  # and shut as soon as it is silent


def test_a_short_closure_lasts_for_a_frame() -> None:
    phones = [Phone(0, 0.9, "a", "AA"), Phone(0.9, 0.93, "b", "PBM"), Phone(0.93, 2, "a", "AA")]
    times_s, close = closing(phones)
    shut_s = times_s[close > 0.8]
    assert np.ptp(shut_s) > 1 / 30
    assert 0.86 < shut_s[0] < 0.9  # sooner than the sound stops


def test_lips_may_close_ahead_in_a_consonant() -> None:
    hissing = [Phone(0, 0.9, "s", "SZ"), Phone(0.9, 1, "p", "PBM"), Phone(1, 2, "a", "AA")]
    times_s, close = closing(hissing)
    assert close[(times_s > 0.87) & (times_s < 0.9)].min() > 0.85


def test_silence_is_rest() -> None:
    assert mouth_controls([], TIMES_S, Style()).max() == 0
    spoken = [Phone(0, 0.3, "a", "AA"), Phone(0.3, 2, "_", "SIL")]
    assert mouth_controls(spoken, TIMES_S, Style())[-15:].max() < 0.01


def test_gains_leave_closures_alone() -> None:
    phones = [Phone(0, 0.5, "a", "AA"), Phone(0.5, 0.6, "m", "PBM"), Phone(0.6, 2, "u", "UW")]
    plain = mouth_controls(phones, TIMES_S, Style())
    big = mouth_controls(phones, TIMES_S, Style(jaw_gain=1.2, lip_gain=1.1))
    np.testing.assert_allclose(track(big, "jaw"), 1.2 * track(plain, "jaw"), rtol=1e-5)
    np.testing.assert_array_equal(track(big, "close"), track(plain, "close"))


def test_controls_are_read_back_from_weights() -> None:
    phones = [Phone(0, 0.5, "e", "EH"), Phone(0.5, 1.2, "f", "FV"), Phone(1.2, 2, "u", "UW")]
    controls = mouth_controls(phones, TIMES_S, Style())
    read = controls_from_weights(arkit_weights(controls, Style()))
    for name in ("jaw", "round", "spread", "fv", "press", "tongue"):
        np.testing.assert_allclose(track(read, name), track(controls, name), atol=1e-5)
