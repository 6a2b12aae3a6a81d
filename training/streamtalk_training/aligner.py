"""Phone times of speech whose words are known, by pocketsphinx's English acoustic model (PyPI `pocketsphinx`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from streamtalk_training.visemes import Phone, UnknownPhoneError, cmu_phones

Floats = NDArray[np.float32]

SAMPLE_RATE = 16000
ALIGNER_HOP_S = 0.01
# The aligner's window of 25.6 ms begins where its 10 ms frame does, so what it hears is 7.8 ms later than the
# frame's own middle. Against flite's own times it was 8 ms early (median) before this.
ALIGNER_LATE_S = 0.0078
RECHECK_WARP = 1.06  # a second hearing plays this much faster and higher
MOST_APART_S = 0.015  # mean distance between the phones of two hearings that are trusted
LONGEST_PHONE_S = 0.6  # a longer one is an alignment gone astray
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def words(text: str) -> list[str] | None:
    """The words that `text` is read as; None where that is unsure: descriptions of sounds, acronyms, numbers."""
    if re.search(r"[\[<(]|\b[A-Z]{2,}\b|\d\d|\d[A-Za-z]|[A-Za-z]\d", text):
        return None
    spelled = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    found = re.findall(r"[a-z']+", spelled.lower())
    return [word.strip("'") for word in found if word.strip("'")]


def aligner_installed() -> bool:
    """Whether pocketsphinx is at hand."""
    return find_spec("pocketsphinx") is not None


@cache
def _aligner() -> Any:
    from pocketsphinx import Decoder  # type: ignore[import-untyped]

    return Decoder(lm=None, loglevel="FATAL")


def known(word: str) -> bool:
    """Whether the aligner's dictionary has `word`."""
    return _aligner().lookup_word(word) is not None


def readable(text: str) -> list[str]:
    """The words of `text`. Raises UnknownPhoneError where it is unsure how they are read."""
    said = words(text)
    if said is None or not said or not all(map(known, said)):
        raise UnknownPhoneError(f"the aligner does not know how {text!r} is read")
    return said


def trusted(pcm: Floats, said: Sequence[str]) -> tuple[Phone, ...]:
    """Phones of `said` in `pcm` (float32 [n] at 16 kHz) that two hearings, one of them warped, agree on.

    Raises UnknownPhoneError where they differ, or where either finds none.
    """
    first, second = aligned(pcm, said), aligned_warped(pcm, said)
    if first is None or second is None or [p.name for p in first] != [p.name for p in second]:
        raise UnknownPhoneError(f"no phone times of {' '.join(said)!r} can be trusted")
    apart_s = np.mean([abs(a.start_s - b.start_s) for a, b in zip(first, second, strict=True)])
    if apart_s > MOST_APART_S:
        raise UnknownPhoneError(f"two hearings of {' '.join(said)!r} are {apart_s * 1e3:.0f} ms apart")
    return first


def aligned(pcm: Floats, said: Sequence[str]) -> tuple[Phone, ...] | None:
    """Phones of `said` in `pcm`, without silences; None where the aligner finds no credible path.

    Two passes, as pocketsphinx has it: words first, then the phones within each.
    """
    aligner = _aligner()
    heard = np.round(np.clip(pcm, -1, 1) * 32767).astype("<i2").tobytes()

    def listen() -> None:
        aligner.start_utt()
        aligner.process_raw(heard, full_utt=True)
        aligner.end_utt()

    try:
        aligner.set_align_text(" ".join(said))
        listen()
        if aligner.hyp() is None:
            return None
        aligner.set_alignment()
        listen()
        entries = [(entry.name, entry.start, entry.duration) for entry in aligner.get_alignment().phones()]
    except RuntimeError:  # what pocketsphinx raises for all that it cannot do
        return None
    return aligned_phones(entries, len(pcm) / SAMPLE_RATE)


def aligned_warped(pcm: Floats, said: Sequence[str]) -> tuple[Phone, ...] | None:
    """`aligned`, but of `pcm` played faster and higher; times are those of `pcm`. Two hearings that agree do not
    prove each other right, but two that do not show how far labels can be trusted."""
    warped = np.asarray(soxr.resample(pcm, SAMPLE_RATE * RECHECK_WARP, SAMPLE_RATE), np.float32)
    phones = aligned(warped, said)
    if phones is None:
        return None
    share = len(pcm) / len(warped)
    return tuple(Phone(p.start_s * share, p.end_s * share, p.name, p.viseme) for p in phones)


def aligned_phones(entries: Iterable[tuple[str, int, int]], total_s: float) -> tuple[Phone, ...] | None:
    """Phones within 0 to `total_s` of the aligner's entries (name, first frame, frames).

    Silence and noise (`SIL`, `+SPN+`) yield nothing; None where a phone is too long to be one.
    """
    phones: list[Phone] = []
    for name, first, count in entries:
        if name == "SIL" or name.startswith("+"):
            continue
        start_s = first * ALIGNER_HOP_S + ALIGNER_LATE_S
        end_s = min(start_s + count * ALIGNER_HOP_S, total_s)
        if end_s - start_s > LONGEST_PHONE_S:
            return None
        phones += cmu_phones(name, start_s, end_s)
    return tuple(phones) or None
