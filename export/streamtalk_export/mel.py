"""The bundled model's audio encoder: log-mel frames and a small stack of dilated convolutions.

Fit for streaming: nothing is normalised over time, and a feature depends on a fixed stretch of audio, so encoding
a window equals encoding the clip. All convolutions are unpadded; what they consume is the context.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamtalk_export.config import SAMPLE_RATE, STRIDE, AudioEncoderConfig, ConfigError

MEL_WINDOW = 400
MEL_HOP = 160
MEL_LOW_HZ, MEL_HIGH_HZ = 60.0, 7600.0


def mel_filters(bins: int) -> np.ndarray:
    """Triangular filters over the spectrum of a 400-sample window, [bins, 201] float32 (HTK mel scale)."""

    def to_mel(hz: np.ndarray) -> np.ndarray:
        return 2595.0 * np.log10(1.0 + hz / 700.0)

    low, high = to_mel(np.array([MEL_LOW_HZ, MEL_HIGH_HZ])).tolist()
    edges = np.linspace(low, high, bins + 2)
    edges_hz = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    frequency = np.fft.rfftfreq(MEL_WINDOW, 1 / SAMPLE_RATE)
    lower, centre, upper = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rising = (frequency - lower) / (centre - lower)
    falling = (upper - frequency) / (upper - centre)
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def _fourier_basis() -> np.ndarray:
    """Hann-windowed cosines and sines, [402, 1, 400] float32; a sine of amplitude a has power a squared."""
    n = np.arange(MEL_WINDOW)
    k = np.arange(MEL_WINDOW // 2 + 1)[:, None]
    window = np.hanning(MEL_WINDOW + 1)[:-1]
    angle = 2 * np.pi * k * n / MEL_WINDOW
    basis = np.concatenate([np.cos(angle), np.sin(angle)]) * window * (2.0 / window.sum())
    return basis[:, None].astype(np.float32)


class ConvBlock(nn.Module):
    """Unpadded dilated convolution over time with a residual: [B, A, T] to [B, A, T - 2 * dilation]."""

    def __init__(self, width: int, dilation: int, expansion: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, expansion * width, 3, dilation=dilation)
        self.out = nn.Conv1d(expansion * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x[:, :, self.dilation : -self.dilation] + self.out(F.gelu(self.conv(y)))


class FineStem(nn.Module):
    """What a linear stem cannot tell of four mel frames: [B, bins, T] to [B, A, T / 2 - 1]."""

    def __init__(self, bins: int, hidden: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(bins, hidden, 4, stride=2)
        self.out = nn.Conv1d(hidden, width, 1)

    def forward(self, mel: Tensor) -> Tensor:
        fine: Tensor = self.out(F.gelu(self.conv(mel)))
        return fine


class MelEncoder(nn.Module):
    """PCM at 16 kHz [B, n] to features [B, S, A] at 50 Hz, S = (n - receptive_field) // 320 + 1.

    Feature s reads samples 320 s ... 320 s + receptive_field - 1 and stands for sample 320 s + past_samples:
    all but `lookahead_ms` of what it reads lies before it.
    """

    basis: Tensor
    filters: Tensor

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.level_floor = config.level_floor
        self.stem = nn.Conv1d(config.mel_bins, config.width, 4, stride=2)
        self.fine = FineStem(config.mel_bins, config.stem_width, config.width) if config.stem_width else None
        self.blocks = nn.ModuleList(ConvBlock(config.width, d, config.expansion) for d in config.dilations)
        self.norm = nn.LayerNorm(config.width)
        self.register_buffer("basis", torch.from_numpy(_fourier_basis()), persistent=False)
        self.register_buffer("filters", torch.from_numpy(mel_filters(config.mel_bins)), persistent=False)
        stem_field = MEL_WINDOW + 3 * MEL_HOP
        self.receptive_field = stem_field + STRIDE * 2 * sum(config.dilations)
        lookahead = config.lookahead_ms * SAMPLE_RATE // 1000
        # Rounded up to whole features, so that what a feature stands for falls on the feature grid.
        self.past_samples = -(-(self.receptive_field - lookahead) // STRIDE) * STRIDE
        if self.past_samples <= 0:
            raise ConfigError(
                f"lookahead_ms {config.lookahead_ms} covers all that the mel encoder reads "
                f"({1000 * self.receptive_field // SAMPLE_RATE} ms)."
            )

    def log_mel(self, pcm: Tensor) -> Tensor:
        """Log-mel power over the level floor, [B, mel_bins, frames]; exactly 0 for digital silence."""
        spectrum = F.conv1d(pcm[:, None], self.basis, stride=MEL_HOP)
        real, imaginary = spectrum.chunk(2, dim=1)
        power = real.square() + imaginary.square()
        return torch.log1p(torch.matmul(self.filters, power) / self.level_floor**2)

    def forward(self, pcm: Tensor) -> Tensor:
        return self.from_log_mel(self.log_mel(pcm))

    def from_log_mel(self, mel: Tensor) -> Tensor:
        """Features [B, S, A] of log-mel frames [B, mel_bins, frames]."""
        scaled = 0.25 * mel
        x = self.stem(scaled)
        if self.fine is not None:
            x = x + self.fine(scaled)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.transpose(1, 2))
