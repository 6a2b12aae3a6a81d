"""A tiny made-up data set in the release's folder layout, and settings small enough to train on it in seconds.

Three subjects say four sentences of two seconds: bursts of a buzz, whose loudness moves the lips. Nothing of
VOCASET or BIWI is in it.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.io import wavfile

VERTICES = 60
LIPS = np.arange(0, 12)  # even ones above, odd ones below
UPPER_FACE = np.arange(30, 45)
SECONDS = 2
SENTENCES = 4
SUBJECTS = {
    "vocaset": ("FaceTalk_000001_00001_TA", "FaceTalk_000002_00002_TA", "FaceTalk_000003_00003_TA"),
    "biwi": ("F2", "M3", "F1"),
}
"""The last is unseen in training."""
STORED_FPS = {"vocaset": 60, "biwi": 25}
FPS = {"vocaset": 30, "biwi": 25}
WAV_RATE = {"vocaset": 22050, "biwi": 16000}
GAINS = (1.0, 0.8, 0.9)
OPENING = 1.0  # in the data set's unit, whatever it is: tiny ones ask for longer training


def loudness(random: np.random.Generator, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Syllables of unequal strength, 0 to 1, at times [n]."""
    centres_s = np.arange(0.2, SECONDS, 0.4) + random.uniform(-0.08, 0.08, 5)
    strengths = random.uniform(0.3, 1.0, len(centres_s))
    bumps = strengths * np.exp(-(((times_s[:, None] - centres_s) / 0.08) ** 2))
    return np.asarray(bumps.max(1))


def clip(
    layout: str, subject: int, sentence: int, template: NDArray[np.float64]
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Sound [n] and vertices [T, 3V] of one sentence."""
    rate, fps = WAV_RATE[layout], STORED_FPS[layout]

    def level(times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        return loudness(np.random.default_rng([subject, sentence]), times_s)

    sound_s = np.arange(SECONDS * rate) / rate
    buzz = sum(np.sin(2 * np.pi * (110 + 30 * subject) * k * sound_s) / k for k in range(1, 12))
    noise = np.random.default_rng([9, subject, sentence]).normal(0, 0.003, len(sound_s))
    pcm = 0.2 * level(sound_s) * buzz + noise
    opening = GAINS[subject] * OPENING * level(np.arange(SECONDS * fps) / fps)
    offsets = np.zeros((len(opening), VERTICES, 3))
    offsets[:, LIPS[1::2], 1] = -opening[:, None]
    offsets[:, LIPS[::2], 1] = 0.2 * opening[:, None]
    offsets[:, UPPER_FACE, 1] = 0.1 * opening[:, None]
    vertices = (template + offsets).reshape(len(opening), -1)
    return np.round(pcm * 32767).clip(-32768, 32767).astype(np.int16), vertices.astype(np.float32)


def write_data(folder: Path, layout: str) -> Path:
    """The data set, exactly as the release keeps it; returns `folder`."""
    (folder / "vertices_npy").mkdir(parents=True)
    (folder / "wav").mkdir()
    templates = {}
    for index, subject in enumerate(SUBJECTS[layout]):
        template = np.random.default_rng([7, index]).normal(0, 2.0, (VERTICES, 3))
        templates[subject] = template if layout == "vocaset" else template.reshape(-1)
        for sentence in range(1, SENTENCES + 1):
            name = f"{subject}_{'sentence' if layout == 'vocaset' else 'e'}{sentence:02}"
            pcm, vertices = clip(layout, index, sentence, template)
            wavfile.write(folder / "wav" / f"{name}.wav", WAV_RATE[layout], pcm)
            np.save(folder / "vertices_npy" / f"{name}.npy", vertices)
    (folder / "templates.pkl").write_bytes(pickle.dumps(templates))
    if layout == "vocaset":
        half = len(UPPER_FACE) // 2
        masks = {"lips": LIPS, "forehead": UPPER_FACE[:half], "eye_region": UPPER_FACE[half - 2 :]}
        (folder / "FLAME_masks.pkl").write_bytes(pickle.dumps(masks))
    else:
        (folder / "regions").mkdir()
        (folder / "regions" / "lve.txt").write_text(", ".join(map(str, LIPS)))
        (folder / "regions" / "fdd.txt").write_text(", ".join(map(str, UPPER_FACE)))
    pairs = [f"{upper} {lower}" for upper, lower in LIPS.reshape(-1, 2)]
    (folder / "lip_pairs.txt").write_text("\n".join(pairs) + "\n")
    return folder


def write_settings(folder: Path, layout: str) -> Path:
    """`config.yaml`, `hubert_config.json` and `subjects.yaml` for it; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = {
        "config.yaml": config_document(layout),
        "subjects.yaml": {
            "train": {"subjects": list(SUBJECTS[layout][:2]), "sentences": "1-3"},
            "val": {"subjects": list(SUBJECTS[layout][:2]), "sentences": 4},
            "test_a": {"subjects": list(SUBJECTS[layout][:2]), "sentences": 4},
            "test_b": {"subjects": [SUBJECTS[layout][2]], "sentences": "1,4"},
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(yaml.safe_dump(document, sort_keys=False))
    hubert = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "vocab_size": 32,
    }
    (folder / "hubert_config.json").write_text(json.dumps(hubert))
    return folder


def config_document(layout: str) -> dict[str, Any]:
    """The release's YAML schema at a tiny size."""
    biwi = layout == "biwi"
    hidden = 24 if biwi else 32
    return {
        "DATASET": {"NAME": f"made_up_{layout}"},
        "MODEL": {
            "window_size": 20,
            "AUDIO_ENCODER": {"audio_fps": 50, "hidden_fps": FPS[layout]},
            "DIFF_AR_DEC": {
                "vq_dim": 32,
                "latent_dim": 32,
                "audio_encode_dim": 32,
                "id_dim": 2,
                "feedforward_dim": 48,
                "period": FPS[layout],
                "n_heads": 4,
                "num_layers": 2,
                "dropout": 0.1,
                "activation": "gelu" if biwi else "relu",
            },
            "VAE": {
                "n_vert": 3 * VERTICES,
                "n_embed": 32,
                "zquant_dim": 8,
                "face_quan_num": 4,
                "hidden_size": hidden,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 48,
            },
            "num_inference_timesteps": 50,
        },
    }
