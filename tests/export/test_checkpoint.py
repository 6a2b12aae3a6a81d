"""Strict and safe import, with the failures tried."""

from __future__ import annotations

import io
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from streamtalk_export.checkpoint import CheckpointError, load_model, load_state, random_model, read_state
from streamtalk_export.hubert import hubert_config
from streamtalk_export.model import TalkerModel
from streamtalk_export.vqvae import LinearEmbedding
from tests.export.golden import DATA, load_golden

FOLDER = DATA / "vocaset_small"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return read_state(FOLDER / "checkpoint.ckpt")


@pytest.fixture(scope="module")
def model() -> TalkerModel:
    golden = load_golden("vocaset_small")
    return random_model(golden.config, hubert_config(FOLDER / "hubert_config.json"), 0)


class _Payload:
    """Unpickles into a call that creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("wrapped", [False, True])
def test_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, wrapped: bool) -> None:
    target, path = tmp_path / "owned", tmp_path / "evil.ckpt"
    content = {"state_dict": {"x": _Payload(target)}}
    if wrapped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"refused|not a readable"):
        read_state(path)
    assert not target.exists()
    # The same bytes do run where nobody looks: the attempt was a real one.
    if not wrapped:
        pickle.loads(path.read_bytes())
        assert target.exists()


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    short = tmp_path / "short.ckpt"
    short.write_bytes((FOLDER / "checkpoint.ckpt").read_bytes()[:5000])
    for path, sentence in [(short, "not a readable|refused"), (tmp_path / "none.ckpt", "No checkpoint")]:
        with pytest.raises(CheckpointError, match=sentence):
            read_state(path)


def test_missing_unknown_and_misshapen_keys_are_listed(model: TalkerModel, state: dict[str, Tensor]) -> None:
    broken = dict(state)
    del broken["diff_ar_network.denoiser.0.bias"]
    broken["diff_ar_network.extra"] = torch.zeros(1)
    broken["diff_ar_network.obj_vector.weight"] = torch.zeros(9, 48)
    with pytest.raises(CheckpointError) as caught:
        load_state(model, broken, "x.ckpt")
    text = str(caught.value)
    assert "missing keys: diff_ar_network.denoiser.0.bias" in text
    assert "unknown keys: diff_ar_network.extra" in text
    assert "diff_ar_network.obj_vector.weight is [9, 48], expected [3, 48]" in text


def test_values_that_are_not_finite(model: TalkerModel, state: dict[str, Tensor]) -> None:
    broken = dict(state)
    broken["autoencoder.quantize.embedding.weight"] = torch.full((32, 16), torch.nan)
    with pytest.raises(CheckpointError, match=r"not finite: autoencoder\.quantize\.embedding\.weight"):
        load_state(model, broken, "x.ckpt")


def test_both_spellings_of_the_weight_norm(model: TalkerModel, state: dict[str, Tensor]) -> None:
    prefix = "audio_encoder.encoder.pos_conv_embed.conv"
    old = dict(state)
    old[f"{prefix}.weight_g"] = old.pop(f"{prefix}.parametrizations.weight.original0")
    old[f"{prefix}.weight_v"] = old.pop(f"{prefix}.parametrizations.weight.original1")
    load_state(model, old, "old.ckpt")
    hubert: Any = model.parts()["audio_encoder"]
    conv = hubert.encoder.pos_conv_embed.conv
    norm = old[f"{prefix}.weight_v"].norm(dim=(0, 1), keepdim=True)
    torch.testing.assert_close(conv.weight, old[f"{prefix}.weight_g"] * old[f"{prefix}.weight_v"] / norm)


def test_safetensors_and_plain_state_dicts(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.pt")
    for path in (tmp_path / "m.safetensors", tmp_path / "m.pt"):
        read = read_state(path)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


def test_random_weights_are_seeded_and_leave_the_global_generator_alone() -> None:
    config, hubert = load_golden("vocaset_small").config, hubert_config(FOLDER / "hubert_config.json")
    before = torch.random.get_rng_state()
    a, b, c = (random_model(config, hubert, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["diff_ar_network.denoiser.0.weight"], c["diff_ar_network.denoiser.0.weight"])


def test_linear_maps_follow_the_checkpoint(tmp_path: Path) -> None:
    """C equal to the hidden width, with the maps that BIWI's checkpoints have."""
    config = load_golden("biwi_small").config
    vq = msgspec.structs.replace(config.vq, hidden_size=48, num_attention_heads=6, latent_linear=True)
    config = msgspec.structs.replace(config, vq=vq)
    hubert = hubert_config(DATA / "biwi_small" / "hubert_config.json")
    made = random_model(config, hubert, 5)
    state = {f"{p}.{k}": v for p, module in made.parts().items() for k, v in module.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    unsure = msgspec.structs.replace(config, vq=msgspec.structs.replace(vq, latent_linear=None))
    loaded = load_model(unsure, hubert, tmp_path / "x.ckpt")
    latents = torch.randn(1, 4, 48)
    assert torch.equal(loaded.autoencoder.decoder(latents), made.autoencoder.decoder(latents))
    assert isinstance(loaded.autoencoder.decoder.decoder_linear_embedding_pre, LinearEmbedding)


def test_damaged_checkpoints_are_a_sentence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(8), "b": torch.ones(3)}}, buffer)
    good = buffer.getvalue()
    for _ in range(60):
        damaged = bytearray(good)
        for _ in range(4):
            damaged[rng.integers(len(damaged))] ^= int(rng.integers(1, 256))
        (tmp_path / "x.ckpt").write_bytes(damaged)
        with suppress(CheckpointError):
            read_state(tmp_path / "x.ckpt")
