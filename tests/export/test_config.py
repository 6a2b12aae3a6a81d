from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamtalk_export.config import PRESETS, SPEAKERS, ConfigError, load_config, parse_config
from tests.export.golden import DATA

# The presets in the release's own schema, with the sections around the model that must be ignored.
RELEASE = """
NAME: diff_ar_vocaset
LOGGER: {TENSORBOARD: true}
DATASET: {NAME: vocaset, DATA_ROOT: ./data}
TRAIN: {OPTIMIZER: {LR: 1e-4}}
MODEL:
  TYPE: diff_ar
  finetune_dec: False
  window_size: 60
  AUDIO_ENCODER: {audio_fps: 50, hidden_fps: 30, freeze: False, model_name_or_path: facebook/hubert-base-ls960}
  DIFF_AR_DEC: {vq_dim: 1024, latent_dim: 768, audio_encode_dim: 768, period: 30, n_heads: 4, max_seq_len: 2000,
    id_dim: 8, feedforward_dim: 1024, num_layers: 2, dropout: 0.2}
  VAE: {pretrained: ./x.ckpt, n_vert: 15069, n_embed: 256, zquant_dim: 64, hidden_size: 1024, num_hidden_layers: 6,
    num_attention_heads: 8, intermediate_size: 1536, window_size: 1, quant_factor: 0, face_quan_num: 16, neg: 0.2,
    INaffine: False}
  SCHEDULER: {num_train_timesteps: 1000, beta_start: 0.00085, beta_end: 0.012, beta_schedule: scaled_linear,
    clip_sample: false, prediction_type: sample, set_alpha_to_one: false, steps_offset: 1}
  num_inference_timesteps: 50
  eta: 0.0
  NOISE_SCHEDULER: {variance_type: fixed_small}
"""


def release() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(RELEASE)
    return document


def test_release_file_is_the_preset() -> None:
    assert parse_config(release(), "x") == PRESETS["vocaset"]


def test_presets_have_names_for_their_speakers() -> None:
    for name, preset in PRESETS.items():
        assert len(SPEAKERS[name]) == preset.predictor.id_dim


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("VAE.surprise", 1, "unknown field `surprise`.*MODEL.VAE"),
        ("VAE.n_vert", "many", "Expected `int`, got `str`.*MODEL.VAE.n_vert"),
        ("VAE.n_vert", 15070, "no multiple of 3"),
        ("VAE.quant_factor", 1, "only 0 is supported"),
        ("VAE.INaffine", True, "only False is supported"),
        ("VAE.face_quan_num", 8, "face_quan_num \\* zquant_dim = 512"),
        ("DIFF_AR_DEC.activation", "tanh", "Invalid enum value 'tanh'"),
        ("DIFF_AR_DEC.n_heads", 5, "must divide by n_heads 5"),
        ("DIFF_AR_DEC.noise_from", 2000, "noise_from 2000 must not pass vq_dim"),
        ("DIFF_AR_DEC.noise_from", -1, "Expected `int` >= 0"),
        ("SCHEDULER.prediction_type", "epsilon", "only 'sample' is supported"),
        ("AUDIO_ENCODER.audio_fps", 100, "only 50 is supported"),
        ("AUDIO_ENCODER.hidden_fps", 0, "Expected `int` >= 1"),
        ("eta", 0.5, "only 0 is supported"),
        ("window_size", None, "window_size"),
        ("whatever", 3, "MODEL.whatever is unknown"),
    ],
)
def test_refusals(path: str, value: object, sentence: str) -> None:
    document = copy.deepcopy(release())
    *parents, key = path.split(".")
    section = document["MODEL"]
    for parent in parents:
        section = section[parent]
    section[key] = value
    with pytest.raises(ConfigError, match=sentence):
        parse_config(document, "x")


@pytest.mark.parametrize("section", ["AUDIO_ENCODER", "DIFF_AR_DEC", "VAE"])
def test_missing_sections_are_named(section: str) -> None:
    document = release()
    del document["MODEL"][section]
    with pytest.raises(ConfigError):
        parse_config(document, "x")


def test_unreadable_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("MODEL: [")
    for source, sentence in [
        (tmp_path / "none.yaml", "neither a file nor a preset"),
        (bad, "not readable YAML"),
        (DATA / "vocaset_small" / "golden.npz", "not readable YAML"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            load_config(source)


def test_biwi_has_linear_maps_whatever_the_sizes() -> None:
    """The release decides by the data set's name; at BIWI's real size latent and hidden width are equal."""
    assert PRESETS["biwi"].vq.latent_width == PRESETS["biwi"].vq.hidden_size
    assert PRESETS["biwi"].vq.has_latent_linear
    assert not PRESETS["vocaset"].vq.has_latent_linear
    document = release()
    document["DATASET"]["NAME"] = "biwi"
    assert parse_config(document, "x").vq.has_latent_linear
