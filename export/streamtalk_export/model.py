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


@torch.no_grad()
def stream_frames(
    model: TalkerModel, features: Tensor, noise: Tensor, speaker: int, table: SamplerTable, window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The release's streaming path, frame by frame, recomputed from scratch as it does.

    Yields (condition [E], latent [C], offsets [3V]). `window` bounds the latents that predictor and decoder
    see; None lets the history grow.
    """
    network = model.diff_ar_network
    style = network.obj_vector.weight[speaker][None]
    latents = model.autoencoder.start_latent()[None]
    for i in range(len(features)):
        first = 0 if window is None else max(0, i + 1 - window)
        condition = network.conditions(latents[None, first:], features[None, first : i + 1], style, first)[
            0, -1
        ]
        latent = network.sample(noise[i], condition, table)
        latents = torch.cat([latents, latent[None]])
        seen = latents if window is None else latents[-window:]
        yield condition, latent, model.autoencoder.decoder(seen[None])[0, -1]


def generate_stream(
    model: TalkerModel,
    features: Tensor,
    noise: Tensor,
    speaker: int,
    table: SamplerTable,
    template: Tensor,
    window: int | None = None,
) -> Generation:
    """`grow_*` (window None) and `window_*`: features [L, A], noise [L, C], template [3V]."""
    frames = list(stream_frames(model, features, noise, speaker, table, window))
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
