"""Speech of SVOX Pico (PyPI `py-nanotts`, Apache-2.0, voices included), an optional fourth engine.

Its English voices are two women's, built from recordings. It tells no phone times: pocketsphinx finds them, twice,
and only what both hearings agree on is used.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from streamtalk_training import aligner
from streamtalk_training.espeak import Utterance
from streamtalk_training.waves import read_wave

SAMPLE_RATE = 16000
VOLUME = 0.5  # its default of 1 clips


def find_pico() -> Path | None:
    """Where `py_nanotts` is installed with an aligner beside it; None without."""
    spec = find_spec("py_nanotts")
    if spec is None or spec.origin is None or not aligner.aligner_installed():
        return None
    return Path(spec.origin).parent


def say(text: str, voice: str = "en-US", speed: float = 1.0, pitch: float = 1.0) -> Utterance:
    """Speak `text` with `voice` (en-US, en-GB), `speed` and `pitch` times the usual.

    In a process of its own: what Pico said before changes what it says next, and not always in the same way.
    Raises UnknownPhoneError where no phone times can be trusted: a word that the aligner's dictionary lacks, or
    two hearings that differ. Raises OSError with Pico's own words where it fails.
    """
    said = aligner.readable(text)
    pcm = _spoken(text, voice, speed, pitch)
    return Utterance(pcm, SAMPLE_RATE, aligner.trusted(pcm, said))


def _spoken(text: str, voice: str, speed: float, pitch: float) -> aligner.Floats:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speech.wav"
        settings = {"voice": voice, "speed": speed, "pitch": pitch, "volume": VOLUME, "output": out}
        command = [
            sys.executable,
            "-m",
            "py_nanotts",
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
        done = subprocess.run([*command, "--", text], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not out.exists():
            raise OSError(f"py_nanotts failed: {done.stderr.strip() or done.stdout.strip()}")
        return read_wave(out)[0]
