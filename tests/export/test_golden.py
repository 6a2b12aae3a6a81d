"""The torch model against every golden array."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamtalk_export.config import Sampler
from streamtalk_export.model import collected, generate_offline, stream_frames, window_frames
from streamtalk_export.sampler import sampler_table
from tests.export.golden import Array, Golden

TOLERANCE = 1e-4
"""The issue's bound in float32; measured errors are below 1e-5."""

GOLDEN_STEPS = 50
COVERED = {
    *("pcm", "noise", "speaker", "template", "motion"),  # inputs
    *("hubert", "features_offline", "start_latent"),
    *("motion_indices", "motion_latents", "motion_emb_loss", "motion_decoded"),
    *(f"grow_{s}_{x}" for s in ("ddim", "ddim_legacy") for x in ("conditions", "latents", "vertices")),
    *(f"window_{s}_{x}" for s in ("ddim", "ddim_legacy") for x in ("latents", "vertices")),
    *(f"eval_{s}_{x}" for s in ("ddim", "ddim_legacy") for x in ("noise", "latents", "vertices")),
}


def close(got: torch.Tensor | None, want: Array) -> None:
    assert got is not None
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=TOLERANCE, strict=True)


def test_every_array_is_covered(golden: Golden) -> None:
    assert set(golden.arrays) == COVERED


def test_audio_features(golden: Golden) -> None:
    pcm = torch.from_numpy(golden["pcm"])
    with torch.no_grad():
        close(golden.model.audio_encoder(pcm[None])[0], golden["hubert"])
    close(golden.model.offline_features(pcm), golden["features_offline"])


def test_hubert_is_transformers_own(golden: Golden) -> None:
    pcm = golden["pcm"]
    normalised = (pcm - pcm.mean()) / np.sqrt(pcm.var() + 1e-7)
    with torch.no_grad():
        hubert = golden.model.parts()["audio_encoder"]
        close(hubert(torch.from_numpy(normalised[None])).last_hidden_state[0], golden["hubert"])


@torch.no_grad()
def test_vq_round_trip(golden: Golden) -> None:
    autoencoder = golden.model.autoencoder
    latents, indices, loss = autoencoder.encode(torch.from_numpy(golden["motion"][None]))
    assert np.array_equal(indices[0].numpy(), golden["motion_indices"])
    close(latents[0], golden["motion_latents"])
    close(loss, golden["motion_emb_loss"])
    close(autoencoder.decoder(latents)[0], golden["motion_decoded"])
    close(autoencoder.start_latent(), golden["start_latent"])


@pytest.mark.parametrize("sampler", ["ddim", "ddim_legacy"])
@pytest.mark.parametrize("way", ["grow", "window", "eval"])
def test_generation(golden: Golden, way: str, sampler: Sampler) -> None:
    table = sampler_table(golden.config.schedule, GOLDEN_STEPS, sampler)
    features, template = (torch.from_numpy(golden[key]) for key in ("features_offline", "template"))
    speaker, window = int(golden["speaker"]), golden.config.window_size
    prefix = f"{way}_{sampler}"
    noise = torch.from_numpy(golden["noise" if way != "eval" else f"{prefix}_noise"])
    if way == "eval":
        got = generate_offline(golden.model, features, noise, speaker, table, template, window)
    elif way == "window":
        got = collected(window_frames(golden.model, features, noise, speaker, table, window), template)
    else:
        got = collected(stream_frames(golden.model, features, noise, speaker, table), template)
    close(got.latents, golden[f"{prefix}_latents"])
    close(got.vertices, golden[f"{prefix}_vertices"])
    if way == "grow":
        close(got.conditions, golden[f"{prefix}_conditions"])
