"""What is read, and what an alignment becomes: on made-up ones, so that pocketsphinx is not needed."""

from __future__ import annotations

import pytest

from streamtalk_training.aligner import ALIGNER_LATE_S, aligned_phones, words

EXACT_S = 1e-9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Please press 1 to mute.", ["please", "press", "one", "to", "mute"]),
        ("... letters of your party's 'last' name", "letters of your party's last name".split()),
        ("Call-forward", ["call", "forward"]),
        ("[ascending tones]", None),
        ("<beep>", None),
        ("Voice over IP", None),
        ("3D audio", None),
        ("Press 10", None),
    ],
)
def test_words_are_what_is_surely_read(text: str, said: list[str] | None) -> None:
    assert words(text) == said


def test_alignments_become_phones() -> None:
    entries = [("SIL", 0, 10), ("M", 10, 5), ("AY", 15, 20), ("+SPN+", 35, 5), ("SIL", 40, 10)]
    phones = aligned_phones(entries, 0.5)
    assert phones is not None
    assert [p.viseme for p in phones] == ["PBM", "AA", "IY"]  # the diphthong is two
    assert phones[0].start_s == pytest.approx(0.1 + ALIGNER_LATE_S, abs=EXACT_S)
    assert phones[-1].end_s == pytest.approx(0.35 + ALIGNER_LATE_S, abs=EXACT_S)


def test_no_phone_outlasts_the_sound() -> None:
    phones = aligned_phones([("M", 10, 10)], 0.2)
    assert phones is not None and phones[-1].end_s == 0.2


def test_an_alignment_gone_astray_is_dropped() -> None:
    assert aligned_phones([("M", 0, 61)], 1.0) is None
    assert aligned_phones([("SIL", 0, 100)], 1.0) is None
