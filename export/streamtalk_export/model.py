"""The whole talker in torch, and its three ways of generating, which the exported graphs are held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import HubertConfig

from streamtalk_export.config import ModelConfig
from streamtalk_export.hubert import HubertEncoder
from streamtalk_export.mel import MelEncoder
from streamtalk_export.network import DiffusionNetwork
from streamtalk_export.sampler import SamplerTable
from streamtalk_export.vqvae import VQAutoencoder
from streamtalk_export.windows import OfflineEncoder


class TalkerModel(nn.Module):
    """Audio encoder, VQ-VAE, condition predictor and head."""

    def __init__(self, config: ModelConfig, hubert: HubertConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.audio_encoder: HubertEncoder | MelEncoder
        if config.audio.kind == "hubert":
            self.audio_encoder = HubertEncoder(hubert or HubertConfig())
        else:
            self.audio_encoder = MelEncoder(config.audio)
        self.autoencoder = VQAutoencoder(config.vq)
        self.diff_ar_network = DiffusionNetwork(config.predictor)

    def parts(self) -> dict[str, nn.Module]:
        """Modules by their prefix in a checkpoint."""
        encoder = self.audio_encoder
        return {
            "audio_encoder": encoder.hubert if isinstance(encoder, HubertEncoder) else encoder,
            "autoencoder": self.autoencoder,
            "diff_ar_network": self.diff_ar_network,
        }

    @torch.no_grad()
    def offline_features(self, pcm: Tensor) -> Tensor:
        """Audio features of a whole clip [n] at animation rate by the release's rule: [L, A]."""
        return OfflineEncoder(self.audio_encoder, self.config.fps)(pcm[None])[0]


@dataclass(frozen=True)
class Generation:
    """Latents [L, C] and vertices [L, 3V]; conditions [L, E] where a frame has one."""

    latents: Tensor
    vertices: Tensor
    conditions: Tensor | None = None


Streamed = Iterator[tuple[Tensor, Tensor, Tensor]]
"""Frame by frame: condition [E], latent [C], vertex offsets [3V]."""


@torch.no_grad()
def stream_frames(
    model: TalkerModel,
    features: Tensor,
    noise: Tensor,
    speaker: int,
    table: SamplerTable,
    history: int | None = None,
    decode_window: int | None = None,
) -> Streamed:
    """The release's streaming path, recomputed from scratch each frame: features [L, A], noise [L, C].

    As released both windows grow without bound (None). Bounded, this is what a cache of `history` frames and
    a decoder that sees the last `decode_window` latents must give.
    """
    network = model.diff_ar_network
    style = network.obj_vector.weight[speaker][None]
    latents = model.autoencoder.start_latent()[None]
    for i in range(len(features)):
        conditions = network.conditions(latents[None], features[None, : i + 1], style, 0, history)
        latent = network.sample(noise[i], conditions[0, -1], table)
        latents = torch.cat([latents, latent[None]])
        yield conditions[0, -1], latent, _newest_offsets(model, latents[-(decode_window or 0) :])


@torch.no_grad()
def window_frames(
    model: TalkerModel, features: Tensor, noise: Tensor, speaker: int, table: SamplerTable, window: int
) -> Streamed:
    """`stream_frames` with everything before the last `window` latents forgotten, by all layers at once."""
    network = model.diff_ar_network
    style = network.obj_vector.weight[speaker][None]
    latents = model.autoencoder.start_latent()[None]
    for i in range(len(features)):
        first = max(0, i + 1 - window)
        conditions = network.conditions(latents[None, first:], features[None, first : i + 1], style, first)
        latent = network.sample(noise[i], conditions[0, -1], table)
        latents = torch.cat([latents, latent[None]])
        yield conditions[0, -1], latent, _newest_offsets(model, latents[-window:])


def _newest_offsets(model: TalkerModel, latents: Tensor) -> Tensor:
    return model.autoencoder.decoder(latents[None])[0, -1]


def collected(frames: Streamed, template: Tensor) -> Generation:
    """All frames of a stream on `template` [3V]."""
    conditions, latents, offsets = (torch.stack(column) for column in zip(*frames, strict=True))
    return Generation(latents, template + offsets, conditions)


@torch.no_grad()
def generate_offline(
    model: TalkerModel,
    features: Tensor,
    noise: Tensor,
    speaker: int,
    table: SamplerTable,
    template: Tensor,
    window: int,
) -> Generation:
    """`eval_*`: every frame re-denoises the last `window` latents, in place; decoded once, at the end.

    noise: rows in drawing order, min(i + 1, window) rows for frame i.
    """
    network = model.diff_ar_network
    style = network.obj_vector.weight[speaker][None]
    latents = model.autoencoder.start_latent()[None].repeat(len(features) + 1, 1)
    drawn = 0
    for i in range(len(features)):
        n = min(i + 1, window)
        first = i + 1 - n
        conditions = network.conditions(latents[None, first : i + 1], features[None, first : i + 1], style)[0]
        latents[first + 1 : i + 2] = network.sample(noise[drawn : drawn + n], conditions, table)
        drawn += n
    vertices = template + model.autoencoder.decoder(latents[None, 1:])[0]
    return Generation(latents[1:], vertices)
