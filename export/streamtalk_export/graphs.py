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
    ) -> tuple[Tensor, Tensor]:
        """x, cross [B, E]; keys, values [B, 1, H, W - 1, E/H] of the frames before; bias [B, 1, H, W, 1] is added to
        the scores. Returns the token, and its own keys and values [B, 2, H, 1, E/H].

        Its own are not put beside the past's here: copies of a cache cost more than attention does.
        """
        b, width = x.shape
        qkv = self.qkv(x).view(b, 3, self.heads, 1, width // self.heads)
        q, kv = torch.split(qkv, [1, 2], dim=1)
        key, value = torch.split(kv, 1, dim=1)
        q = q.transpose(-1, -2)
        scores = torch.cat([keys @ q, key @ q], dim=3)
        weights = torch.softmax(scores + bias, dim=3).transpose(-1, -2)
        attended = (weights[..., :-1] @ values + weights[..., -1:] * value).reshape(b, width)
        x = self.norm1(x + self.out(attended))
        x = self.norm2(x + cross)
        x = self.norm3(x + self.linear2(self.activation(self.linear1(x))))
        return x, kv


class ConditionPredictor(nn.Module):
    """The condition of one frame from its audio feature, the previous latent and the cache."""

    bias: Tensor
    positions: Tensor
    slots: Tensor

    def __init__(self, network: DiffusionNetwork, history: int) -> None:
        super().__init__()
        config = network.config
        self.latent_map = network.vq_latent_map
        self.cross = frozen_linear(*fold_cross_attention(network))
        # The newest slot is the last: distance 0 there.
        bias = history_bias(config.n_heads, history, config.period).flip(1)[:, :, None]
        self.layers = nn.ModuleList(PredictorLayer(layer) for layer in network.transformer_decoder.layers)
        self.register_buffer("bias", bias)
        self.register_buffer("positions", network.positions.clone())
        self.register_buffer("slots", torch.arange(history)[:, None])

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
        # Slot s holds a frame from len - 1 - valid on, this frame's own slot included.
        oldest = (len(self.slots) - 1 - valid_frames)[:, None, None, None, None]
        bias = torch.where(self.slots < oldest, MASKED, self.bias)
        past = kv_cache[:, :, :, :, 1:]
        keys_values = torch.split(past.flatten(1, 2), 1, dim=1)
        newest = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, cross[i], keys_values[2 * i], keys_values[2 * i + 1], bias)
            newest.append(kv)
        return x, torch.cat([past, torch.stack(newest, dim=1)], dim=4)


class FoldedHead(nn.Module):
    """All denoising steps of a linear head: one affine map."""

    def __init__(self, network: DiffusionNetwork, table: SamplerTable) -> None:
        super().__init__()
        affine = fold_head(network, table)
        self.from_noise = frozen_linear(affine.from_noise, None)
        self.from_condition = frozen_linear(affine.from_condition, affine.offset)

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        return self.from_noise(noise) + self.from_condition(condition)


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

    Empty slots hold copies of the oldest valid latent, which is what replicate padding sees, and take no part
    in the statistics and the attention.
    """

    slots: Tensor
    size: Tensor

    def __init__(self, decoder: VQDecoder, window: int) -> None:
        super().__init__()
        self.pre = decoder.decoder_linear_embedding_pre
        expander: Any = decoder.expander[0]
        conv = expander[0]
        self.conv_weight, self.conv_bias = conv.weight, conv.bias
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
        self.register_buffer("slots", torch.arange(window)[:, None])
        self.register_buffer("size", torch.tensor([window]))

    def forward(self, latents: Tensor, valid_latents: Tensor, template: Tensor) -> Tensor:
        """latents [B, D, C] right-aligned, valid_latents [B] (D where larger), template [B, 3V]; vertices [B, V, 3]."""
        valid_latents = torch.minimum(valid_latents, self.size)
        oldest = (len(self.slots) - valid_latents)[:, None, None]
        valid = self.slots >= oldest  # [B, D, 1]
        # A sum rather than a product of matrices, which float16 graphs would round.
        first = ((self.slots == oldest).to(latents.dtype) * latents).sum(1, keepdim=True)
        x = self.pre(torch.where(valid, latents, first)).transpose(1, 2)
        x = torch.cat([x[:, :, :1], x[:, :, :1], x, x[:, :, -1:], x[:, :, -1:]], dim=2)
        x = F.leaky_relu(F.conv1d(x, self.conv_weight, self.conv_bias), self.slope).transpose(1, 2)
        if self.instance_norm:
            x = self._normalise(x, valid.to(x.dtype), valid_latents.to(x.dtype)[:, None, None])
        x = self.embedding(x)
        mask = torch.where(valid, 0.0, MASKED).transpose(1, 2)[:, None]
        for block in self.blocks:
            x = block(x, mask)
        return (template + self.to_vertices(x)[:, 0]).view(len(template), -1, 3)

    @staticmethod
    def _normalise(x: Tensor, valid: Tensor, count: Tensor) -> Tensor:
        """InstanceNorm over the valid tokens of [B, D, h]: biased variance, no affine."""
        centred = (x - (x * valid).sum(1, keepdim=True) / count) * valid
        variance = centred.square().sum(1, keepdim=True) / count
        return centred * torch.rsqrt(variance + INSTANCE_NORM_EPS)


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
