"""HuBERT as the audio encoder: transformers' model holds the weights, the computation is written out here.

Written out because the streaming graph must act between the first GroupNorm and what follows it, and because
the library's own forward changes with its version.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import HubertConfig, HubertModel

from streamtalk_export.config import FEATURE_RATE, STRIDE, ConfigError

NORMALISATION_EPS = 1e-7
ALIGNED_SAMPLES = 16


def hubert_config(path: Path | None) -> HubertConfig:
    """HuBERT-base, or the settings of a `config.json`. Raises ConfigError for variants of another kind."""
    if path is None:
        return HubertConfig()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable HuBERT config.json: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object.")
    try:
        config = HubertConfig(**values)
        with torch.device("meta"):
            HubertModel(config)
    except Exception as error:  # transformers' own checks raise many kinds
        raise ConfigError(f"{path} describes no HuBERT that can be built: {error}") from error
    if config.feat_extract_norm != "group" or config.do_stable_layer_norm or config.conv_bias:
        raise ConfigError(
            f"{path}: only the base variant is supported (feat_extract_norm 'group', no stable layer norm, "
            "no convolution bias)."
        )
    if math.prod(config.conv_stride) != STRIDE:
        raise ConfigError(
            f"{path}: the convolutions must step {STRIDE} samples; they step {math.prod(config.conv_stride)}."
        )
    return config


def receptive_field(config: HubertConfig) -> int:
    """Samples that one feature reads (400 for HuBERT-base)."""
    field = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        field = (field - 1) * stride + kernel
    return field


class HubertEncoder(nn.Module):
    """PCM at 16 kHz [B, n] to features [B, S, A] at 50 Hz; `hubert` is `audio_encoder.` in a checkpoint."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        self.config = config
        self.hubert = HubertModel(config)
        self.receptive_field = receptive_field(config)
        self.past_samples = 0
        self.fused: nn.ModuleList | None = None

    def forward(self, pcm: Tensor, level_floor: float | None = None, read: Tensor | None = None) -> Tensor:
        """Features of normalised audio; `level_floor` is the RMS below which the signal is faded out. `read` [n]: the
        features that are wanted, None for all.

        GroupNorm over all time undoes any level of its input, so the fade has to follow it.
        """
        gain = None
        if level_floor is None:
            centred = pcm - pcm.mean(dim=-1, keepdim=True)
            variance = centred.square().mean(dim=-1, keepdim=True)
        else:
            centred = pcm - _aligned_mean(pcm)
            variance = _aligned_mean(centred.square())
            gain = (variance.sqrt() / level_floor).clamp(max=1.0)[:, :, None]
        return self.from_normalised(centred * torch.rsqrt(variance + NORMALISATION_EPS), gain, read)

    def from_normalised(self, x: Tensor, gain: Tensor | None = None, read: Tensor | None = None) -> Tensor:
        """Features [B, S, A] of zero-mean, unit-variance audio [B, n]."""
        x = x[:, None]
        for index, layer in enumerate(self.hubert.feature_extractor.conv_layers):
            x = layer.conv(x)
            if index == 0:
                norm = layer.layer_norm
                if gain is None:
                    x = norm(x)
                else:
                    # Towards the bias, which is what digital silence gives.
                    x = F.instance_norm(x, eps=norm.eps)  # a group is a channel
                    x = x * (gain * norm.weight[:, None]) + norm.bias[:, None]
            x = layer.activation(x)
        projection = self.hubert.feature_projection
        x = x.transpose(1, 2)
        if projection.feat_proj_layer_norm:
            x = projection.layer_norm(x)
        x = projection.projection(x)
        encoder = self.hubert.encoder
        x = encoder.layer_norm(x + self._positions(x))
        for i, layer in enumerate(encoder.layers):
            # Of the last layer only the tokens that are read are computed; it attends to all.
            wanted = read if i + 1 == len(encoder.layers) else None
            attended = self.fused[i](x, wanted) if self.fused else _attention(layer.attention, x, wanted)
            x = layer.layer_norm((x if wanted is None else x.index_select(1, wanted)) + attended)
            x = layer.final_layer_norm(x + _feed_forward(layer.feed_forward, x))
        return x

    def fuse(self) -> None:
        """For export: one product for queries, keys and values, and the positional convolution's weight in place of
        its weight norm.
        """
        conv = self.hubert.encoder.pos_conv_embed.conv
        if parametrize.is_parametrized(conv, "weight"):
            parametrize.remove_parametrizations(conv, "weight")
        if self.fused is None:
            *layers, last = (layer.attention for layer in self.hubert.encoder.layers)
            self.fused = nn.ModuleList([*map(FusedAttention, layers), FusedAttention(last, is_last=True)])

    def _positions(self, x: Tensor) -> Tensor:
        embed = self.hubert.encoder.pos_conv_embed
        y = embed.conv(x.transpose(1, 2))
        if embed.conv.kernel_size[0] % 2 == 0:
            y = y[:, :, :-1]
        return embed.activation(y).transpose(1, 2)


