"""Speech with phone times from Festival, an optional third engine.

Debian packages: `festival`, `libestools2.5`, `festlex-cmu`, `festlex-poslex`, `festvox-us-slt-hts`,
`festvox-kallpc16k` and `festvox-kdlpc16k`; installed or merely unpacked (`dpkg -x`). The program starts slowly,
so that many sentences are spoken by one process.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamtalk_training.espeak import Utterance
from streamtalk_training.visemes import Phone, UnknownPhoneError, cmu_phones
from streamtalk_training.waves import read_wave

# Measured: the vowels of this voice sound so much later than their labels say.
_LABELS_EARLY_S = {"cmu_us_slt_arctic_hts": 0.012}
_SAVE = """
(define (speak_into text base)
  (let ((utt (utt.synth (eval (list 'Utterance 'Text text)))))
    (utt.save.wave utt (string-append base ".wav") 'riff)
    (utt.save.segs utt (string-append base ".lab"))))
"""


@dataclass(frozen=True)
class Festival:
    """The program, the folder of its scheme files, voices and dictionaries, and that of its libraries (None
    where it is installed: the system finds them)."""

    program: Path
    data: Path
    libraries: Path | None


@dataclass(frozen=True)
class Line:
    """One sentence to speak; `stretch` above 1 is slower (the HTS voice keeps its own pace)."""

    text: str
    voice: str
    stretch: float


def find_festival(root: Path) -> Festival | None:
    """Festival below `root` (`/` where it is installed), with its English voices; None without them."""
    usr = root / "usr"
    libraries = None if root.resolve() == Path("/") else usr / "lib"
    found = Festival(usr / "bin" / "festival", usr / "share" / "festival", libraries)
    voices = found.data / "voices"
    return found if found.program.exists() and (voices / "us" / "cmu_us_slt_arctic_hts").exists() else None


def say_all(installed: Festival, lines: Sequence[Line]) -> list[Utterance | UnknownPhoneError]:
    """Speak every line, in order, by one process; a line with a phone that the tables lack gives the error.

    Raises OSError with Festival's own words where it fails.
    """
    if not lines:
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = [_SAVE]
        for index, line in enumerate(lines):
            script.append(f"(voice_{line.voice})")
            script.append(f"(Parameter.set 'Duration_Stretch {line.stretch:.3f})")
            script.append(f'(speak_into "{_plain(line.text)}" "{folder / str(index)}")')
        path = folder / "lines.scm"
        path.write_text("\n".join(script), encoding="ascii")
        environment = dict(os.environ)
        if installed.libraries is not None:
            libraries = sorted({str(found.parent) for found in installed.libraries.rglob("lib*.so*")})
            environment["LD_LIBRARY_PATH"] = ":".join([*libraries, environment.get("LD_LIBRARY_PATH", "")])
        data = str(installed.data)
        done = subprocess.run(
            [str(installed.program), "--datadir", data, "--libdir", data, "-b", str(path)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if not (folder / f"{len(lines) - 1}.lab").exists():
            raise OSError(f"{installed.program} failed: {done.stderr.strip() or done.stdout.strip()}")
        return [
            _utterance(folder / str(index), _LABELS_EARLY_S.get(line.voice, 0.0))
            for index, line in enumerate(lines)
        ]


def _plain(text: str) -> str:
    """`text` as it may stand between the quotes of a scheme string."""
    return text.encode("ascii", "ignore").decode().replace("\\", " ").replace('"', " ")


def _utterance(base: Path, early_s: float) -> Utterance | UnknownPhoneError:
    pcm, sample_rate = read_wave(base.with_suffix(".wav"))
    phones: list[Phone] = []
    start_s = 0.0
    for label in base.with_suffix(".lab").read_text().splitlines()[1:]:  # the first line is a lone '#'
        end, _, phone = label.split()
        end_s = float(end) + early_s
        try:
            phones += cmu_phones(phone, start_s, end_s)
        except UnknownPhoneError as error:
            return error
        start_s = end_s
    return Utterance(pcm, sample_rate, tuple(phones))
