"""What is linear is multiplied out at export, in float64.

The released head has no nonlinearity in the noisy latent or the condition, nor has DDIM with eta 0, so any
number of steps is one affine map. Cross-attention over a single visible frame is one linear map of the
audio feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamtalk_export.network import DiffusionNetwork
from streamtalk_export.sampler import SamplerTable


@dataclass(frozen=True)
class Affine:
    """`latent = noise @ from_noise.T + condition @ from_condition.T + offset`, float64."""

    from_noise: Tensor
    from_condition: Tensor
    offset: Tensor


@torch.no_grad()
def fold_head(network: DiffusionNetwork, table: SamplerTable) -> Affine:
    """All steps of a linear head as one map: [C, C], [C, E] and [C]."""
    if not isinstance(network.denoiser, nn.Sequential):
        raise TypeError("Only the linear head folds; the residual MLP is unrolled.")
    width = network.config.latent_dim
    dense: Any = network.denoiser[0]
    w_in, b_in = network.vq_latent_map.weight.double(), network.vq_latent_map.bias.double()
    w_x, w_y = dense.weight.double().split(width, dim=1)
    w_out, b_out = network.latent_vq_map.weight.double(), network.latent_vq_map.bias.double()
    times = _time_embeddings(network, table)

    step_x = w_out @ w_x @ w_in
    step_c = w_out @ w_y
    step_0 = (w_x @ b_in + times @ w_y.T + dense.bias.double()) @ w_out.T + b_out

    identity = torch.eye(network.config.vq_dim, dtype=torch.float64)
    from_noise = identity * network.drawn
    from_condition = torch.zeros_like(step_c)
    offset = torch.zeros(network.config.vq_dim, dtype=torch.float64)
    for i in range(len(table)):
        mix = float(table.coef_x0[i]) * step_x + float(table.coef_xt[i]) * identity
        from_noise = mix @ from_noise
        from_condition = mix @ from_condition + float(table.coef_x0[i]) * step_c
        offset = mix @ offset + float(table.coef_x0[i]) * step_0[i]
    return Affine(from_noise, from_condition, offset)


def _time_embeddings(network: DiffusionNetwork, table: SamplerTable) -> Tensor:
    """Time embeddings of the table's timesteps, [N, E] float64."""
    mlp: Any = network.time_emb.mlp
    first, last = mlp[0], mlp[2]
    angles = network.time_emb.angles(torch.from_numpy(table.timesteps))
    hidden = nn.functional.silu(angles.double() @ first.weight.double().T + first.bias.double())
    return hidden @ last.weight.double().T + last.bias.double()


@torch.no_grad()
def fold_cross_attention(network: DiffusionNetwork) -> tuple[Tensor, Tensor]:
    """Audio feature to what cross-attention adds in each layer: weight [layers * E, A], bias [layers * E]."""
    w_audio, b_audio = network.audio_feature_map.weight.double(), network.audio_feature_map.bias.double()
    width = network.config.latent_dim
    weights, biases = [], []
    for layer in network.transformer_decoder.layers:
        attention = layer.multihead_attn
        w_value = attention.in_proj_weight[2 * width :].double()
        b_value = attention.in_proj_bias[2 * width :].double()
        w_o, b_o = attention.out_proj.weight.double(), attention.out_proj.bias.double()
        weights.append(w_o @ w_value @ w_audio)
        biases.append(w_o @ (w_value @ b_audio + b_value) + b_o)
    return torch.cat(weights), torch.cat(biases)
