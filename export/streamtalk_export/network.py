"""Condition predictor and diffusion head (`diff_ar_network.` in a checkpoint).

Parameter names follow the release's state dict. Shapes: B batch, L frames, A audio width, C latent width,
E condition width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamtalk_export.config import PredictorConfig
from streamtalk_export.sampler import SamplerTable

TIME_FREQUENCIES = 128


def position_table(period: int, width: int) -> Tensor:
    """Interleaved sine and cosine positions, [period, E] (Vaswani et al. 2017)."""
    position = torch.arange(period, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    table = torch.empty(period, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table


def attention_slopes(heads: int) -> Tensor:
    """ALiBi's slopes: [H] (Press et al. 2022). Other numbers than powers of two borrow from the next power."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(heads - power)]
    return torch.tensor(slopes)


def history_bias(heads: int, length: int, period: int) -> Tensor:
    """`-slope * floor(distance / period)` for the keys 0 ... length-1 frames back: [H, length]."""
    return -attention_slopes(heads)[:, None] * (torch.arange(length) // period)


class TimeEmbedding(nn.Module):
    """Diffusion timesteps [N] to embeddings [N, E]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def angles(timesteps: Tensor) -> Tensor:
        """128 cosines, then 128 sines: [N, 256]."""
        k = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=timesteps.device)
        angle = timesteps[:, None].float() * torch.exp(-math.log(10000.0) * k / TIME_FREQUENCIES)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(self.angles(timesteps))


class ResidualBlock(nn.Module):
    """Residual MLP with adaptive layer norm, as in MAR's head (Li et al. 2024, arXiv 2406.11838)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class DiffusionNetwork(nn.Module):
    """One token a frame: past latents and audio in, condition out; and the head that denoises from it."""

    positions: Tensor
    drawn: Tensor

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        E = config.latent_dim
        self.vq_latent_map = nn.Linear(config.vq_dim, E)
        self.audio_feature_map = nn.Linear(config.audio_encode_dim, E)
        # batch_first, post-norm, no final norm: PyTorch's defaults otherwise.
        layer = nn.TransformerDecoderLayer(
            E, config.n_heads, config.feedforward_dim, config.dropout, config.activation, batch_first=True
        )
        self.transformer_decoder = nn.TransformerDecoder(layer, config.num_layers)
        self.denoiser: nn.Sequential | nn.ModuleList
        if config.head == "linear":
            self.denoiser = nn.Sequential(nn.Linear(2 * E, E))
        else:
            self.denoiser = nn.ModuleList(ResidualBlock(E) for _ in range(config.num_res_blocks))
        self.latent_vq_map = nn.Linear(E, config.vq_dim)
        self.time_emb = TimeEmbedding(E)
        self.obj_vector = nn.Embedding(config.id_dim, E)
        self.register_buffer("positions", position_table(config.period, E), persistent=False)
        drawn = torch.arange(config.vq_dim) >= config.noise_from
        self.register_buffer("drawn", drawn.float(), persistent=False)

    def conditions(
        self,
        past: Tensor,
        audio: Tensor,
        style: Tensor,
        position: int | Tensor = 0,
        history: int | None = None,
    ) -> Tensor:
        """Conditions of all frames at once: [B, L, E].

        past: latents before each frame [B, L, C] (the first is the start latent, or what came before a crop);
        audio: features [B, L, A]; style [B, E]; position: clock of the first frame, one or [B];
        history: frames a token sees, itself included, as a cache of that many slots has them. None: all.
        """
        length = past.shape[1]
        clock = torch.as_tensor(position, device=past.device).reshape(-1, 1)
        clock = (clock + torch.arange(length, device=past.device)) % self.config.period
        x = self.vq_latent_map(past) + style[:, None] + self.positions[clock]
        memory = self.audio_feature_map(audio)
        bias = self._causal_bias(length, history).to(past)
        # One audio frame is visible to a token, so cross-attention is its value path and nothing else.
        for layer in self.transformer_decoder.layers:
            x = layer.norm1(x + layer.dropout1(self._self_attention(layer, x, bias)))
            x = layer.norm2(x + layer.dropout2(cross_value(layer, memory)))
            x = layer.norm3(
                x + layer.dropout3(layer.linear2(layer.dropout(layer.activation(layer.linear1(x)))))
            )
        return x

    def _causal_bias(self, length: int, history: int | None) -> Tensor:
        """[H, L, L]; -inf where a key lies in the future or before the history."""
        back = torch.arange(length)[:, None] - torch.arange(length)
        bias = history_bias(self.config.n_heads, length, self.config.period)[:, back.clamp(min=0)]
        return bias.masked_fill((back < 0) | (back >= (history or length)), -torch.inf)

    def _self_attention(self, layer: nn.TransformerDecoderLayer, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = split_heads(layer.self_attn, x)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return layer.self_attn.out_proj(attended.transpose(1, 2).flatten(2))

    def denoise(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        """Predict x0 [..., C] from a noisy latent [..., C], its condition and time embedding [..., E]."""
        hidden = self.vq_latent_map(x)
        y = condition + time
        if isinstance(self.denoiser, nn.Sequential):
            hidden = self.denoiser(torch.cat([hidden, y.expand_as(hidden)], dim=-1))
        else:
            for block in self.denoiser:
                hidden = block(hidden, y)
        return self.latent_vq_map(hidden)

    def sample(self, noise: Tensor, condition: Tensor, table: SamplerTable) -> Tensor:
        """Denoise `noise` [..., C], without what is not drawn, in `len(table)` fixed steps given `condition`
        [..., E]."""
        times = self.time_emb(torch.from_numpy(table.timesteps).to(noise.device))
        return self.sample_at(noise, condition, table, times)

    def sample_at(self, noise: Tensor, condition: Tensor, table: SamplerTable, times: Tensor) -> Tensor:
        """`sample` with the time embeddings [N, E] given."""
        x = noise * self.drawn if self.config.noise_from else noise
        for time, coef_x0, coef_xt in zip(times, table.coef_x0.tolist(), table.coef_xt.tolist(), strict=True):
            x0 = coef_x0 * self.denoise(x, condition, time)
            x = x0 if coef_xt == 0.0 else x0 + coef_xt * x
        return x


def split_heads(attention: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, L, E/H] of tokens [B, L, E]."""
    b, length, width = x.shape
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    heads = projected.view(b, length, 3, attention.num_heads, width // attention.num_heads)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    return q, k, v


def cross_value(layer: nn.TransformerDecoderLayer, memory: Tensor) -> Tensor:
    """Cross-attention over one visible frame: `W_o (W_v h + b_v) + b_o`."""
    attention = layer.multihead_attn
    width = attention.embed_dim
    value = F.linear(memory, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    return attention.out_proj(value)
