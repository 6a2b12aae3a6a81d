"""The released algorithm in eager PyTorch, as a baseline: every frame does the work that the release does for it.

`streaming` (`grow_*` of the golden vectors): the predictor sees the whole history anew, all its tokens are denoised in
all steps, the decoder sees all latents, and the newest frame is kept. `offline` (`eval_*`): the last W latents are
denoised anew, and the decoder runs once, over the whole clip. Cross-attention is taken in the one linear map that it
is, which the release computes in full: that flatters the baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from streamtalk_export.model import TalkerModel
from streamtalk_export.sampler import SamplerTable

Seconds = dict[str, float]
"""By stage: `condition_predictor`, `diffusion_head`, `vq_decoder`."""


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What `call` gives, and the seconds that it took until it was there."""
    began = perf_counter()
    result = call()
    if result.is_cuda:
        torch.cuda.synchronize()
    return result, perf_counter() - began


@dataclass(frozen=True)
class Released:
    """A model with features [L, A] and noise [L, C] of a clip; `latents` [1 + L, C] begin with the start latent. All
    on one device.
    """

    model: TalkerModel
    table: SamplerTable
    features: Tensor
    noise: Tensor
    latents: Tensor
    speaker: int = 0

    @torch.no_grad()
    def streaming_frame(self, i: int) -> tuple[Tensor, Seconds]:
        """Vertex offsets [3V] of frame `i` after the first `i` frames of `latents`, and what each stage took."""
        network = self.model.diff_ar_network
        style = network.obj_vector.weight[self.speaker][None]
        past, features = self.latents[None, : i + 1], self.features[None, : i + 1]
        with self.noise.device:  # its masks too are made there
            conditions, predictor_s = timed(lambda: network.conditions(past, features, style))
        made, head_s = timed(lambda: network.sample(self.noise[: i + 1], conditions[0], self.table))
        sequence = torch.cat([self.latents[: i + 1], made[-1:]])[None]
        decoded, decoder_s = timed(lambda: self.model.autoencoder.decoder(sequence))
        return decoded[0, -1], _stages(predictor_s, head_s, decoder_s)

    @torch.no_grad()
    def offline_frame(self, i: int, window: int) -> Seconds:
        """What frame `i` of the offline path takes, without its share of the one decoding."""
        network = self.model.diff_ar_network
        style = network.obj_vector.weight[self.speaker][None]
        first = max(i + 1 - window, 0)
        past, features = self.latents[None, first : i + 1], self.features[None, first : i + 1]
        with self.noise.device:
            conditions, predictor_s = timed(lambda: network.conditions(past, features, style))
        _, head_s = timed(lambda: network.sample(self.noise[first : i + 1], conditions[0], self.table))
        return _stages(predictor_s, head_s, 0.0)

    @torch.no_grad()
    def decoding(self, frames: int) -> float:
        """Seconds to decode a clip of `frames` latents at once."""
        return timed(lambda: self.model.autoencoder.decoder(self.latents[None, 1 : frames + 1]))[1]


def _stages(predictor_s: float, head_s: float, decoder_s: float) -> Seconds:
    return {"condition_predictor": predictor_s, "diffusion_head": head_s, "vq_decoder": decoder_s}
