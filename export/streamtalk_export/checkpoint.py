"""Checkpoints in, strictly and safely: every key is used or named here, and no pickle runs code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import HubertConfig

from streamtalk_export.config import ModelConfig
from streamtalk_export.errors import ExportError
from streamtalk_export.model import TalkerModel

# Position tables are computed, and the mask embedding serves HuBERT's pre-training alone.
IGNORED = frozenset(
    {
        "diff_ar_network.PPE.pe",
        "autoencoder.encoder.encoder_pos_embedding.pe",
        "autoencoder.decoder.decoder_pos_embedding.pe",
        "audio_encoder.masked_spec_embed",
    }
)
# The two spellings of the weight norm of HuBERT's positional convolution.
_WEIGHT_NORM = {
    "pos_conv_embed.conv.weight_g": "pos_conv_embed.conv.parametrizations.weight.original0",
    "pos_conv_embed.conv.weight_v": "pos_conv_embed.conv.parametrizations.weight.original1",
}


class CheckpointError(ExportError):
    """A checkpoint that is unreadable, unsafe, or not of this model."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or a PyTorch checkpoint (`weights_only`). Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"No checkpoint at {path}.")
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or its pickle asks for more than tensors. "
            "A pickle can run code. Convert it to .safetensors where it came from."
        ) from error
    except Exception as error:  # a damaged file raises whatever its bytes happen to spell
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds {type(state).__name__}; expected a state dict.")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    odd = sorted(str(key) for key, value in state.items() if not isinstance(value, Tensor))
    if odd:
        raise CheckpointError(f"{path} holds more than tensors: {_listed(odd)}.")
    return tensors


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _renamed(key: str) -> str:
    for old, new in _WEIGHT_NORM.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def load_state(model: TalkerModel, state: Mapping[str, Tensor], source: str) -> None:
    """Load a release-style state dict, all of it. Raises CheckpointError listing what does not fit."""
    given = {_renamed(key): value for key, value in state.items() if key not in IGNORED}
    expected = {
        f"{prefix}.{name}": tensor
        for prefix, module in model.parts().items()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if f"{prefix}.{name}" not in IGNORED
    }
    problems = []
    if missing := sorted(expected.keys() - given.keys()):
        problems.append(f"missing keys: {_listed(missing)}")
    if unused := sorted(given.keys() - expected.keys()):
        problems.append(f"unknown keys: {_listed(unused)}")
    shared = sorted(expected.keys() & given.keys())
    if wrong := [
        f"{key} is {list(given[key].shape)}, expected {list(expected[key].shape)}"
        for key in shared
        if given[key].shape != expected[key].shape
    ]:
        problems.append(f"wrong shapes: {_listed(wrong)}")
    if broken := [key for key in shared if not bool(torch.isfinite(given[key]).all())]:
        problems.append(f"values that are not finite: {_listed(broken)}")
    if problems:
        raise CheckpointError(
            f"{source} does not fit this configuration; " + "; ".join(problems) + ". Check --config."
        )
    with torch.no_grad():
        for key in shared:
            expected[key].copy_(given[key])


def load_model(config: ModelConfig, hubert: HubertConfig | None, path: Path) -> TalkerModel:
    """The model in evaluation mode with the weights of `path`. Raises CheckpointError."""
    state = read_state(path)
    linear = any("decoder_linear_embedding_pre" in key for key in state)
    config = msgspec.structs.replace(config, vq=msgspec.structs.replace(config.vq, latent_linear=linear))
    model = TalkerModel(config, hubert).eval().requires_grad_(False)
    load_state(model, state, str(path))
    return model


def random_model(config: ModelConfig, hubert: HubertConfig | None, seed: int) -> TalkerModel:
    """The model with seeded random weights: for benchmarks without a checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TalkerModel(config, hubert).eval().requires_grad_(False)
