"""What the certificate judges in a closed loop, and what frame by frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk.manifest import Parity
from streamtalk_export import export_model as exporter
from streamtalk_export.checkpoint import random_model
from streamtalk_export.config import load_config
from streamtalk_export.drive import Graphs
from streamtalk_export.export_model import Identities, Settings
from streamtalk_export.templates import Mesh

CONFIG = """
DATASET: {NAME: small}
MODEL:
  AUDIO_ENCODER: {type: mel, hidden_fps: 30, mel_bins: 8, width: 16, dilations: [1, 2], lookahead_ms: 40,
    level_floor: 0.001}
  DIFF_AR_DEC: {vq_dim: 16, latent_dim: 24, audio_encode_dim: 16, feedforward_dim: 20, period: 30, n_heads: 2,
    num_layers: 2, dropout: 0.0, activation: gelu, head: HEAD, num_res_blocks: 1, id_dim: 1}
  VAE: {n_embed: 16, zquant_dim: 4, face_quan_num: 4, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
    intermediate_size: 40, instance_norm: false, n_vert: 30}
  STREAM: {hop: 1, decode_window: 6}
  num_inference_timesteps: 2
  window_size: 5
  sampler: ddim
"""
OFF = 0.1
"""What a graph of the head that is wrong may be off."""


def certificate(head: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Parity]:
    """The largest errors of a small talker whose exported head is `OFF` in every number, by what they are of."""
    right = Graphs.run

    def wrong(graphs: Graphs, name: str, **inputs: Any) -> list[Any]:
        outputs = right(graphs, name, **inputs)
        return [outputs[0] + np.float32(OFF)] if name == "diffusion_head" else outputs

    monkeypatch.setattr(Graphs, "run", wrong)
    judged: list[Parity] = []
    monkeypatch.setattr(exporter, "_enforce", judged.extend)
    file = folder / "config.yaml"
    file.write_text(CONFIG.replace("HEAD", head), encoding="utf-8")
    mesh = Mesh(np.empty((0, 3), np.int32), np.empty((0, 3), np.uint8), {}, None)
    faces = Identities(speaker_names=("a",), templates=np.zeros((1, 10, 3), np.float32), mesh=mesh)
    model = random_model(load_config(file), None, 0)
    exporter.export_model(model, faces, folder / "model", Settings(), "none")
    names = {"max_abs_error": "", "closed_loop_max_abs_error": " in a closed loop"}
    return {line.subject + names[line.quantity]: line for line in judged if line.quantity in names}


def _held(line: Parity) -> bool:
    assert line.bound is not None
    return line.measured <= line.bound


def test_a_head_that_draws_is_judged_from_the_models_own_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a blink hangs by a hair roundings grow from frame to frame, and both streams are right. A head that is
    wrong is still found, by itself."""
    lines = certificate("residual_mlp", tmp_path, monkeypatch)
    assert not _held(lines["diffusion_head"])
    assert lines["diffusion_head"].measured == pytest.approx(OFF, rel=1e-3)
    assert _held(lines["condition_predictor"])
    assert lines["frame in a closed loop"].bound is None


def test_a_folded_head_is_judged_in_a_closed_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = certificate("linear", tmp_path, monkeypatch)
    assert not _held(lines["diffusion_head"])
    assert not _held(lines["condition_predictor"])
    assert "frame in a closed loop" not in lines
