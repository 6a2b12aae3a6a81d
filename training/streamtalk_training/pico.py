"""Speech of SVOX Pico (PyPI `py-nanotts`, Apache-2.0, voices included), an optional fourth engine.

Its English voices are two women's, built from recordings. It tells no phone times: pocketsphinx finds them, twice,
and only what both hearings agree on is used.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from streamtalk_training import aligner
from streamtalk_training.espeak import Utterance
from streamtalk_training.visemes import UnknownPhoneError

SAMPLE_RATE = 16000
VOLUME = 0.5  # its default of 1 clips
MOST_APART_S = 0.015  # mean distance between the phones of the two hearings


def find_pico() -> Path | None:
    """Where `py_nanotts` is installed with an aligner beside it; None without."""
    spec = find_spec("py_nanotts")
    if spec is None or spec.origin is None or not aligner.aligner_installed():
        return None
    return Path(spec.origin).parent


@cache
def _speaker() -> Any:
    from py_nanotts import NanoTTS  # type: ignore[import-untyped]

    return NanoTTS()


def say(text: str, voice: str = "en-US", speed: float = 1.0, pitch: float = 1.0) -> Utterance:
    """Speak `text` with `voice` (en-US, en-GB), `speed` and `pitch` times the usual.

    Raises UnknownPhoneError where no phone times can be trusted: a word that the aligner's dictionary lacks, or
    two hearings that differ.
    """
    said = aligner.words(text)
    if said is None or not said or not all(map(aligner.known, said)):
        raise UnknownPhoneError(f"the aligner does not know how {text!r} is read")
    spoken = _speaker().speak(text, voice=voice, speed=speed, pitch=pitch, volume=VOLUME)
    pcm = np.frombuffer(spoken, "<i2").astype(np.float32) / np.float32(32768)
    first, second = aligner.aligned(pcm, said), aligner.aligned_warped(pcm, said)
    if first is None or second is None or [p.name for p in first] != [p.name for p in second]:
        raise UnknownPhoneError(f"no phone times of {text!r} can be trusted")
    apart_s = np.mean([abs(a.start_s - b.start_s) for a, b in zip(first, second, strict=True)])
    if apart_s > MOST_APART_S:
        raise UnknownPhoneError(f"two hearings of {text!r} are {apart_s * 1e3:.0f} ms apart")
    return Utterance(pcm, SAMPLE_RATE, first)
