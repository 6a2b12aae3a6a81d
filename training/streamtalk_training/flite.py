"""Speech with phone times from CMU flite (Debian: `flite`, `libflite1`), an optional second engine.

Its voices are built from recordings, so they sound less alike than espeak-ng's. Installed or merely unpacked
(`dpkg -x`), the program serves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from streamtalk_training.espeak import Utterance
from streamtalk_training.programs import with_libraries
from streamtalk_training.visemes import Phone, cmu_phones
from streamtalk_training.waves import read_wave

# Measured: the vowels of this voice sound so much later than their labels say.
_LABELS_EARLY_S = {"slt": 0.01}
_LABEL = re.compile(r"([a-z]+\d?):(\d+\.\d+)")


def find_flite(root: Path | None = None) -> Path | None:
    """The flite program below `root` where its packages were unpacked, else that on the path; None without one."""
    if root is not None and root.resolve() != Path("/"):
        unpacked = root / "usr" / "bin" / "flite"
        if unpacked.exists():
            return unpacked
    installed = shutil.which("flite")
    return None if installed is None else Path(installed)


def say(
    program: Path, text: str, voice: str = "slt", stretch: float = 1.0, pitch_hz: float | None = None
) -> Utterance:
    """Speak `text` with `voice` (slt, rms, awb, kal16); `stretch` above 1 is slower, `pitch_hz` the mean pitch.

    Raises OSError with flite's own words where it fails.
    """
    environment = with_libraries(program.parent.parent.glob("lib/*/libflite.so*"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speech.wav"
        command = [str(program), "-voice", voice, "--setf", f"duration_stretch={stretch}"]
        if pitch_hz is not None:
            command += ["--setf", f"int_f0_target_mean={pitch_hz}"]
        done = subprocess.run(
            [*command, "-psdur", "-o", str(out), "-t", text],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if done.returncode != 0 or not out.exists():
            raise OSError(f"{program} failed: {done.stderr.strip() or done.stdout.strip()}")
        pcm, sample_rate = read_wave(out)
    phones: list[Phone] = []
    start_s = 0.0
    for name, end in _LABEL.findall(done.stdout):
        end_s = float(end) + _LABELS_EARLY_S.get(voice, 0.0)
        phones += cmu_phones(name, start_s, end_s)
        start_s = end_s
    return Utterance(pcm, sample_rate, tuple(phones))
