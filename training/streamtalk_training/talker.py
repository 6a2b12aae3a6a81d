"""The whole talker as one trainable module, and how it streams in torch.

Parameter names are those of a checkpoint: `audio_encoder.`, `autoencoder.`, `diff_ar_network.`.
Shapes: B clips, L frames, A audio width, C latent width, E condition width, W history, D decode window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamtalk_export.config import ModelConfig
from streamtalk_export.graphs import ConditionPredictor
from streamtalk_export.mel import MelEncoder
from streamtalk_export.network import DiffusionNetwork
from streamtalk_export.sampler import sampler_table
from streamtalk_export.vqvae import VQAutoencoder, VQDecoder

UPPER_SHARE = 4
"""One code in so many describes the upper face, the others the mouth. Stage 1 sees to it that neither knows of the
other, so that lips can follow the sound while blinks come of the noise."""


class Talker(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_encoder = MelEncoder(config.audio)
        self.autoencoder = VQAutoencoder(config.vq)
        self.diff_ar_network = DiffusionNetwork(config.predictor)
        self.sampler = sampler_table(config.schedule, config.steps, config.sampler)
        self.decode_window = config.stream.decode_window or config.window_size


def mouth_latents(config: ModelConfig) -> int:
    """How many of a latent's C numbers, from the first, describe the mouth."""
    codes = config.vq.face_quan_num
    return (codes - max(codes // UPPER_SHARE, 1)) * config.vq.zquant_dim


@torch.no_grad()
def rollout(talker: Talker, features: Tensor, speaker: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, L, C], frame after frame, of features [B, L, A] at the frame rate, speaker [B] and noise
    [B, L, C]: every frame hears its own past alone, through the exported predictor and its cache of W slots."""
    network, p = talker.diff_ar_network, talker.config.predictor
    predictor = ConditionPredictor(network, talker.config.window_size).to(features.device)
    style = network.obj_vector(speaker)
    batch, frames = features.shape[:2]
    head = p.latent_dim // p.n_heads
    cache = features.new_zeros(batch, p.num_layers, 2, p.n_heads, talker.config.window_size, head)
    previous = talker.autoencoder.start_latent().expand(batch, -1)
    latents = []
    for frame in range(frames):
        position = torch.full((batch,), frame % p.period, device=features.device)
        valid = torch.full((batch,), min(frame, talker.config.window_size), device=features.device)
        condition, cache = predictor(features[:, frame], previous, style, position, cache, valid)
        previous = network.sample(noise[:, frame], condition, talker.sampler)
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