def _aligned_mean(x: Tensor) -> Tensor:
    """Means [B, 1] of rows [B, n] of a fixed length. Padded, so that each row begins on a boundary of memory: sums in
    onnxruntime are ordered by it, and a row's must not depend on which row of a batch it is.
    """
    n = x.shape[-1]
    return F.pad(x, (0, -n % ALIGNED_SAMPLES)).sum(dim=-1, keepdim=True) / n


class FusedAttention(nn.Module):
    """Attention with one product for queries, keys and values, for export: without gradient.

    The scale is part of the queries' weights. The last layer's queries are a product of their own: only the tokens that
    are read have one.
    """

    def __init__(self, attention: Any, is_last: bool = False) -> None:
        super().__init__()
        self.heads, self.out_proj = attention.num_heads, attention.out_proj
        width = self.out_proj.in_features
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        scales = [(width // self.heads) ** -0.5, 1.0, 1.0]
        weights = [part.weight.detach() * scale for part, scale in zip(parts, scales, strict=True)]
        biases = [part.bias.detach() * scale for part, scale in zip(parts, scales, strict=True)]
        self.query = _linear(weights.pop(0), biases.pop(0)) if is_last else None
        self.joined = _linear(torch.cat(weights), torch.cat(biases))

    def forward(self, x: Tensor, read: Tensor | None) -> Tensor:
        """Attention of the tokens `read`, or of all, of [B, S, A] to all."""
        b, t, width = x.shape
        size = (self.heads, width // self.heads)
        # A product of two axes carries its bias with it; of three, TensorRT adds it in kernels of their own.
        joined = self.joined(x.flatten(0, 1))
        if self.query is None:
            q, k, v = joined.view(b, t, 3, *size).permute(2, 0, 3, 1, 4)
            if read is not None:
                q = q.index_select(2, read)
        else:
            asked = x if read is None else x.index_select(1, read)
            q = self.query(asked.flatten(0, 1)).view(b, -1, *size).transpose(1, 2)
            k, v = joined.view(b, t, 2, *size).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        return self.out_proj(mixed.transpose(1, 2).reshape(b, -1, width))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = (nn.Parameter(values, requires_grad=False) for values in (weight, bias))
    return linear


def _attention(attention: Any, x: Tensor, read: Tensor | None) -> Tensor:
    """Attention of the tokens `read`, or of all, to all, by the library's own weights."""
    b, _, width = x.shape
    heads = attention.num_heads

    def split(y: Tensor) -> Tensor:
        return y.view(b, -1, heads, width // heads).transpose(1, 2)

    asked = x if read is None else x.index_select(1, read)
    q, k, v = split(attention.q_proj(asked)), split(attention.k_proj(x)), split(attention.v_proj(x))
    weights = torch.softmax(q @ k.transpose(-1, -2) * (width // heads) ** -0.5, dim=-1)
    return attention.out_proj((weights @ v).transpose(1, 2).reshape(b, -1, width))


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.output_dense(layer.intermediate_act_fn(layer.intermediate_dense(x)))


def offline_length(samples: int, receptive: int, fps: int) -> int:
    """Animation frames that the release makes of a clip: `int(S * fps / 50)`."""
    features = (samples - receptive) // STRIDE + 1
    return features * fps // FEATURE_RATE


def resample_offline(features: Tensor, length: int) -> Tensor:
    """Features [B, S, A] stretched to [B, length, A] by the release's rule (linear, ends aligned)."""
    return F.interpolate(features.transpose(1, 2), size=length, mode="linear", align_corners=True).transpose(
        1, 2
    )
