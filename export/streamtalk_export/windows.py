"""Streaming and offline audio-encoder graphs, and the arithmetic of their windows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamtalk.model import Clock
from streamtalk_export.config import FEATURE_RATE, SAMPLE_RATE, STRIDE, ConfigError, ModelConfig
from streamtalk_export.hubert import HubertEncoder, offline_length, resample_offline
from streamtalk_export.mel import MelEncoder

DEFAULT_CONTEXT_S = 2
DEFAULT_LOOKAHEAD_S = 0.2
"""Defaults of HuBERT, which takes windows of any length; the mel encoder has its own."""

Encoder = HubertEncoder | MelEncoder


def positions(clock: Clock) -> list[float]:
    """Position on the 50 Hz feature grid, from the window's start, of every frame of a hop."""
    first = clock.context_samples // STRIDE
    return [first + j * FEATURE_RATE / clock.fps for j in range(clock.hop)]


def audio_window(
    config: ModelConfig, encoder: Encoder, hop: int, context_s: float | None, lookahead_ms: float | None
) -> Clock:
    """The window for these settings; None takes the encoder's own. Raises ConfigError."""
    own_past = encoder.past_samples
    default = own_past or DEFAULT_CONTEXT_S * SAMPLE_RATE
    wanted = default if context_s is None else round(context_s * SAMPLE_RATE)
    context = -(-wanted // STRIDE) * STRIDE
    if context < own_past:
        raise ConfigError(
            f"A context of {context / SAMPLE_RATE:.3f} s is shorter than the {own_past / SAMPLE_RATE:.3f} s "
            "that this encoder needs."
        )
    window = Clock(SAMPLE_RATE, config.fps, hop, context, 0)
    last = -(-positions(window)[-1] // 1)
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
    return Clock(SAMPLE_RATE, config.fps, hop, context, lookahead)


class StreamingEncoder(nn.Module):
    """One window of raw PCM [B, window_samples] to features at animation rate [B, hop, A]."""

    read: Tensor
    lower: Tensor
    upper: Tensor
    fraction: Tensor

    def __init__(self, encoder: Encoder, clock: Clock, level_floor: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.level_floor = level_floor
        position = torch.tensor(positions(clock), dtype=torch.float64) - encoder.past_samples // STRIDE
        lower, upper = position.floor(), position.ceil()
        self.register_buffer("fraction", (position - lower).float()[:, None])
        read = torch.cat([lower, upper]).long()
        if isinstance(encoder, HubertEncoder):  # which computes in its last layer what is read alone
            unique = torch.unique(read)
            self.register_buffer("read", unique)
            read = torch.searchsorted(unique, read)
        self.register_buffer("lower", read[: clock.hop])
        self.register_buffer("upper", read[clock.hop :])

    def forward(self, pcm: Tensor) -> Tensor:
        if isinstance(self.encoder, HubertEncoder):
            features = self.encoder(pcm, self.level_floor, self.read)
        else:
            features = self.encoder(pcm)
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
