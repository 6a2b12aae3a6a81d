"""The VQ-VAE (`autoencoder.` in a checkpoint): motion to codes and back.

Module and parameter names follow the release's state dict, so a checkpoint loads without a map.
Shapes: B batch, T frames, hidden width h, 3V vertex coordinates, C latent width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamtalk_export.config import VQConfig

INSTANCE_NORM_EPS = 1e-5


class Attention(nn.Module):
    """Self-attention without bias in qkv, scaled by the full width rather than the head's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = width**-0.5
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, h = x.shape
        q, k, v = self.to_qkv(x).view(b, t, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.scale, dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).reshape(b, t, h))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(width, inner)
        self.l2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(F.gelu(self.l1(x)))


class PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


class Transformer(nn.Module):
    """Alternating pre-norm attention (even places) and feed-forward (odd places)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        width = config.hidden_size
        makers: tuple[Callable[[], nn.Module], ...] = (
            lambda: Attention(width, config.num_attention_heads),
            lambda: FeedForward(width, config.intermediate_size),
        )
        self.net = nn.ModuleList(
            Residual(PreNorm(width, make())) for _ in range(config.num_hidden_layers) for make in makers
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class LinearEmbedding(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TemporalConv(nn.Sequential):
    """Conv1d over time (kernel 5, replicate padding), LeakyReLU, and where configured InstanceNorm."""

    def __init__(self, config: VQConfig) -> None:
        h = config.hidden_size
        inner: list[nn.Module] = [
            nn.Conv1d(h, h, 5, padding=2, padding_mode="replicate"),
            nn.LeakyReLU(config.neg),
        ]
        if config.instance_norm:
            inner.append(nn.InstanceNorm1d(h, eps=INSTANCE_NORM_EPS))
        super().__init__(nn.Sequential(*inner))

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x.transpose(1, 2)).transpose(1, 2)


def constant_row(width: int) -> Tensor:
    """`[0, 1, 0, 1, ...]`: what the released positional encoding adds to EVERY token at batch 1."""
    return torch.arange(width, dtype=torch.float32) % 2


class VQEncoder(nn.Module):
    """Motion [B, T, 3V] to unquantised latents [B, T, C]."""

    row: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.vertice_mapping = nn.Sequential(nn.Linear(config.n_vert, h), nn.LeakyReLU(config.neg))
        self.squasher = TemporalConv(config)
        self.encoder_linear_embedding = LinearEmbedding(h, h)
        self.encoder_transformer = Transformer(config)
        self.encoder_linear_embedding_post: nn.Module = (
            LinearEmbedding(h, config.latent_width) if config.has_latent_linear else nn.Identity()
        )
        self.register_buffer("row", constant_row(h), persistent=False)

    def forward(self, motion: Tensor) -> Tensor:
        x = self.encoder_linear_embedding(self.squasher(self.vertice_mapping(motion))) + self.row
        return self.encoder_linear_embedding_post(self.encoder_transformer(x))


class VQDecoder(nn.Module):
    """Latents [B, T, C] to vertex offsets [B, T, 3V]. Every frame depends on every latent given."""

    row: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.decoder_linear_embedding_pre: nn.Module = (
            LinearEmbedding(config.latent_width, h) if config.has_latent_linear else nn.Identity()
        )
        self.expander = TemporalConv(config)
        self.decoder_linear_embedding = LinearEmbedding(h, h)
        self.decoder_transformer = Transformer(config)
        self.vertice_map_reverse = nn.Linear(h, config.n_vert)
        self.register_buffer("row", constant_row(h), persistent=False)

    def hidden(self, latents: Tensor) -> Tensor:
        """The tokens before the last, linear map: [B, T, h]."""
        x = self.expander(self.decoder_linear_embedding_pre(latents))
        return self.decoder_transformer(self.decoder_linear_embedding(x) + self.row)

    def forward(self, latents: Tensor) -> Tensor:
        return self.vertice_map_reverse(self.hidden(latents))


class Quantizer(nn.Module):
    """Nearest codebook entry for each code of a latent; straight-through gradient."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.n_embed, config.zquant_dim)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, T, C] to (quantised latents [B, T, C], indices [B, T * codes], loss).

        The loss is van den Oord et al. 2017: codebook + 0.25 commitment.
        """
        codes = latents.reshape(-1, self.embedding.embedding_dim)
        book = self.embedding.weight
        distance = codes.square().sum(1, keepdim=True) + book.square().sum(1) - 2 * codes @ book.T
        indices = distance.argmin(1)
        chosen = self.embedding(indices).view(latents.shape)
        loss = (chosen - latents.detach()).square().mean() + 0.25 * (
            chosen.detach() - latents
        ).square().mean()
        quantised = latents + (chosen - latents).detach()
        return quantised, indices.view(len(latents), -1), loss


class VQAutoencoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VQEncoder(config)
        self.decoder = VQDecoder(config)
        self.quantize = Quantizer(config)

    def encode(self, motion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Motion [B, T, 3V] to (quantised latents [B, T, C], indices [B, T * codes], loss)."""
        return self.quantize(self.encoder(motion))

    def forward(self, motion: Tensor) -> tuple[Tensor, Tensor]:
        """Motion [B, T, 3V] to (reconstruction [B, T, 3V], codebook loss)."""
        quantised, _, loss = self.encode(motion)
        return self.decoder(quantised), loss

    @torch.no_grad()
    def start_latent(self) -> Tensor:
        """The first token of encoding two frames without motion: [C]."""
        still = torch.zeros(1, 2, self.config.n_vert, device=self.quantize.embedding.weight.device)
        return self.encode(still)[0][0, 0]
