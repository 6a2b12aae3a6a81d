"""Clips as tensors, cut for training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamtalk_export.config import SAMPLE_RATE, STRIDE
from streamtalk_export.mel import MEL_HOP, MelEncoder
from streamtalk_training.clips import Clip, ClipSpec
from streamtalk_training.coarticulation import ARKIT_INDEX
from streamtalk_training.motion import MotionSpace
from streamtalk_training.visemes import Phone, tables

FPS = 30
PHASES = 3
"""At 30 fps frames come every 533 1/3 samples: every third one falls on the grid of features (320 samples), and the
two between have a grid of their own each."""
FEATURES_A_CYCLE = 5  # three frames span so many features


CLOCK_S, CLOCK_SCALE = 6.0, 6.0  # the clock's longest wait and its value when a blink is due
BLINK_ONSET = 0.1  # eyeBlinkLeft, from which a blink has begun

FAVOURED = {
    "flite slt": 1.6,
    "flite rms": 1.6,
    "statistical": 1.1,
    "neural": 1.6,
    "festival": 1.3,
    "espeak": 0.9,
    "sounds music": 4.0,
}
"""How often, to another clip's once, clips of an engine or of one of its voices are drawn: voices cut from recordings,
or that sound like some, and what opened the mouth for nothing, more often than the corpus has them."""


@dataclass(frozen=True)
class MotionData:
    """Clips end to end: `coordinates` float32 [N, K]; clip i spans `offsets[i]:offsets[i + 1]`, spoken by
    `speakers[i]` and drawn `favour[i]` times as often as its length has it. `visemes` int64 [N] counts the keys of
    `viseme_targets`. `upper` [N, ...] are the upper face's latents where they are known (see `shipped`), [N, 0] where
    they are to be encoded."""

    coordinates: Tensor
    offsets: NDArray[np.int64]
    speakers: NDArray[np.int64]
    favour: NDArray[np.float64]
    visemes: Tensor
    upper: Tensor


@dataclass(frozen=True)
class MelData:
    """Log-mel frames float16 [PHASES, M, bins] of the same clips, on the grid of each phase; feature s of a
    clip needs frames from 2 s on."""

    mel: Tensor
    offsets: NDArray[np.int64]


def motion_data(clips: Sequence[Clip], space: MotionSpace, gains: Sequence[float]) -> MotionData:
    """Coordinates of all clips, each given to one speaker, whose gain scales the mouth's motion.

    Scaling every mouth weight alike keeps a sealed mouth sealed (`mouthClose` stays equal to `jawOpen`).
    """
    columns = [ARKIT_INDEX[name] for name in space.names]
    speakers = np.arange(len(clips)) % len(gains)
    parts = []
    for clip, speaker in zip(clips, speakers, strict=True):
        weights = clip.weights * np.float32(gains[int(speaker)]) + clip.idle
        coordinates = weights[:, columns] @ space.to_coordinates.T
        after_s = float(np.random.default_rng([clip.spec.seed, clip.spec.index]).uniform(0.2, 3.0))
        coordinates[:, space.clock] = blink_clock(clip.idle[:, ARKIT_INDEX["eyeBlinkLeft"]], after_s)
        parts.append(coordinates)
    offsets = np.cumsum([0, *map(len, parts)])
    heard = np.concatenate([spoken_visemes(clip.phones, len(clip.weights)) for clip in clips])
    favour = np.array([_favour(clip.spec) for clip in clips])
    coordinates = torch.from_numpy(np.concatenate(parts))
    nothing = torch.empty(len(coordinates), 0)
    return MotionData(coordinates, offsets, speakers, favour, torch.from_numpy(heard), nothing)


def _favour(spec: ClipSpec) -> float:
    return FAVOURED.get(f"{spec.engine} {spec.voice}", FAVOURED.get(spec.engine, 1.0))


def spoken_visemes(phones: Sequence[Phone], frames: int) -> NDArray[np.int64]:
    """The viseme of the phone that sounds at each of `frames` frames, as its place among `viseme_targets`: [frames].

    Phones follow each other without a gap (`clips.with_silences`); after the last its viseme stays.
    """
    order = list(tables().viseme_targets)
    ends_s = np.array([phone.end_s for phone in phones])
    at = np.searchsorted(ends_s, np.arange(frames) / FPS, side="right")
    numbers = np.array([order.index(phone.viseme) for phone in phones], np.int64)
    return np.asarray(numbers[np.minimum(at, len(phones) - 1)])


def blink_clock(blink: NDArray[np.float32], after_s: float) -> NDArray[np.float32]:
    """How near the next blink is, [L]: from 0 (CLOCK_S away or more) to CLOCK_SCALE (due), for eyelids [L] and
    a blink that follows `after_s` after the end.

    A blink is one frame in a hundred, and a network that draws frame by frame hardly learns to begin one: a
    chance of p counts with its square in a proper score. So latents say when the next one is due. That wait
    is drawn once, when the last blink begins, from a distribution as broad as the waits are.
    """
    begins = np.flatnonzero((blink[1:] >= BLINK_ONSET) & (blink[:-1] < BLINK_ONSET)) + 1
    frames = np.arange(len(blink))
    due = np.append(begins, len(blink) + after_s * FPS)[np.searchsorted(begins, frames, side="right")]
    wait_s = (due - frames) / FPS
    return np.asarray(CLOCK_SCALE * (1 - np.minimum(wait_s, CLOCK_S) / CLOCK_S), np.float32)


@torch.no_grad()
def mel_data(pcms: Iterable[NDArray[np.float32]], encoder: MelEncoder) -> MelData:
    """Log-mel frames of whole clips, with silence before the first sample and after the last."""
    parts = [
        torch.stack(
            [clip_mel(torch.from_numpy(pcm)[None], encoder, phase)[0].T.half() for phase in range(PHASES)]
        )
        for pcm in pcms
    ]
    return MelData(torch.cat(parts, 1), np.cumsum([0, *(part.shape[1] for part in parts)]))


def clip_mel(pcm: Tensor, encoder: MelEncoder, phase: int = 0) -> Tensor:
    """Log-mel [B, bins, M] of whole clips [B, n] such that `encoder.from_log_mel` yields feature s, which
    stands for sample 320 s after frame `phase`, for every s up to n / 320 + 1."""
    features = pcm.shape[1] // STRIDE + 2
    shift = round(phase * SAMPLE_RATE / FPS)
    after = (features - 1) * STRIDE + encoder.receptive_field - encoder.past_samples + shift - pcm.shape[1]
    padded = torch.nn.functional.pad(pcm, (encoder.past_samples, max(after, 0)))
    return encoder.log_mel(padded[:, shift : (features - 1) * STRIDE + encoder.receptive_field + shift])


def mel_frames(encoder: MelEncoder, features: int) -> int:
    """Log-mel frames that `features` neighbouring features need."""
    field = (encoder.receptive_field - 400) // MEL_HOP + 1
    return 2 * (features - 1) + field


def frame_features(encoder: MelEncoder, mel: Tensor, frames: int) -> Tensor:
    """Features [B, frames, A] at the times of animation frames, out of log-mel [B, bins, M] or
    [B, PHASES, bins, M] that begin at a cycle's first frame.

    With the mel frames of every phase each feature is computed where its frame is, as hop 1 does. With those
    of the first phase alone the others are interpolated: nearly as good, at a third of the cost.
    """
    if mel.dim() == 4:
        features = encoder.from_log_mel(mel.flatten(0, 1))[:, ::FEATURES_A_CYCLE].contiguous()
        cycles = features.view(*mel.shape[:2], *features.shape[1:])  # [B, PHASES, cycles, A]
        return cycles.transpose(1, 2).flatten(1, 2)[:, :frames]
    features = encoder.from_log_mel(mel)
    position = torch.arange(frames, dtype=torch.float64) * (FEATURES_A_CYCLE / PHASES)
    before = position.floor().long()
    after = (before + 1).clamp(max=features.shape[1] - 1)
    share = (position - before).to(features)[None, :, None]
    return features[:, before] * (1 - share) + features[:, after] * share


@dataclass(frozen=True)
class Crops:
    """A batch: `motion` [B, 1 + L, K] with the frame before the crop first (stillness at a clip's start),
    `mel` [B, bins, M] or [B, PHASES, bins, M], `speaker` [B], `at_start` [B] (the crop opens its clip), `visemes`
    [B, L], `upper` [B, 1 + L, ...] as `MotionData`'s."""

    motion: Tensor
    mel: Tensor
    speaker: Tensor
    at_start: Tensor
    visemes: Tensor
    upper: Tensor

    def to(self, device: torch.device) -> Crops:
        return Crops(*(getattr(self, part.name).to(device) for part in fields(self)))


def crops(
    motion: MotionData,
    mel: MelData | None,
    encoder: MelEncoder | None,
    batch: int,
    frames: int,
    random: np.random.Generator,
    start_share: float = 0.15,
    every_phase: bool = False,
) -> Crops:
    """Random crops of `frames` frames, on the grid where frames and features meet; some open their clip.

    Clips shorter than a crop are passed over. Raises ValueError when all are.
    """
    lengths = np.diff(motion.offsets)
    fitting = np.flatnonzero(lengths >= frames)
    if len(fitting) == 0:
        raise ValueError(f"no clip has {frames} frames; the longest has {lengths.max(initial=0)}")
    share = lengths[fitting] * motion.favour[fitting]
    clips = random.choice(fitting, batch, p=share / share.sum())
    starts = (random.uniform(0, 1, batch) * (lengths[clips] - frames + 1)).astype(int)
    starts = starts // PHASES * PHASES
    starts[random.uniform(0, 1, batch) < start_share] = 0

    first = motion.offsets[clips] + starts
    rows = first[:, None] + np.arange(-1, frames)
    at = torch.from_numpy(np.maximum(rows, 0))
    cut = motion.coordinates[at]
    at_start = torch.from_numpy(starts == 0)
    cut[at_start, 0] = 0
    heard = torch.empty(0)
    if mel is not None and encoder is not None:
        needed = mel_frames(encoder, -(-(frames - 1) * FEATURES_A_CYCLE // PHASES) + 1)
        mel_first = mel.offsets[clips] + 2 * starts * FEATURES_A_CYCLE // PHASES
        mel_rows = torch.from_numpy(mel_first[:, None] + np.arange(needed))
        if every_phase:
            heard = mel.mel[:, mel_rows].permute(1, 0, 3, 2).float()
        else:
            heard = mel.mel[0, mel_rows].transpose(1, 2).float()
    spoken = motion.visemes[torch.from_numpy(rows[:, 1:])]
    return Crops(cut, heard, torch.from_numpy(motion.speakers[clips]), at_start, spoken, motion.upper[at])
