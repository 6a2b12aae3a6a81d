"""A talker and a corpus small enough to train in a second."""

from __future__ import annotations

import numpy as np

from streamtalk_export.blendshapes import ARKIT_NAMES
from streamtalk_export.config import AudioEncoderConfig, ModelConfig, PredictorConfig, StreamConfig, VQConfig
from streamtalk_training.clips import Clip, ClipSpec
from streamtalk_training.coarticulation import Style, arkit_weights, mouth_controls
from streamtalk_training.motion import MotionSpace, motion_space
from streamtalk_training.visemes import Phone

MOUTH = ("jawOpen", "mouthClose", "mouthPucker", "mouthFunnel")
UPPER = ("eyeBlinkLeft", "eyeBlinkRight", "browInnerUp")
USED = (*MOUTH, *UPPER)
VERTICES = 9
LIP_PAIRS = np.array([[0, 1], [2, 3]])
GAINS = (1.0, 0.9)
SHAPES = np.random.default_rng(0).normal(0, 0.01, (len(ARKIT_NAMES), VERTICES, 3))


def tiny_space() -> MotionSpace:
    return motion_space(MOUTH, UPPER, ARKIT_NAMES, SHAPES, np.arange(4), LIP_PAIRS)


def tiny_config(space: MotionSpace) -> ModelConfig:
    return ModelConfig(
        name="tiny",
        window_size=8,
        audio=AudioEncoderConfig(fps=30, kind="mel", mel_bins=16, width=16, dilations=(1, 2)),
        predictor=PredictorConfig(
            vq_dim=8,
            latent_dim=16,
            audio_encode_dim=16,
            id_dim=len(GAINS),
            feedforward_dim=16,
            num_layers=2,
            dropout=0.0,
            head="residual_mlp",
            num_res_blocks=1,
        ),
        vq=VQConfig(
            n_vert=space.width,
            n_embed=8,
            zquant_dim=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            face_quan_num=2,
            instance_norm=False,
        ),
        steps=3,
        sampler="ddim",
        stream=StreamConfig(decode_window=4),
    )


def tiny_clips(count: int = 4) -> list[Clip]:
    """Two-second clips: a tone for /a/, silence for /m/, in turn."""
    clips = []
    for index in range(count):
        random = np.random.default_rng(index)
        phones = tuple(Phone(0.25 * i, 0.25 * (i + 1), "am"[i % 2], ("AA", "PBM")[i % 2]) for i in range(8))
        time_s = np.arange(32000) / 16000
        loud = (time_s // 0.25 % 2 == 0).astype(np.float32)
        pcm = 0.2 * loud * np.sin(2 * np.pi * 220 * time_s) + random.normal(0, 1e-3, len(time_s))
        weights = arkit_weights(mouth_controls(phones, np.arange(60) / 30, Style()), Style())
        spec = ClipSpec(index, 0, "espeak", "en-us", ("made up",), False)
        idle = np.zeros_like(weights)
        for name in ("eyeBlinkLeft", "eyeBlinkRight"):
            idle[20 + index : 24 + index, ARKIT_NAMES.index(name)] = (0.5, 1.0, 1.0, 0.5)
        clips.append(Clip(spec, pcm.astype(np.float32), weights, idle, phones))
    return clips
