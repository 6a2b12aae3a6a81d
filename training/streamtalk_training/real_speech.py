"""Recorded speech with phone times, for evaluation alone: a person's voice, which no rule made.

The prompts are Asterisk's (Debian `asterisk-core-sounds-en-g722`, CC-BY-SA; transcripts in
`asterisk-core-sounds-en`), read by one speaker. PyAV decodes them, pocketsphinx aligns them with their
transcripts. Unpacked (`dpkg -x`), the packages serve. Nothing of them is kept.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamtalk.viewer.extras import require
from streamtalk_training.aligner import aligned, aligned_warped, aligner_installed, known, words
from streamtalk_training.clips import SAMPLE_RATE, with_silences
from streamtalk_training.visemes import Phone

Floats = NDArray[np.float32]

TRANSCRIPTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
PROMPTS = Path("usr/share/asterisk/sounds/en_US_f_Allison")
MUSIC = Path("usr/share/asterisk/moh")

LEAST_WORDS = 3
LEAST_S = 1.2
CLIP_S = 25.0  # prompts are joined into clips of about this length
PAUSE_S = 0.3
RECHECK_EVERY = 5  # of the prompts one is aligned twice


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


def decoded(path: Path) -> Floats:
    """PCM float32 [n] at 16 kHz of a G.722 file."""
    av = require("av", "Decoding G.722")
    with av.open(str(path), format="g722") as container:
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(parts).astype(np.float32) / np.float32(32768)


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
