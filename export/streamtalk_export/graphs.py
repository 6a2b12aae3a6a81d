"""The modules that are traced into ONNX: static shapes, batch first, state in and out.

Letters as in the manifest: B batch, A audio width, C latent width, E condition width, H heads, W history,
D decode window, V vertices, h decoder width. Everything constant is computed here, at export.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamtalk_export.fold import fold_cross_attention, fold_head
from streamtalk_export.network import DiffusionNetwork, history_bias
from streamtalk_export.sampler import SamplerTable
from streamtalk_export.vqvae import INSTANCE_NORM_EPS, VQDecoder

MASKED = -1e4
"""Added to a masked score: exp underflows to 0 in float32, and the number exists in float16."""


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with given weights, in float32."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().float().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().float().contiguous(), requires_grad=False)
    return linear


class PredictorLayer(nn.Module):
    """One decoder layer for one token and the keys and values of those before it."""

    def __init__(self, layer: nn.TransformerDecoderLayer) -> None:
        super().__init__()
        attention = layer.self_attn
        E = attention.embed_dim
        self.heads = attention.num_heads
        scale = torch.ones(3 * E, 1)
        scale[:E] = (E // self.heads) ** -0.5
        self.qkv = frozen_linear(attention.in_proj_weight * scale, attention.in_proj_bias * scale[:, 0])
        self.out = attention.out_proj
        self.norm1, self.norm2, self.norm3 = layer.norm1, layer.norm2, layer.norm3
        self.linear1, self.linear2, self.activation = layer.linear1, layer.linear2, layer.activation

    def forward(
        self, x: Tensor, cross: Tensor, keys: Tensor, values: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, cross [B, E]; keys, values [B, 1, H, W - 1, E/H] of the frames before; bias [B, 1, H, 1, W] is added to
        the scores. Returns the token, and keys and values with its own behind them.
        """
        b, width = x.shape
        qkv = self.qkv(x).view(b, 3, self.heads, 1, width // self.heads)
        q, key, value = torch.split(qkv, 1, dim=1)
        keys, values = torch.cat([keys, key], dim=3), torch.cat([values, value], dim=3)
        weights = torch.softmax(q @ keys.transpose(-1, -2) + bias, dim=-1)
        x = self.norm1(x + self.out((weights @ values).view(b, width)))
        x = self.norm2(x + cross)
        x = self.norm3(x + self.linear2(self.activation(self.linear1(x))))
        return x, keys, values


class ConditionPredictor(nn.Module):
    """The condition of one frame from its audio feature, the previous latent and the cache."""

    bias: Tensor
    positions: Tensor

    def __init__(self, network: DiffusionNetwork, history: int) -> None:
        super().__init__()
        config = network.config
        self.latent_map = network.vq_latent_map
        self.cross = frozen_linear(*fold_cross_attention(network))
        # The newest slot is the last: distance 0 there. Looked up by the number of frames before this one, 0 to W, of
        # which W - 1 are still there.
        bias = history_bias(config.n_heads, history, config.period).flip(1)  # [H, W]
        filled = torch.arange(history) >= history - 1 - torch.arange(history + 1)[:, None]
        self.heads = config.n_heads
        self.layers = nn.ModuleList(PredictorLayer(layer) for layer in network.transformer_decoder.layers)
        self.register_buffer("bias", torch.where(filled[:, None], bias, MASKED).flatten(1))
        self.register_buffer("positions", network.positions.clone())

    def forward(
        self,
        audio_feature: Tensor,
        previous_latent: Tensor,
        style: Tensor,
        position: Tensor,
        kv_cache: Tensor,
        valid_frames: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = self.latent_map(previous_latent) + style + F.embedding(position, self.positions)
        cross = self.cross(audio_feature).chunk(len(self.layers), dim=-1)
        bias = F.embedding(valid_frames, self.bias).view(len(x), 1, self.heads, 1, -1)
        past = torch.split(kv_cache[:, :, :, :, 1:].flatten(1, 2), 1, dim=1)
        cache: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, keys, values = layer(x, cross[i], past[2 * i], past[2 * i + 1], bias)
            cache += [keys, values]
        return x, torch.cat(cache, dim=1).view(kv_cache.shape)


class FoldedHead(nn.Module):
    """All denoising steps of a linear head: one affine map."""

    def __init__(self, network: DiffusionNetwork, table: SamplerTable) -> None:
        super().__init__()
        affine = fold_head(network, table)
        self.affine = frozen_linear(torch.cat([affine.from_noise, affine.from_condition], 1), affine.offset)

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        return self.affine(torch.cat([noise, condition], dim=-1))


class UnrolledHead(nn.Module):
    """Every denoising step written out, for heads that do not fold; time embeddings are constants."""

    times: Tensor

    def __init__(self, network: DiffusionNetwork, table: SamplerTable) -> None:
        super().__init__()
        self.network, self.table = network, table
        with torch.no_grad():
            self.register_buffer("times", network.time_emb(torch.from_numpy(table.timesteps)))

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        return self.network.sample_at(noise, condition, self.table, self.times)


def diffusion_head(network: DiffusionNetwork, table: SamplerTable, fold: bool) -> FoldedHead | UnrolledHead:
    return FoldedHead(network, table) if fold else UnrolledHead(network, table)


class DecoderBlock(nn.Module):
    """Pre-norm attention and feed-forward over a window."""

    def __init__(self, attention: Any, feed_forward: Any) -> None:
        super().__init__()
        inner = attention.fn.fn
        h = inner.to_out.weight.shape[0]
        self.heads: int = inner.heads
        q, kv = inner.to_qkv.weight.split([h, 2 * h])
        self.q, self.kv = frozen_linear(q * inner.scale, None), frozen_linear(kv, None)
        self.out = inner.to_out
        self.norm1, self.norm2 = attention.fn.norm, feed_forward.fn.norm
        self.l1, self.l2 = feed_forward.fn.fn.l1, feed_forward.fn.fn.l2

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, D, h]; mask [B, 1, 1, D] added to the scores."""
        b, window, h = x.shape
        y = self.norm1(x)
        q = self.q(y).view(b, window, self.heads, h // self.heads).transpose(1, 2)
        k, v = self.kv(y).view(b, window, 2, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) + mask, dim=-1)
        return self._fed(x + self.out((weights @ v).transpose(1, 2).reshape(b, window, h)))

    def _fed(self, x: Tensor) -> Tensor:
        return x + self.l2(F.gelu(self.l1(self.norm2(x))))


class NewestBlock(DecoderBlock):
    """The last block, of whose tokens the newest alone is wanted: keys and values of the others are never made.

    A query meets K y as (K^T q) y, and the weighted mean of V y is V of the mean: two products of one row a head in
    place of two of the whole window.
    """

    to_keys: Tensor
    to_values: Tensor

    def __init__(self, attention: Any, feed_forward: Any) -> None:
        super().__init__(attention, feed_forward)
        h = self.kv.in_features
        k, v = self.kv.weight.view(2, self.heads, h // self.heads, h)
        del self.kv
        self.register_buffer("to_keys", k.contiguous())  # [H, h/H, h]
        self.register_buffer("to_values", v.transpose(1, 2).contiguous())  # [H, h, h/H]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, D, h]; mask [B, 1, 1, D] added to the scores; the newest token [B, 1, h]."""
        b, _, h = x.shape
        y = self.norm1(x)
        q = self.q(y[:, -1]).view(b, self.heads, h // self.heads).transpose(0, 1)
        scores = (q @ self.to_keys).transpose(0, 1) @ y.transpose(-1, -2)  # [B, H, D]
        mean = torch.softmax(scores + mask[:, 0], dim=-1) @ y
        attended = (mean.transpose(0, 1) @ self.to_values).transpose(0, 1).reshape(b, 1, h)
        return self._fed(x[:, -1:] + self.out(attended))


class NewestFrameDecoder(nn.Module):
    """The newest frame's vertices from the last latents, in a static window with the empty slots masked.

    The convolution reads the oldest valid latent in place of what lies before it, which is what replicate padding
    sees; empty slots take no part in the statistics and the attention.
    """

    taps: Tensor
    valid: Tensor
    share: Tensor
    mask: Tensor
    voices: Tensor
    size: Tensor

    def __init__(self, decoder: VQDecoder, window: int, batch: int) -> None:
        super().__init__()
        self.pre = decoder.decoder_linear_embedding_pre
        expander: Any = decoder.expander[0]
        conv = expander[0]
        # The taps side by side: a convolution is then one product of matrices, and needs nothing transposed.
        self.conv = frozen_linear(conv.weight.permute(0, 2, 1).flatten(1), conv.bias)
        # Whatever depends on the number of valid latents alone is looked up by it, 0 to D.
        slots, count = torch.arange(window), torch.arange(window + 1)[:, None]
        valid = slots >= window - count
        reach = conv.weight.shape[2] // 2
        taps = (slots[:, None] + torch.arange(-reach, reach + 1)).clamp(max=window - 1).view(1, -1)
        self.register_buffer("taps", taps.maximum(window - count.clamp(min=1)))  # [D + 1, 5 D]
        self.register_buffer("valid", valid.float())
        self.register_buffer("share", valid / count.clamp(min=1))
        self.register_buffer("mask", torch.where(valid, 0.0, MASKED))
        self.register_buffer("voices", torch.arange(batch)[:, None] * window)
        self.register_buffer("size", torch.tensor([window]))
        self.slope: float = expander[1].negative_slope
        self.instance_norm = len(expander) == 3
        embedding: Any = decoder.decoder_linear_embedding.net
        self.embedding = frozen_linear(embedding.weight, embedding.bias + decoder.row)
        net = list(decoder.decoder_transformer.net)
        self.blocks = nn.ModuleList(
            (NewestBlock if i + 2 == len(net) else DecoderBlock)(net[i], net[i + 1])
            for i in range(0, len(net), 2)
        )
        self.to_vertices = decoder.vertice_map_reverse

    def forward(self, latents: Tensor, valid_latents: Tensor, template: Tensor) -> Tensor:
        """latents [B, D, C] right-aligned, valid_latents [B] (D where larger), template [B, 3V]; vertices [B, V, 3]."""
        b, window, _ = latents.shape
        count = torch.minimum(valid_latents, self.size)
        taps = F.embedding(count, self.taps) + self.voices
        x = F.embedding(taps, self.pre(latents).flatten(0, 1)).view(b, window, -1)
        x = F.leaky_relu(self.conv(x), self.slope)
        if self.instance_norm:
            x = self._normalise(x, F.embedding(count, self.valid), F.embedding(count, self.share))
        x = self.embedding(x)
        mask = F.embedding(count, self.mask)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return (template + self.to_vertices(x.view(b, -1))).view(b, -1, 3)

    @staticmethod
    def _normalise(x: Tensor, valid: Tensor, share: Tensor) -> Tensor:
        """InstanceNorm of [B, D, h] over the `valid` tokens [B, D], each of which has its `share`; the others become
        zero. Biased variance, no affine.
        """
        valid, share = valid[:, :, None], share[:, :, None]
        centred = (x - (x * share).sum(1, keepdim=True)) * valid
        variance = (centred.square() * share).sum(1, keepdim=True)
        return centred * (variance + INSTANCE_NORM_EPS) ** -0.5


class Frame(nn.Module):
    """Predictor, head and decoder in one graph, state in and out."""

    def __init__(
        self, predictor: ConditionPredictor, head: FoldedHead | UnrolledHead, decoder: NewestFrameDecoder
    ) -> None:
        super().__init__()
        self.predictor, self.head, self.decoder = predictor, head, decoder

    def forward(
        self,
        audio_feature: Tensor,
        noise: Tensor,
        style: Tensor,
        position: Tensor,
        valid_frames: Tensor,
        valid_latents: Tensor,
        template: Tensor,
        kv_cache: Tensor,
        latents: Tensor,
        active: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        condition, cache = self.predictor(
            audio_feature, latents[:, -1], style, position, kv_cache, valid_frames
        )
        latent = self.head(noise, condition)
        window = torch.cat([latents[:, 1:], latent[:, None]], dim=1)
        vertices = self.decoder(window, valid_latents + 1, template)
        kept = active[:, None, None]
        return (
            vertices,
            torch.where(kept[..., None, None, None], cache, kv_cache),
            torch.where(kept, window, latents),
        )
