"""Streaming and offline audio-encoder graphs, and the arithmetic of their windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamtalk_export.config import FEATURE_RATE, SAMPLE_RATE, STRIDE, ConfigError, ModelConfig
from streamtalk_export.hubert import HubertEncoder, offline_length, resample_offline
from streamtalk_export.mel import MelEncoder

DEFAULT_CONTEXT_S = 2
DEFAULT_LOOKAHEAD_S = 0.2
"""Of HuBERT, which hears everything it is given; the mel encoder has its own."""

Encoder = HubertEncoder | MelEncoder


@dataclass(frozen=True)
class AudioWindow:
    """The fixed stretch of audio that one hop is encoded from. All but `hop` in samples."""

    hop: int
    fps: int
    context_samples: int
    lookahead_samples: int

    @property
    def window_samples(self) -> int:
        last_frame = -(-(self.hop - 1) * SAMPLE_RATE // self.fps)
        return self.context_samples + last_frame + self.lookahead_samples

    @property
    def delay_s(self) -> float:
        """What the first frame of a hop waits for."""
        return (self.window_samples - self.context_samples) / SAMPLE_RATE

    def positions(self) -> list[float]:
        """Position on the 50 Hz feature grid, from the window's start, of every frame of the hop."""
        first = self.context_samples // STRIDE
        return [first + j * FEATURE_RATE / self.fps for j in range(self.hop)]


def audio_window(
    config: ModelConfig, encoder: Encoder, hop: int, context_s: float | None, lookahead_ms: float | None
) -> AudioWindow:
    """The window for these settings; None takes the encoder's own. Raises ConfigError."""
    own_past = encoder.past_samples
    default = own_past or DEFAULT_CONTEXT_S * SAMPLE_RATE
    wanted = default if context_s is None else round(context_s * SAMPLE_RATE)
    context = -(-wanted // STRIDE) * STRIDE
    if context < own_past:
        raise ConfigError(
            f"A context of {context / SAMPLE_RATE:.3f} s is shorter than the {own_past / SAMPLE_RATE:.3f} s "
            "that this encoder hears."
        )
    window = AudioWindow(hop, config.fps, context, 0)
    last = -(-window.positions()[-1] // 1)
    needed = int(last) * STRIDE - own_past + encoder.receptive_field - window.window_samples
    if lookahead_ms is None:
        lookahead = needed if own_past else max(needed, round(DEFAULT_LOOKAHEAD_S * SAMPLE_RATE))
    else:
        lookahead = round(lookahead_ms * SAMPLE_RATE / 1000)
    if lookahead < needed:
        raise ConfigError(
            f"A lookahead of {lookahead_ms:g} ms is too short: at hop {hop} the last frame needs "
            f"{needed * 1000 / SAMPLE_RATE:.1f} ms. Give at least that with --lookahead."
        )
    return AudioWindow(hop, config.fps, context, lookahead)


class StreamingEncoder(nn.Module):
    """One window of raw PCM [B, window_samples] to features at animation rate [B, hop, A]."""

    lower: Tensor
    upper: Tensor
    fraction: Tensor

    def __init__(self, encoder: Encoder, window: AudioWindow, level_floor: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.level_floor = level_floor
        position = torch.tensor(window.positions(), dtype=torch.float64) - encoder.past_samples // STRIDE
        lower = position.floor()
        self.register_buffer("lower", lower.long())
        self.register_buffer("upper", position.ceil().long())
        self.register_buffer("fraction", (position - lower).float()[:, None])

    def forward(self, pcm: Tensor) -> Tensor:
        gate = (self.level_floor,) if isinstance(self.encoder, HubertEncoder) else ()
        features = self.encoder(pcm, *gate)
        low, high = features.index_select(1, self.lower), features.index_select(1, self.upper)
        return low + self.fraction * (high - low)


class OfflineEncoder(nn.Module):
    """A whole clip [1, n] to features [1, L, A] by the release's rule: `L = int(S * fps / 50)`."""

    def __init__(self, encoder: Encoder, fps: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.fps = fps

    def forward(self, pcm: Tensor) -> Tensor:
        past = self.encoder.past_samples
        if past:
            # Feature s stands for sample 320 s, as in HuBERT, once silence stands before and after the clip.
            pcm = F.pad(pcm, (past, self.encoder.receptive_field - past - STRIDE))
        length = offline_length(pcm.shape[1], self.encoder.receptive_field, self.fps)
        return resample_offline(self.encoder(pcm), length)
