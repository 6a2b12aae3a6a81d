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
from streamtalk_export.windows import StreamingEncoder

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
        self, x: Tensor, cross: Tensor, keys: list[Tensor], values: list[Tensor], bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, cross [B, E]; keys, values: together the W - 1 frames before, each [B, 1, H, n, E/H]; bias
        [B, 1, H, 1, W] is added to the scores. Returns the token, its key and its value.
        """
        b, width = x.shape
        qkv = self.qkv(x).view(b, 3, self.heads, 1, width // self.heads)
        q, key, value = torch.split(qkv, 1, dim=1)
        weights = torch.softmax(q @ torch.cat([*keys, key], dim=3).transpose(-1, -2) + bias, dim=-1)
        x = self.norm1(x + self.out((weights @ torch.cat([*values, value], dim=3)).view(b, width)))
        x = self.norm2(x + cross)
        x = self.norm3(x + self.linear2(self.activation(self.linear1(x))))
        return x, key, value


class ConditionPredictor(nn.Module):
    """The conditions of a hop's frames, one after the other, from their audio features, latents and the cache."""

    bias: Tensor
    positions: Tensor

    def __init__(self, network: DiffusionNetwork, history: int, hop: int = 1) -> None:
        super().__init__()
        config = network.config
        self.history, self.heads = history, config.n_heads
        self.latent_map = network.vq_latent_map
        self.cross = frozen_linear(*fold_cross_attention(network))
        self.layers = nn.ModuleList(PredictorLayer(layer) for layer in network.transformer_decoder.layers)
        # The newest slot is the last: distance 0 there. Looked up by the number of frames before the hop, 0 to W; of
        # those before a frame, W - 1 are still there.
        bias = history_bias(config.n_heads, history, config.period).flip(1)  # [H, W]
        before = torch.arange(history + 1)[:, None, None] + torch.arange(hop)[:, None]  # [W + 1, hop, 1]
        filled = torch.arange(history) >= history - 1 - before
        self.register_buffer("bias", torch.where(filled[:, :, None], bias, MASKED).flatten(1))
        clock = (torch.arange(config.period)[:, None] + torch.arange(hop)) % config.period
        self.register_buffer("positions", network.positions[clock].flatten(1))

    def forward(
        self,
        audio_feature: Tensor,
        previous_latent: Tensor,
        style: Tensor,
        position: Tensor,
        kv_cache: Tensor,
        valid_frames: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One frame: audio_feature [B, A], previous_latent [B, C]. Returns its condition [B, E] and the new cache."""
        hop = self.begin(audio_feature[:, None], style, position, kv_cache, valid_frames)
        return hop.next(previous_latent), hop.kv_cache()

    def begin(
        self, audio_features: Tensor, style: Tensor, position: Tensor, kv_cache: Tensor, valid_frames: Tensor
    ) -> PredictedHop:
        """Everything that does not wait for a latent: audio_features [B, hop, A]."""
        b, hop, _ = audio_features.shape
        tokens = F.embedding(position, self.positions).view(b, hop, -1) + style[:, None]
        cross = self.cross(audio_features.flatten(0, 1)).view(b, hop, len(self.layers), -1)
        bias = F.embedding(valid_frames, self.bias).view(b, hop, 1, self.heads, 1, -1)
        past = torch.split(kv_cache.flatten(1, 2), 1, dim=1)  # each [B, 1, H, W, E/H]
        return PredictedHop(self, tokens, cross, bias, past, kv_cache.shape)


class PredictedHop:
    """A hop under way: keys and values of its frames so far. Letters as in `ConditionPredictor`."""

    def __init__(
        self,
        predictor: ConditionPredictor,
        tokens: Tensor,
        cross: Tensor,
        bias: Tensor,
        past: tuple[Tensor, ...],
        shape: torch.Size,
    ) -> None:
        self.predictor, self.shape = predictor, shape
        self.tokens, self.cross, self.bias, self.past = tokens, cross, bias, past
        self.made: list[list[Tensor]] = [[] for _ in past]
        """Keys and values of the frames so far, by layer and kind as in the cache."""

    def next(self, previous_latent: Tensor) -> Tensor:
        """Condition [B, E] of the next frame, whose predecessor's latent is [B, C]."""
        frame = len(self.made[0])
        x = self.predictor.latent_map(previous_latent) + self.tokens[:, frame]
        for i, layer in enumerate(self.predictor.layers):
            keys, values = (self._before(kind, frame) for kind in (2 * i, 2 * i + 1))
            x, key, value = layer(x, self.cross[:, frame, i], keys, values, self.bias[:, frame])
            self.made[2 * i].append(key)
            self.made[2 * i + 1].append(value)
        return x

    def kv_cache(self) -> Tensor:
        """Cache [B, layers, 2, H, W, E/H] after the frames so far."""
        made = len(self.made[0])
        newest = [
            torch.cat(self._last(kind, made, self.predictor.history), dim=3) for kind in range(len(self.past))
        ]
        return torch.cat(newest, dim=1).view(self.shape)

    def _before(self, kind: int, frame: int) -> list[Tensor]:
        return self._last(kind, frame, self.predictor.history - 1)

    def _last(self, kind: int, made: int, count: int) -> list[Tensor]:
        """The last `count` of the cache's and `made` frames."""
        from_cache = count - made
        history = self.predictor.history
        kept = [self.past[kind][:, :, :, history - from_cache :]] if from_cache > 0 else []
        return kept + self.made[kind][max(0, made - count) : made]


class FoldedHead(nn.Module):
    """All denoising steps of a linear head: one affine map."""

    def __init__(self, network: DiffusionNetwork, table: SamplerTable) -> None:
        super().__init__()
        affine = fold_head(network, table)
        self.from_noise = frozen_linear(affine.from_noise, affine.offset)
        self.from_condition = frozen_linear(affine.from_condition, None)

    def drawn(self, noise: Tensor) -> Tensor:
        """The noise's part [..., C] of latents."""
        return self.from_noise(noise)

    def latent(self, drawn: Tensor, condition: Tensor) -> Tensor:
        """Latents [B, C] of their noise's part and conditions [B, E]."""
        return drawn + self.from_condition(condition)

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        return self.latent(self.drawn(noise), condition)


class UnrolledHead(nn.Module):
    """Every denoising step written out, for heads that do not fold; time embeddings are constants."""

    times: Tensor

    def __init__(self, network: DiffusionNetwork, table: SamplerTable) -> None:
        super().__init__()
        self.network, self.table = network, table
        with torch.no_grad():
            self.register_buffer("times", network.time_emb(torch.from_numpy(table.timesteps)))

    def drawn(self, noise: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def latent(self, drawn: Tensor, condition: Tensor) -> Tensor:
        """Latents [B, C] of noise [B, C] and conditions [B, E]."""
        return self.network.sample_at(drawn, condition, self.table, self.times)

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        return self.latent(noise, condition)


def diffusion_head(network: DiffusionNetwork, table: SamplerTable, fold: bool) -> FoldedHead | UnrolledHead:
    return FoldedHead(network, table) if fold else UnrolledHead(network, table)


class DecoderBlock(nn.Module):
    """Pre-norm attention and feed-forward over a window."""

    def __init__(self, attention: Any, feed_forward: Any) -> None:
        super().__init__()
        inner = attention.fn.fn
        h = inner.to_out.weight.shape[0]
        self.heads: int = inner.heads
        scale = torch.ones(3 * h, 1)
        scale[:h] = inner.scale
        self.qkv = frozen_linear(inner.to_qkv.weight * scale, None)
        self.out = inner.to_out
        self.norm1, self.norm2 = attention.fn.norm, feed_forward.fn.norm
        self.l1, self.l2 = feed_forward.fn.fn.l1, feed_forward.fn.fn.l2

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [N, D, h]; mask [N, 1, 1, D] added to the scores."""
        n, window, h = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, window, 3, self.heads, h // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) + mask, dim=-1)
        return self._fed(x + self.out((weights @ v).transpose(1, 2).reshape(n, window, h)))

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
        h = self.qkv.in_features
        q, k, v = self.qkv.weight.view(3, self.heads, h // self.heads, h)
        del self.qkv
        self.q = frozen_linear(q.flatten(0, 1), None)
        self.register_buffer("to_keys", k.contiguous())  # [H, h/H, h]
        self.register_buffer("to_values", v.transpose(1, 2).contiguous())  # [H, h, h/H]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [N, D, h]; mask [N, 1, 1, D] added to the scores; the newest token [N, 1, h]."""
        n, _, h = x.shape
        y = self.norm1(x)
        q = self.q(y[:, -1]).view(n, self.heads, h // self.heads).transpose(0, 1)
        scores = (q @ self.to_keys).transpose(0, 1) @ y.transpose(-1, -2)  # [N, H, D]
        mean = torch.softmax(scores + mask[:, 0], dim=-1) @ y
        attended = (mean.transpose(0, 1) @ self.to_values).transpose(0, 1).reshape(n, 1, h)
        return self._fed(x[:, -1:] + self.out(attended))


class NewestFrameDecoder(nn.Module):
    """The newest frame's vertices of each of a hop's windows, in static windows with the empty slots masked.

    The windows of a hop lie on one line of `D + hop - 1` latents, each one further than the last. The convolution reads
    the oldest valid latent in place of what lies before it, and the newest in place of what lies behind, which is what
    replicate padding sees. So a token in the middle of a window is the same in all windows: it is computed once for the
    line, and only those at a window's ends again. Empty slots take no part in the statistics and the attention.
    """

    taps: Tensor
    tokens: Tensor
    valid: Tensor
    share: Tensor
    mask: Tensor
    lines: Tensor
    rows: Tensor

    def __init__(self, decoder: VQDecoder, window: int, batch: int, hop: int = 1) -> None:
        super().__init__()
        self.hop, self.window = hop, window
        self.pre = decoder.decoder_linear_embedding_pre
        expander: Any = decoder.expander[0]
        conv = expander[0]
        # The taps side by side: a convolution is then one product of matrices, and needs nothing transposed.
        self.conv = frozen_linear(conv.weight.permute(0, 2, 1).flatten(1), conv.bias)
        self._tabulate(conv.weight.shape[2] // 2, batch)
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

    def _tabulate(self, reach: int, batch: int) -> None:
        """Tables of whatever depends on the number of valid latents alone, looked up by it: 0 to D, and D + 1 for D."""
        D, hop = self.window, self.hop
        length = D + hop - 1
        count = (torch.arange(D + 2)[:, None] + torch.arange(hop)).clamp(1, D)  # of each window, [D + 2, hop]
        first = torch.arange(hop)  # slot on the line where each window begins
        oldest, newest = first + D - count, (first + D - 1).expand_as(count)
        # Convolved are all slots of the line, the two last ones of each window but the last, and the two first valid
        # ones of each window but the first: what their taps read ends where their window does.
        edge = torch.arange(reach)
        last = (newest[:, :-1, None] - edge).maximum(first[:-1, None]).flatten(1)
        begin = (oldest[:, 1:, None] + edge).minimum(newest[:, 1:, None]).flatten(1)
        slots = torch.cat([torch.arange(length).expand(D + 2, -1), last, begin], 1)  # [D + 2, S]
        owner = torch.cat([first[:-1], first[1:]]).repeat_interleave(reach)  # window of each edge
        lower = torch.cat([oldest[:, :1].expand(-1, length), oldest[:, owner]], 1)
        upper = torch.cat([newest[:, -1:].expand(-1, length), newest[:, owner]], 1)
        taps = slots[:, :, None] + torch.arange(-reach, reach + 1)
        taps = taps.maximum(lower[:, :, None]).minimum(upper[:, :, None])
        self.register_buffer("taps", taps.flatten(1))  # [D + 2, 5 S]
        # Which of the convolved tokens are a window's: the line's, and its own at its ends.
        tokens = (first[:, None] + torch.arange(D)).expand(D + 2, hop, D).clone()
        rows = torch.arange(D + 2)[:, None, None]
        places = torch.arange((hop - 1) * reach).view(-1, reach)
        if hop > 1:
            own_last = last.view(D + 2, hop - 1, reach) - first[:-1, None]
            tokens[rows, first[:-1, None], own_last] = length + places.expand_as(own_last)
            own_begin = begin.view(D + 2, hop - 1, reach) - first[1:, None]
            tokens[rows, first[1:, None], own_begin] = length + places.numel() + places.expand_as(own_begin)
        self.register_buffer("tokens", tokens.flatten(1))  # [D + 2, hop D]
        valid = torch.arange(D) >= D - count[:, :, None]
        self.register_buffer("valid", valid.float().flatten(1))
        self.register_buffer("share", (valid / count[:, :, None]).flatten(1))
        self.register_buffer("mask", torch.where(valid, 0.0, MASKED).flatten(1))
        self.register_buffer("lines", torch.arange(batch)[:, None] * length)
        self.register_buffer("rows", torch.arange(batch)[:, None] * slots.shape[1])

    def forward(self, line: Tensor, count: Tensor, template: Tensor) -> Tensor:
        """line [B, D + hop - 1, C] right-aligned; count [B]: valid latents of the first window, at most D + 1; template
        [B, 3V]; vertices [B, hop, V, 3].
        """
        b = len(line)
        windows = b * self.hop
        taps = F.embedding(count, self.taps) + self.lines
        x = F.embedding(taps, self.pre(line).flatten(0, 1)).view(b, self.taps.shape[1] // 5, -1)
        x = F.leaky_relu(self.conv(x), self.slope)
        if self.hop > 1:
            x = F.embedding(F.embedding(count, self.tokens) + self.rows, x.flatten(0, 1))
        x = x.view(windows, self.window, -1)
        if self.instance_norm:
            x = self._normalise(x, F.embedding(count, self.valid), F.embedding(count, self.share))
        x = self.embedding(x)
        mask = F.embedding(count, self.mask).view(windows, 1, 1, -1)
        for block in self.blocks:
            x = block(x, mask)
        vertices = self.to_vertices(x.view(windows, -1)).view(b, self.hop, -1)
        return (template[:, None] + vertices).view(b, self.hop, -1, 3)

    @staticmethod
    def _normalise(x: Tensor, valid: Tensor, share: Tensor) -> Tensor:
        """InstanceNorm of [N, D, h] over the `valid` tokens, each of which has its `share`; the others become zero.
        Biased variance, no affine.
        """
        valid, share = (table.view(*x.shape[:2], 1) for table in (valid, share))
        centred = (x - (x * share).sum(1, keepdim=True)) * valid
        variance = (centred.square() * share).sum(1, keepdim=True)
        return centred * (variance + INSTANCE_NORM_EPS) ** -0.5


class DecoderStage(nn.Module):
    """`vq_decoder.onnx`: latents [B, D, C], valid_latents [B] (D where larger) and template [B, 3V] to the newest
    frame's vertices [B, V, 3].
    """

    size: Tensor

    def __init__(self, decoder: NewestFrameDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("size", torch.tensor([decoder.window]))

    def forward(self, latents: Tensor, valid_latents: Tensor, template: Tensor) -> Tensor:
        return self.decoder(latents, torch.minimum(valid_latents, self.size), template)[:, 0]


class Hop(nn.Module):
    """A window of audio to a hop of frames, state in and out: all that runs."""

    def __init__(
        self,
        encoder: StreamingEncoder,
        predictor: ConditionPredictor,
        head: FoldedHead | UnrolledHead,
        decoder: NewestFrameDecoder,
    ) -> None:
        super().__init__()
        self.encoder, self.predictor, self.head, self.decoder = encoder, predictor, head, decoder

    def forward(
        self,
        pcm: Tensor,
        noise: Tensor,
        style: Tensor,
        template: Tensor,
        position: Tensor,
        valid_frames: Tensor,
        valid_latents: Tensor,
        kv_cache: Tensor,
        latents: Tensor,
        active: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hop = noise.shape[1]
        predicted = self.predictor.begin(self.encoder(pcm), style, position, kv_cache, valid_frames)
        drawn = self.head.drawn(noise.flatten(0, 1)).view(noise.shape)
        latent, made = latents[:, -1], []
        for frame in range(hop):
            latent = self.head.latent(drawn[:, frame], predicted.next(latent))
            made.append(latent[:, None])
        line = torch.cat([latents, *made], dim=1)
        vertices = self.decoder(line[:, 1:], valid_latents + 1, template)
        kept = active[:, None, None]
        return (
            vertices,
            torch.where(kept[..., None, None, None], predicted.kv_cache(), kv_cache),
            torch.where(kept, line[:, hop:], latents),
        )
