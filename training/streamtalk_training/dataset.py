"""Clips as tensors, cut for training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamtalk_export.config import STRIDE
from streamtalk_export.mel import MEL_HOP, MelEncoder
from streamtalk_training.clips import Clip
from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.motion import MotionSpace

FRAME_GRID = 3  # at 30 fps every third frame falls on a feature (3 * 50 / 30 = 5): crops start there
FEATURES_A_GRID = 5


@dataclass(frozen=True)
class MotionData:
    """Clips end to end: `coordinates` float32 [N, K]; clip i spans `offsets[i]:offsets[i + 1]`, spoken by
    `speakers[i]`."""

    coordinates: Tensor
    offsets: NDArray[np.int64]
    speakers: NDArray[np.int64]


@dataclass(frozen=True)
class MelData:
    """Log-mel frames float16 [M, bins] of the same clips; feature s of a clip needs frames from 2 s on."""

    mel: Tensor
    offsets: NDArray[np.int64]


def motion_data(clips: Sequence[Clip], space: MotionSpace, gains: Sequence[float], idle: bool) -> MotionData:
    """Coordinates of all clips, each given to one speaker, whose gain scales the mouth's motion.

    Scaling every mouth weight alike keeps a sealed mouth sealed (`mouthClose` stays equal to `jawOpen`).
    """
    columns = [ARKIT_INDEX[name] for name in space.names]
    speakers = np.arange(len(clips)) % len(gains)
    parts = []
    for clip, speaker in zip(clips, speakers, strict=True):
        weights = clip.weights * gains[int(speaker)] + (clip.idle if idle else 0)
        parts.append(weights[:, columns] @ space.to_coordinates.T)
    offsets = np.cumsum([0, *map(len, parts)])
    return MotionData(torch.from_numpy(np.concatenate(parts).astype(np.float32)), offsets, speakers)


@torch.no_grad()
def mel_data(pcms: Iterable[NDArray[np.float32]], encoder: MelEncoder) -> MelData:
    """Log-mel frames of whole clips, with silence before the first sample and after the last."""
    parts = [clip_mel(torch.from_numpy(pcm)[None], encoder)[0].T.half() for pcm in pcms]
    return MelData(torch.cat(parts), np.cumsum([0, *map(len, parts)]))


def clip_mel(pcm: Tensor, encoder: MelEncoder) -> Tensor:
    """Log-mel [B, bins, M] of whole clips [B, n] such that `encoder.from_log_mel` yields feature s, which
    stands for sample 320 s, for every s up to n / 320 + 1."""
    features = pcm.shape[1] // STRIDE + 2
    after = (features - 1) * STRIDE + encoder.receptive_field - encoder.past_samples - pcm.shape[1]
    return encoder.log_mel(torch.nn.functional.pad(pcm, (encoder.past_samples, max(after, 0))))


def mel_frames(encoder: MelEncoder, features: int) -> int:
    """Log-mel frames that `features` neighbouring features need."""
    field = (encoder.receptive_field - 400) // MEL_HOP + 1
    return 2 * (features - 1) + field


def features_at_frames(features: Tensor, frames: int, fps: int) -> Tensor:
    """Features [B, S, A] at 50 Hz read at animation frames: [B, frames, A]; frame j reads j * 50 / fps."""
    position = torch.arange(frames, dtype=torch.float64) * 50 / fps
    before = position.floor().long()
    after = (before + 1).clamp(max=features.shape[1] - 1)
    share = (position - before).to(features)[None, :, None]
    return features[:, before] * (1 - share) + features[:, after] * share


@dataclass(frozen=True)
class Crops:
    """A batch: `motion` [B, 1 + L, K] with the frame before the crop first (stillness at a clip's start),
    `mel` [B, bins, M], `speaker` [B], `at_start` [B] (the crop opens its clip)."""

    motion: Tensor
    mel: Tensor
    speaker: Tensor
    at_start: Tensor

    def to(self, device: torch.device) -> Crops:
        return Crops(*(part.to(device) for part in (self.motion, self.mel, self.speaker, self.at_start)))


def crops(
    motion: MotionData,
    mel: MelData | None,
    encoder: MelEncoder | None,
    batch: int,
    frames: int,
    random: np.random.Generator,
    fps: int = 30,
    start_share: float = 0.15,
) -> Crops:
    """Random crops of `frames` frames, on the grid where frames and features meet; some open their clip.

    Clips shorter than a crop are passed over. Raises ValueError when all are.
    """
    if FEATURES_A_GRID * fps != FRAME_GRID * 50:
        raise ValueError(f"crops are laid out for 30 fps, received {fps}")
    lengths = np.diff(motion.offsets)
    fitting = np.flatnonzero(lengths >= frames)
    if len(fitting) == 0:
        raise ValueError(f"no clip has {frames} frames; the longest has {lengths.max(initial=0)}")
    clips = random.choice(fitting, batch, p=lengths[fitting] / lengths[fitting].sum())
    starts = (random.uniform(0, 1, batch) * (lengths[clips] - frames + 1)).astype(int)
    starts = starts // FRAME_GRID * FRAME_GRID
    starts[random.uniform(0, 1, batch) < start_share] = 0

    first = motion.offsets[clips] + starts
    rows = first[:, None] + np.arange(-1, frames)
    cut = motion.coordinates[torch.from_numpy(np.maximum(rows, 0))]
    at_start = torch.from_numpy(starts == 0)
    cut[at_start, 0] = 0
    heard = torch.empty(0)
    if mel is not None and encoder is not None:
        needed = mel_frames(encoder, int(np.ceil((frames - 1) * 50 / fps)) + 1)
        mel_first = mel.offsets[clips] + 2 * starts * FEATURES_A_GRID // FRAME_GRID
        mel_rows = mel_first[:, None] + np.arange(needed)
        heard = mel.mel[torch.from_numpy(mel_rows)].float().transpose(1, 2)
    return Crops(cut, heard, torch.from_numpy(motion.speakers[clips]), at_start)
