"""Makes `models/bundled` from nothing: `python -m streamtalk_training.bundled --cache DIR`.

Corpus, stage 1, stage 2, packing, evaluation, demo clip: each step goes on where it stopped. The face comes from
`python -m streamtalk_training.face`. Debian's `wordnet-base`, `flite` and `libflite1` are used where they are
installed, or unpacked below --debian (`apt-get download NAME && dpkg -x NAME.deb DIR`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import wave
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from streamtalk_export.checkpoint import read_state
from streamtalk_export.config import load_config
from streamtalk_training import corpus, espeak, evaluate, flite, stage1, stage2
from streamtalk_training.dataset import mel_data, motion_data
from streamtalk_training.face import load_face
from streamtalk_training.pack import pack, write_config
from streamtalk_training.setup import face_space, narrowed, speaker_gains
from streamtalk_training.talker import Talker

HOURS = 6.0
DEMO_TEXT = (
    "Hello! My lips move to the sound of my voice, a tenth of a second after you hear it. "
    "Five happy people bought a big map of the moon."
)
DEMO_VOICE = "en-us+f5"  # never trained on; flite's awb, where there is one, neither
PACKAGES = ("torch", "numpy", "scipy", "soxr", "espeakng-loader", "safetensors")


def demo_speech(flite_program: Path | None) -> NDArray[np.float32]:
    """The demo sentence as PCM float32 [n] at 16 kHz."""
    if flite_program is None:
        spoken = espeak.say(DEMO_TEXT, DEMO_VOICE, rate=165)
    else:
        spoken = flite.say(flite_program, DEMO_TEXT, corpus.TEST_FLITE_VOICE)
    pcm = np.asarray(soxr.resample(spoken.pcm, spoken.sample_rate, 16000), np.float32)
    return pcm * np.float32(0.5 / np.abs(pcm).max())


def write_wav(path: Path, pcm: NDArray[np.float32]) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.round(pcm * 32767).astype("<i2").tobytes())


def provenance(options: argparse.Namespace, plans: dict[str, object], out: Path) -> dict[str, object]:
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
        "plans": plans,
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "sha256": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m streamtalk_training.bundled", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="corpus and training runs, some 2 GB")
    parser.add_argument(
        "--out", type=Path, default=Path("models/bundled"), help="holds face.npz; gets the rest"
    )
    parser.add_argument("--hours", type=float, default=HOURS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debian", type=Path, default=Path("/"), help="where wordnet-base and flite are")
    parser.add_argument(
        "--threads", type=int, default=1, help="more help a quiet machine, and harm a busy one"
    )
    parser.add_argument("--stage1-steps", type=int, default=stage1.Stage1.steps)
    parser.add_argument("--stage2-steps", type=int, default=stage2.Stage2.steps)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    speech, out = options.cache / "corpus", options.out
    common = ["--hours", str(options.hours), "--seed", str(options.seed), "--debian", str(options.debian)]
    corpus.main([*common, "--out", str(speech)])

    face = load_face(out / "face.npz")
    write_config(out / "config.yaml", face)
    wide = load_config(out / "config.yaml")
    space, gains = face_space(face), speaker_gains(len(face.templates))
    config = narrowed(wide, space)
    clips = corpus.load_split(speech, "train")
    motion = motion_data(clips, space, gains, idle=False)
    first = stage1.Stage1(options.stage1_steps, seed=options.seed)
    second = stage2.Stage2(options.stage2_steps, seed=options.seed)
    autoencoder = stage1.train(config, space, motion, first, options.cache / "stage1")
    mel = mel_data((clip.pcm for clip in clips), Talker(config).audio_encoder)
    codes = autoencoder.state_dict()
    talker = stage2.train(config, space, motion, mel, codes, second, options.cache / "stage2")
    pack(talker, space, out / "model.safetensors")

    write_wav(out / "demo.wav", demo_speech(flite.find_flite(options.debian)))
    plans: dict[str, object] = {"stage1": asdict(first), "stage2": asdict(second)}
    made = provenance(options, plans, out)
    (out / "provenance.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    packed = evaluate.load_talker(wide, space, read_state(out / "model.safetensors"))
    figures = {
        split: evaluate.evaluate(packed, face, space, corpus.load_split(speech, split))
        for split in ("test", "awb")
        if (speech / split).exists()
    }
    text = json.dumps(evaluate.rounded(figures), indent=1)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
