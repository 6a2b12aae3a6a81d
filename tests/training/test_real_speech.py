"""Recordings: transcripts and the joining of prompts, on made-up ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamtalk_training import real_speech
from streamtalk_training.real_speech import (
    RecordingsError,
    Spoken,
    joined,
    load_recordings,
    read_transcripts,
)
from streamtalk_training.visemes import Phone

EXACT_S = 1e-9


def test_transcripts_have_comments_and_colons() -> None:
    lines = ["; Core sounds\n", "\n", "vm-press: Press: now.\n", "dir/a: A\n"]
    assert read_transcripts(lines) == {"vm-press": "Press: now.", "dir/a": "A"}


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
