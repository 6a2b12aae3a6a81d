"""The whole talker as one trainable module, and how it streams in torch.

Parameter names are those of a checkpoint: `audio_encoder.`, `autoencoder.`, `diff_ar_network.`.
Shapes: B clips, L frames, A audio width, C latent width, E condition width, W history, D decode window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamtalk_export.config import ModelConfig
from streamtalk_export.mel import MelEncoder
from streamtalk_export.network import DiffusionNetwork, cross_value, history_bias, split_heads
from streamtalk_export.sampler import sampler_table
from streamtalk_export.vqvae import VQAutoencoder, VQDecoder


class Talker(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_encoder = MelEncoder(config.audio)
        self.autoencoder = VQAutoencoder(config.vq)
        self.diff_ar_network = DiffusionNetwork(config.predictor)
        self.sampler = sampler_table(config.schedule, config.steps, config.sampler)
        self.decode_window = config.stream.decode_window or config.window_size


@torch.no_grad()
def rollout(talker: Talker, features: Tensor, speaker: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, L, C], frame after frame, of features [B, L, A] at the frame rate, speaker [B] and noise
    [B, L, C]: every frame hears its own past alone, through a cache of W keys and values a layer."""
    network = talker.diff_ar_network
    layers = network.transformer_decoder.layers
    style = network.obj_vector(speaker)
    bias = history_bias(network.config.n_heads, talker.config.window_size, network.config.period).flip(1)
    cross = [cross_value(layer, network.audio_feature_map(features)) for layer in layers]
    keys: list[Tensor] = [torch.empty(0)] * len(layers)
    values: list[Tensor] = [torch.empty(0)] * len(layers)
    previous = talker.autoencoder.start_latent().expand(len(features), -1)
    latents = []
    for frame in range(features.shape[1]):
        x = network.vq_latent_map(previous) + style + network.positions[frame % network.config.period]
        for index, layer in enumerate(layers):
            q, k, v = split_heads(layer.self_attn, x[:, None])
            keys[index] = k if frame == 0 else torch.cat([keys[index], k], 2)[:, :, -len(bias[0]) :]
            values[index] = v if frame == 0 else torch.cat([values[index], v], 2)[:, :, -len(bias[0]) :]
            seen = bias[:, None, -keys[index].shape[2] :]
            attended = F.scaled_dot_product_attention(q, keys[index], values[index], attn_mask=seen)
            x = layer.norm1(x + layer.self_attn.out_proj(attended.transpose(1, 2).flatten(2))[:, 0])
            x = layer.norm2(x + cross[index][:, frame])
            x = layer.norm3(x + layer.linear2(layer.activation(layer.linear1(x))))
        previous = network.sample(noise[:, frame], x, talker.sampler)
        latents.append(previous)
    return torch.stack(latents, 1)


def newest_frames(decoder: VQDecoder, latents: Tensor, ends: Tensor, window: int) -> Tensor:
    """Decode latents [B, T, C] at `ends` [B, n] (indices of newest frames, each at least `window - 1`), each
    from the last `window` latents alone: [B, n, 3V or K]."""
    batch, chosen = ends.shape
    rows = ends[:, :, None] + torch.arange(1 - window, 1, device=ends.device)
    windows = latents[torch.arange(batch, device=ends.device)[:, None, None], rows]
    decoded = decoder.hidden(windows.flatten(0, 1))[:, -1]
    return decoder.vertice_map_reverse(decoded).view(batch, chosen, -1)


@torch.no_grad()
def decoded_stream(talker: Talker, latents: Tensor) -> Tensor:
    """Motion [B, L, 3V or K] of streamed latents [B, L, C], which the start latent precedes."""
    start = talker.autoencoder.start_latent().expand(len(latents), 1, -1)
    history = torch.cat([start, latents], 1)
    frames, window = latents.shape[1], talker.decode_window
    parts = []
    for frame in range(1, min(window - 1, frames + 1)):
        ends = torch.full((len(latents), 1), frame)
        parts.append(newest_frames(talker.autoencoder.decoder, history, ends, frame + 1))
    if frames >= window - 1:
        ends = torch.arange(window - 1, frames + 1).expand(len(latents), -1)
        parts.append(newest_frames(talker.autoencoder.decoder, history, ends, window))
    return torch.cat(parts, 1)
