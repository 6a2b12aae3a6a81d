"""How well a talker does between two steps of its training: a few clips streamed in torch, in a second or two.

`evaluate` measures what ships, through the exported graphs and the runtime; this only tells a run from a better
one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamtalk_training.dataset import MelData, MotionData, frame_features
from streamtalk_training.metrics import blinks, correlation
from streamtalk_training.motion import READINGS, MotionSpace, control_readings, lip_gap_vectors
from streamtalk_training.talker import Talker, decoded_stream, rollout


@dataclass(frozen=True)
class Validation:
    """Clips that training does not see, and how to read their motion."""

    motion: MotionData
    mel: MelData
    clips: int = 16
    frames: int = 240


@torch.no_grad()
def streamed(talker: Talker, data: Validation, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Motion [B, L, K] of the longest clips of `data`, streamed, and their true motion."""
    device = next(talker.parameters()).device
    lengths = np.diff(data.motion.offsets)
    chosen = np.argsort(-lengths, kind="stable")[: data.clips]
    frames = int(min(lengths[chosen].min(), data.frames))
    generator = torch.Generator().manual_seed(seed)
    features, true = [], []
    for clip in chosen.tolist():
        mel = data.mel.mel[:, data.mel.offsets[clip] : data.mel.offsets[clip + 1]]
        heard = mel.transpose(1, 2)[None].float().to(device)
        features.append(frame_features(talker.audio_encoder, heard, frames)[0])
        start = int(data.motion.offsets[clip])
        true.append(data.motion.coordinates[start : start + frames])
    speakers = torch.from_numpy(data.motion.speakers[chosen]).to(device)
    noise = torch.randn(len(chosen), frames, talker.config.predictor.vq_dim, generator=generator)
    latents = rollout(talker, torch.stack(features), speakers, noise.to(device))
    return decoded_stream(talker, latents).cpu(), torch.stack(true)


def scores(space: MotionSpace, predicted: Tensor, true: Tensor, fps: float) -> dict[str, float]:
    """Correlation of each of `READINGS`, error across the lips in mm, blinks a minute (and the labels')."""
    to_weights = torch.from_numpy(space.to_weights).T
    readings = to_weights @ torch.from_numpy(control_readings(space.names))
    found, wanted = ((motion @ readings).flatten(0, 1).numpy() for motion in (predicted, true))
    values = {
        f"r {name}": correlation(found[:, column], wanted[:, column])
        for column, name in enumerate(READINGS)
        if wanted[:, column].std() > 0
    }
    gaps = [lip_gap_vectors(space, motion).norm(dim=-1) for motion in (predicted, true)]
    values["gap_mm"] = 1e3 * float((gaps[0] - gaps[1]).abs().mean())
    if "eyeBlinkLeft" in space.names:
        minutes = true.shape[0] * true.shape[1] / fps / 60
        for name, motion in (("blinks", predicted), ("true blinks", true)):
            values[name] = sum(len(blinks(clip.numpy())) for clip in eyelids(space, motion)) / minutes
    return values


def eyelids(space: MotionSpace, motion: Tensor) -> Tensor:
    """How far the eyelids are shut in motion [..., K], from 0 to 1. Raises ValueError in a space without lids."""
    return motion @ torch.from_numpy(space.to_weights[space.names.index("eyeBlinkLeft")]).to(motion)
