"""Another microphone, room tone and throat for every crop: disturbances drawn anew in the log-mel domain.

The corpus carries what changes a waveform (rooms, codecs, babble, clipping), rendered once. What can be said in
log-mel power costs next to nothing here and never repeats: vocal-tract length (Jaitly and Hinton, "Vocal tract
length perturbation", 2013), the microphone's response, level, the unsteadiness of a throat, stationary noise, lost
bands (after Park et al., "SpecAugment", 2019; no gaps in time, which would hide closures).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WARP = 0.10  # largest share by which the mel axis is stretched
BEND_POINTS = 5
BEND = 0.0234  # deviation by which it is bent besides at each, as a share of it: formants move one by one
CURVE_POINTS, CURVE_DB = 6, 4.0  # of the microphone's response, deviation in dB
LEVEL_DB = 6.0
WOBBLE_DB, WOBBLE_FRAMES = (
    1.5,
    5,
)  # deviation of gains that wander within a crop, and how often they turn (10 ms each)
NOISE_SHARE, NOISE_BELOW_DB = 0.4, (12.0, 45.0)  # below the crop's mean power
LOST_SHARE, LOST_BINS = 0.25, 10
PLAIN_SHARE = 0.15  # of the crops are left as they are
LOG_OF_DB = 0.2302585  # ln(10) / 10: decibels to the log of power


def disturbed(mel: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Log-mel [B, bins, M] or [B, P, bins, M] (`MelEncoder.log_mel`: ln(1 + power / floor)), disturbed alike
    over P, each crop in its own way. `strength` 0..1 scales sizes and shares: noise hides the very silences that
    betray a closure, so a model had better learn of them first."""
    batch, bins = mel.shape[0], mel.shape[-2]
    lead = (batch,) + (1,) * (mel.dim() - 3)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    # warp of the mel axis, by linear interpolation between bins
    stretch = 1 + strength * WARP * (2 * uniform(batch, 1) - 1)
    bend = strength * BEND * bins * torch.randn(batch, 1, BEND_POINTS, generator=generator)
    place = torch.arange(bins)[None] * stretch
    place = place + F.interpolate(bend, bins, mode="linear", align_corners=True)[:, 0]
    place = place.clamp(0.0, bins - 1.0)
    below = place.floor().long().clamp(max=bins - 2)
    share = (place - below).to(mel.device).view(*lead, bins, 1)
    rows = torch.arange(batch)[:, None]
    by_bin = mel.movedim(-2, 1)  # [B, bins, ..., M]
    low, high = by_bin[rows, below].movedim(1, -2), by_bin[rows, below + 1].movedim(1, -2)
    power = torch.expm1(low + share * (high - low))

    # response, level and lost bands as one gain a bin
    curve = strength * CURVE_DB * torch.randn(batch, 1, CURVE_POINTS, generator=generator)
    gain_db = F.interpolate(curve, bins, mode="linear", align_corners=True)[:, 0]
    gain_db = gain_db + strength * LEVEL_DB * (2 * uniform(batch, 1) - 1)
    first = (uniform(batch, 1) * bins).long()
    at = torch.arange(bins)[None]
    lost = (at >= first) & (at < first + LOST_BINS) & (uniform(batch, 1) < strength * LOST_SHARE)
    gain = (gain_db * LOG_OF_DB).exp() * (~lost)
    power = power * gain.to(mel.device).view(*lead, bins, 1)

    # the unsteadiness of a throat, which synthetic voices lack: gains that wander over time, each band its own
    turns = -(-mel.shape[-1] // WOBBLE_FRAMES) + 1
    wobble = (
        WOBBLE_DB * uniform(batch, 1, 1, 1) * torch.randn(batch, 1, CURVE_POINTS, turns, generator=generator)
    )
    wander_db = F.interpolate(strength * wobble, (bins, mel.shape[-1]), mode="bilinear", align_corners=True)
    power = power * (wander_db * LOG_OF_DB).exp().view(*lead, bins, mel.shape[-1]).to(mel.device)

    # stationary noise: exponential power in each bin, of a smooth random colour
    colour = F.interpolate(
        CURVE_DB * torch.randn(batch, 1, CURVE_POINTS, generator=generator),
        bins,
        mode="linear",
        align_corners=True,
    )[:, 0]
    low_db, high_db = NOISE_BELOW_DB
    below_db = low_db + (high_db - low_db) * uniform(batch, 1)
    level = ((colour - below_db) * LOG_OF_DB).exp() * (uniform(batch, 1) < strength * NOISE_SHARE)
    mean = power.flatten(1).mean(1).view(*lead, 1, 1)
    noise = -torch.log(uniform(*mel.shape).clamp(min=1e-6)).to(mel.device)
    power = power + noise * mean * level.to(mel.device).view(*lead, bins, 1)

    plain = (uniform(batch) < PLAIN_SHARE).to(mel.device).view(*lead, 1, 1)
    return torch.where(plain, mel, torch.log1p(power))
