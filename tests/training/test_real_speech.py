"""Recordings: transcripts, alignments and the joining of prompts, on made-up ones; pocketsphinx is not needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamtalk_training import real_speech
from streamtalk_training.real_speech import (
    ALIGNER_LATE_S,
    RecordingsError,
    Spoken,
    aligned_phones,
    joined,
    load_recordings,
    read_transcripts,
    words,
)
from streamtalk_training.visemes import Phone

EXACT_S = 1e-9


def test_transcripts_have_comments_and_colons() -> None:
    lines = ["; Core sounds\n", "\n", "vm-press: Press: now.\n", "dir/a: A\n"]
    assert read_transcripts(lines) == {"vm-press": "Press: now.", "dir/a": "A"}


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


def test_prompts_are_joined_with_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_speech, "CLIP_S", 2.0)
    prompts = [
        Spoken(f"p{n}", np.full(16000, n, np.float32), (Phone(0.2, 0.4, "m", "PBM"),)) for n in (1, 2, 3)
    ]
    first, second = joined(prompts)
    assert (first.name, second.name) == ("p1", "p3")
    assert len(first.pcm) == 16000 * (0.3 + 1 + 0.3 + 1 + 0.3)
    closures = [phone for phone in first.phones if phone.viseme == "PBM"]
    assert [p.start_s for p in closures] == pytest.approx([0.5, 1.8], abs=EXACT_S)
    for before, after in zip(first.phones, first.phones[1:], strict=False):
        assert after.start_s == pytest.approx(before.end_s, abs=EXACT_S)
    assert first.pcm[int(1.8 * 16000)] == 2.0  # the sound moved with its phones


def test_missing_recordings_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(RecordingsError, match="asterisk-core-sounds-en-g722"):
        load_recordings(tmp_path)
