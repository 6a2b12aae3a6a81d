"""Graphs to count that nobody has exported: other settings of a preset, with random weights and no certificate."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.budget_model import Setup
from streamtalk_export.checkpoint import random_model
from streamtalk_export.cli import BUNDLED
from streamtalk_export.config import load_config
from streamtalk_export.graphs import (
    ConditionPredictor,
    FoldedHead,
    Frame,
    NewestFrameDecoder,
    UnrolledHead,
    diffusion_head,
)
from streamtalk_export.hubert import HubertEncoder, hubert_config
from streamtalk_export.onnx_file import write_graph
from streamtalk_export.sampler import sampler_table
from streamtalk_export.windows import StreamingEncoder, audio_window

Say = Callable[[str], None]
FRAME = "audio_feature noise style position valid_frames valid_latents template kv_cache latents active"
PREDICTOR = "audio_feature previous_latent style position kv_cache valid_frames"


class Tracer:
    """Writes the graphs of a preset, or of a YAML file in the release's schema, to `directory`.

    Raises ExportError for a configuration that does not work.
    """

    def __init__(self, config: str, directory: Path, say: Say = lambda _: None) -> None:
        self._config = load_config(BUNDLED / "config.yaml" if config == "bundled" else config)
        self._directory = directory
        self._say = say
        hubert = hubert_config(None) if self._config.audio.kind == "hubert" else None
        self._model = random_model(self._config, hubert, 1)
        if isinstance(self._model.audio_encoder, HubertEncoder):
            self._model.audio_encoder.fuse_weight_norm()
        self.encoder = lru_cache(maxsize=None)(self._encoder)
        self.frame = lru_cache(maxsize=None)(self._frame)

    @property
    def name(self) -> str:
        return self._config.name

    @property
    def default(self) -> Setup:
        """What export.py would take."""
        stream, window = self._config.stream, self._config.window_size
        return Setup(stream.hop or 4, window, stream.decode_window or window, 1)

    def _encoder(self, hop: int, batch: int = 1) -> Path:
        """`audio_encoder.onnx` for a hop."""
        config, encoder = self._config, self._model.audio_encoder
        window = audio_window(config, encoder, hop, config.stream.context_s, config.stream.lookahead_ms)
        module = StreamingEncoder(encoder, window, config.audio.level_floor)
        path = self._path(f"audio_encoder-{hop}-{batch}")
        write_graph(module, {"pcm": torch.zeros(batch, window.window_samples)}, ("audio_features",), path)
        return path

    def _frame(self, history: int, decode_window: int, batch: int = 1) -> Path:
        """`frame.onnx` for a history and a decode window."""
        predictor, head, decoder = self._modules(history, decode_window, batch)
        outputs = ("vertices", "kv_cache_out", "latents_out")
        path = self._path(f"frame-{history}-{decode_window}-{batch}")
        write_graph(
            Frame(predictor, head, decoder), self._inputs(FRAME, history, decode_window, batch), outputs, path
        )
        return path

    def stages(self, history: int, decode_window: int) -> dict[str, Path]:
        """The three graphs that `frame.onnx` is made of."""
        predictor, head, decoder = self._modules(history, decode_window, 1)
        parts: dict[str, tuple[torch.nn.Module, str, tuple[str, ...]]] = {
            "condition_predictor": (predictor, PREDICTOR, ("condition", "kv_cache_out")),
            "diffusion_head": (head, "noise condition", ("latent",)),
            "vq_decoder": (decoder, "latents valid_latents template", ("vertices",)),
        }
        paths = {}
        for name, (module, inputs, outputs) in parts.items():
            paths[name] = self._path(name)
            write_graph(module, self._inputs(inputs, history, decode_window, 1), outputs, paths[name])
        return paths

    def _modules(
        self, history: int, decode_window: int, batch: int
    ) -> tuple[ConditionPredictor, FoldedHead | UnrolledHead, NewestFrameDecoder]:
        config, network = self._config, self._model.diff_ar_network
        table = sampler_table(config.schedule, config.steps, config.sampler)
        head = diffusion_head(network, table, config.predictor.head == "linear")
        decoder = NewestFrameDecoder(self._model.autoencoder.decoder, decode_window, batch)
        return ConditionPredictor(network, history), head, decoder

    def _inputs(self, names: str, history: int, decode_window: int, batch: int) -> dict[str, torch.Tensor]:
        """Examples of the named inputs, in that order."""
        p, zeros = self._config.predictor, torch.zeros
        counter = torch.ones(batch, dtype=torch.int64)
        examples = {
            "audio_feature": zeros(batch, p.audio_encode_dim),
            "noise": zeros(batch, p.vq_dim),
            "condition": zeros(batch, p.latent_dim),
            "previous_latent": zeros(batch, p.vq_dim),
            "style": zeros(batch, p.latent_dim),
            "position": counter,
            "valid_frames": counter,
            "valid_latents": counter,
            "template": zeros(batch, self._config.vq.n_vert),
            "kv_cache": zeros(batch, p.num_layers, 2, p.n_heads, history, p.latent_dim // p.n_heads),
            "latents": zeros(batch, decode_window, p.vq_dim),
            "active": torch.ones(batch, dtype=torch.bool),
        }
        return {name: examples[name] for name in names.split()}

    def _path(self, name: str) -> Path:
        self._say(f"{self.name}: {name}")
        return self._directory / f"{name}.onnx"
