"""Recorded speech with phone times, for evaluation alone: a person's voice, which no rule made.

The prompts are Asterisk's (Debian `asterisk-core-sounds-en-g722`, CC-BY-SA; transcripts in
`asterisk-core-sounds-en`), read by one speaker. PyAV decodes them, pocketsphinx aligns them with their
transcripts. Unpacked (`dpkg -x`), the packages serve. Nothing of them is kept.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from streamtalk.viewer.extras import require
from streamtalk_training.clips import SAMPLE_RATE, with_silences
from streamtalk_training.visemes import Phone, cmu_phones

Floats = NDArray[np.float32]

TRANSCRIPTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
PROMPTS = Path("usr/share/asterisk/sounds/en_US_f_Allison")
MUSIC = Path("usr/share/asterisk/moh")

LEAST_WORDS = 3
LEAST_S = 1.2
CLIP_S = 25.0  # prompts are joined into clips of about this length
PAUSE_S = 0.3
ALIGNER_HOP_S = 0.01
# The aligner's window of 25.6 ms begins where its 10 ms frame does, so what it hears is 7.8 ms later than the
# frame's own middle. Against flite's own times it was 8 ms early (median) before this.
ALIGNER_LATE_S = 0.0078
RECHECK_EVERY = 5  # of the prompts one is aligned twice
RECHECK_WARP = 1.06  # the second time it plays this much faster and higher
LONGEST_PHONE_S = 0.6  # a longer one is an alignment gone astray
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class RecordingsError(OSError):
    """The recordings, or the aligner, are not there; the message says how to get them."""


@dataclass(frozen=True)
class Spoken:
    """Speech whose phones are known: `pcm` float32 [n] at 16 kHz; what no phone covers is silence."""

    name: str
    pcm: Floats
    phones: tuple[Phone, ...]


@dataclass(frozen=True)
class Recordings:
    """Clips of joined prompts, how many prompts they hold, and why others were left out.

    `twice` are some prompts and the phones that a second, warped hearing found in them.
    """

    clips: tuple[Spoken, ...]
    prompts: int
    dropped: dict[str, int]
    twice: tuple[tuple[Spoken, tuple[Phone, ...]], ...]


def load_recordings(root: Path, most: int | None = None) -> Recordings:
    """Read, align and join the prompts below `root`, at most `most` of them. Raises RecordingsError where there
    are none."""
    if not aligner_installed():
        raise RecordingsError("recorded speech is aligned by pocketsphinx: pip install 'streamtalk[train]'")
    if not (root / TRANSCRIPTS).exists() or not (root / PROMPTS).exists():
        raise RecordingsError(
            f"no recorded speech below {root}: apt-get download asterisk-core-sounds-en "
            f"asterisk-core-sounds-en-g722, then dpkg -x each into {root}"
        )
    with gzip.open(root / TRANSCRIPTS, "rt", encoding="utf-8") as file:
        transcripts = read_transcripts(file)
    dropped: Counter[str] = Counter()
    prompts: list[Spoken] = []
    twice: list[tuple[Spoken, tuple[Phone, ...]]] = []
    for name, text in transcripts.items():
        if len(prompts) == most:
            break
        said = words(text)
        path = root / PROMPTS / f"{name}.g722"
        if said is None:
            dropped["not plain words"] += 1
        elif len(said) < LEAST_WORDS:
            dropped["short"] += 1
        elif not path.exists():
            dropped["no recording"] += 1
        elif not all(map(known, said)):
            dropped["word out of dictionary"] += 1
        elif len(pcm := decoded(path)) < LEAST_S * SAMPLE_RATE:
            dropped["short"] += 1
        elif (phones := aligned(pcm, said)) is None:
            dropped["not aligned"] += 1
        else:
            prompts.append(Spoken(name, pcm, phones))
            if len(prompts) % RECHECK_EVERY == 0 and (again := aligned_warped(pcm, said)) is not None:
                twice.append((prompts[-1], again))
    return Recordings(tuple(joined(prompts)), len(prompts), dict(dropped), tuple(twice))


def read_transcripts(lines: Iterable[str]) -> dict[str, str]:
    """Text by prompt of `name: text` lines; `;` begins a comment."""
    pairs = (line.partition(":") for line in lines if ":" in line and not line.startswith(";"))
    return {name.strip(): text.strip() for name, _, text in pairs}


def words(text: str) -> list[str] | None:
    """The words that `text` is read as; None where that is unsure: descriptions of sounds, acronyms, numbers."""
    if re.search(r"[\[<(]|\b[A-Z]{2,}\b|\d\d|\d[A-Za-z]|[A-Za-z]\d", text):
        return None
    spelled = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    found = re.findall(r"[a-z']+", spelled.lower())
    return [word.strip("'") for word in found if word.strip("'")]


def decoded(path: Path) -> Floats:
    """PCM float32 [n] at 16 kHz of a G.722 file."""
    av = require("av", "Decoding G.722")
    with av.open(str(path), format="g722") as container:
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(parts).astype(np.float32) / np.float32(32768)


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


def joined(prompts: Sequence[Spoken]) -> Iterator[Spoken]:
    """Prompts end to end, with pauses between, in clips of `CLIP_S` or a little more."""
    pause = np.zeros(round(PAUSE_S * SAMPLE_RATE), np.float32)
    chunks: list[Floats] = [pause]
    phones: list[Phone] = []
    first = ""

    def clip() -> Spoken:
        pcm = np.concatenate(chunks)
        return Spoken(first, pcm, tuple(with_silences(phones, len(pcm) / SAMPLE_RATE)))

    for prompt in prompts:
        first = first or prompt.name
        start_s = sum(map(len, chunks)) / SAMPLE_RATE
        phones += [Phone(start_s + p.start_s, start_s + p.end_s, p.name, p.viseme) for p in prompt.phones]
        chunks += [prompt.pcm, pause]
        if sum(map(len, chunks)) > CLIP_S * SAMPLE_RATE:
            yield clip()
            chunks, phones, first = [pause], [], ""
    if phones:
        yield clip()
