"""Speech with phone times from Festival, an optional third engine.

Debian packages: `festival`, `libestools2.5`, `festlex-cmu`, `festlex-poslex`, `festvox-us-slt-hts`,
`festvox-kallpc16k` and `festvox-kdlpc16k`; and eight voices of three other languages, cut from recordings:
`festlex-ifd`, `festvox-italp16k`, `festvox-itapc16k`, `festvox-suopuhe-common`, `festvox-suopuhe-lj`,
`festvox-suopuhe-mv`, `festival-czech` and `festvox-czech-dita`, `-krb`, `-machac`, `-ph`. Installed or merely
unpacked (`dpkg -x`). The program starts slowly, so that many sentences are spoken by one process.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from streamtalk_training.espeak import Utterance
from streamtalk_training.programs import with_libraries
from streamtalk_training.visemes import Phone, UnknownPhoneError, cmu_phones, festival_phones
from streamtalk_training.waves import read_wave

ABROAD = {
    "lp_diphone": "it",
    "pc_diphone": "it",
    "hy_fi_mv_diphone": "fi",
    "suo_fi_lj_diphone": "fi",
    "czech_dita": "cs",
    "czech_krb": "cs",
    "czech_machac": "cs",
    "czech_ph": "cs",
}
"""Voices that speak no English, and the language of each."""
_ENCODINGS = {"it": "latin-1", "fi": "latin-1", "cs": "iso8859-2"}
# Measured: the vowels of this voice sound so much later than their labels say.
_LABELS_EARLY_S = {"cmu_us_slt_arctic_hts": 0.012}
# Czech voices look for their recordings where they would be installed, and draw durations by chance.
_CZECH = """
(set! czech-randomize nil)
(set! czech-{group}-unisyn-index "{data}/voices/czech/{voice}/group/{group}.group")
"""
_SAVE = """
(define (speak_into text base)
  (let ((utt (utt.synth (eval (list 'Utterance 'Text text)))))
    (utt.save.wave utt (string-append base ".wav") 'riff)
    (utt.save.segs utt (string-append base ".lab"))))
"""
_READ = """
(voice_cmu_us_slt_arctic_hts)
(define (read_into text file)
  (hts_dump_feats (utt.synth (eval (list 'Utterance 'Text text))) hts_feats_list file))
"""


@dataclass(frozen=True)
class Festival:
    """The program, the folder of its scheme files, voices and dictionaries, and that of its libraries (None
    where it is installed: the system finds them)."""

    program: Path
    data: Path
    libraries: Path | None

    @cached_property
    def environment(self) -> dict[str, str]:
        """For the program, and for others that were unpacked beside it."""
        return with_libraries([] if self.libraries is None else self.libraries.rglob("lib*.so*"))

    @property
    def abroad(self) -> bool:
        """Whether every voice of `ABROAD` is there."""
        folders = {path.name for path in (self.data / "voices").glob("*/*")}
        return folders.issuperset(ABROAD)


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
        data = str(installed.data.resolve())
        script = [_SAVE.encode()]
        for voice in sorted({line.voice for line in lines if ABROAD.get(line.voice) == "cs"}):
            czech = _CZECH.format(data=data, voice=voice, group=voice.removeprefix("czech_"))
            script.append(czech.encode())
        for index, line in enumerate(lines):
            script.append(f"(voice_{line.voice})".encode())
            script.append(f"(Parameter.set 'Duration_Stretch {line.stretch:.3f})".encode())
            said = _quoted(line.text, _ENCODINGS[ABROAD[line.voice]] if line.voice in ABROAD else "ascii")
            script.append(b'(speak_into "%b" "%b")' % (said, str(folder / str(index)).encode()))
        _run(installed, script, folder, folder / f"{len(lines) - 1}.lab")
        return [_utterance(folder / str(index), line.voice) for index, line in enumerate(lines)]


def full_context(installed: Festival, texts: Sequence[str]) -> list[str]:
    """For each of `texts`, the labels that a statistical voice speaks from: a line for every phone, with the phones
    around it and its place in syllable, word and phrase, as the HTS voice reads them.

    Raises OSError with Festival's own words where it fails.
    """
    if not texts:
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = [_READ.encode()]
        for index, text in enumerate(texts):
            script.append(b'(read_into "%b" "%b")' % (_quoted(text), str(folder / str(index)).encode()))
        _run(installed, script, folder, folder / str(len(texts) - 1))
        return [(folder / str(index)).read_text() for index in range(len(texts))]


def _run(installed: Festival, script: Sequence[bytes], folder: Path, last: Path) -> None:
    """Have Festival carry out `script`, which makes the file `last` at its end; `folder` is for what it is run from."""
    data, path = str(installed.data.resolve()), folder / "lines.scm"
    path.write_bytes(b"\n".join(script))
    done = subprocess.run(
        [str(installed.program.resolve()), "--datadir", data, "--libdir", data, "-b", str(path)],
        capture_output=True,
        text=True,
        errors="replace",  # it quotes its own files, each in an encoding of its own
        cwd=data,  # where the Czech dictionary is looked for
        env=installed.environment,
        check=False,
    )
    if not last.exists():
        raise OSError(f"{installed.program} failed: {done.stderr.strip() or done.stdout.strip()}")


def _quoted(text: str, encoding: str = "ascii") -> bytes:
    """`text` as it may stand between the quotes of a scheme string."""
    return text.replace("\\", " ").replace('"', " ").encode(encoding, "ignore")


def _utterance(base: Path, voice: str) -> Utterance | UnknownPhoneError:
    pcm, sample_rate = read_wave(base.with_suffix(".wav"))
    phones: list[Phone] = []
    start_s = 0.0
    for label in base.with_suffix(".lab").read_text().splitlines()[1:]:  # the first line is a lone '#'
        end, _, phone = label.split()
        end_s = float(end) + _LABELS_EARLY_S.get(voice, 0.0)
        try:
            if voice in ABROAD:
                phones += festival_phones(phone, start_s, end_s, ABROAD[voice])
            else:
                phones += cmu_phones(phone, start_s, end_s)
        except UnknownPhoneError as error:
            return error
        start_s = end_s
    return Utterance(pcm, sample_rate, tuple(phones))
