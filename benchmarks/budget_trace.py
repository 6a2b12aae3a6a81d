"""Graphs to count that nobody has exported: other settings of a preset, with random weights and no certificate."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import torch

from benchmarks.budget_model import Setup
from streamtalk_export.checkpoint import random_model
from streamtalk_export.cli import BUNDLED
from streamtalk_export.config import load_config
from streamtalk_export.graph_files import trace
from streamtalk_export.graphs import ConditionPredictor, DecoderStage, Hop, NewestFrameDecoder, diffusion_head
from streamtalk_export.hubert import HubertEncoder, hubert_config
from streamtalk_export.sampler import sampler_table
from streamtalk_export.windows import StreamingEncoder, audio_window

Say = Callable[[str], None]
HOP = "pcm noise style template position valid_frames valid_latents kv_cache latents active"
PREDICTOR = "audio_feature previous_latent style position kv_cache valid_frames"


class Tracer:
    """Traces the graphs of a preset, or of a YAML file in the release's schema.

    Raises ExportError for a configuration that does not work.
    """

    def __init__(self, config: str, say: Say = lambda _: None) -> None:
        self._config = load_config(BUNDLED / "config.yaml" if config == "bundled" else config)
        self._say = say
        hubert = hubert_config(None) if self._config.audio.kind == "hubert" else None
        self._model = random_model(self._config, hubert, 1)
        if isinstance(self._model.audio_encoder, HubertEncoder):
            self._model.audio_encoder.fuse()
        table = sampler_table(self._config.schedule, self._config.steps, self._config.sampler)
        self._head = diffusion_head(
            self._model.diff_ar_network, table, self._config.predictor.head == "linear"
        )

    @property
    def name(self) -> str:
        return self._config.name

    @property
    def default(self) -> Setup:
        """What export.py would take."""
        stream, window = self._config.stream, self._config.window_size
        return Setup(stream.hop or 4, window, stream.decode_window or window, 1)

    def hop(self, setup: Setup) -> onnx.ModelProto:
        """`hop.onnx` of a setup, or `hop_bN.onnx`."""
        self._say(f"{self.name}: {setup.label}")
        encoder, inputs = self._encoder(setup)
        predictor = ConditionPredictor(self._model.diff_ar_network, setup.history, setup.hop)
        decoder = NewestFrameDecoder(
            self._model.autoencoder.decoder, setup.decode_window, setup.batch, setup.hop
        )
        module = Hop(encoder, predictor, self._head, decoder)
        outputs = ("vertices", "kv_cache_out", "latents_out")
        return trace(module, {name: inputs[name] for name in HOP.split()}, outputs, "hop")

    def stages(self, setup: Setup) -> dict[str, onnx.ModelProto]:
        """The four graphs of one row that `hop.onnx` is made of: the encoder for a hop, the others for a frame."""
        encoder, inputs = self._encoder(setup)
        decoder = NewestFrameDecoder(self._model.autoencoder.decoder, setup.decode_window, 1)
        predictor = ConditionPredictor(self._model.diff_ar_network, setup.history)
        parts: dict[str, tuple[torch.nn.Module, str, tuple[str, ...]]] = {
            "audio_encoder": (encoder, "pcm", ("audio_features",)),
            "condition_predictor": (predictor, PREDICTOR, ("condition", "kv_cache_out")),
            "diffusion_head": (self._head, "latent_noise style", ("latent",)),
            "vq_decoder": (DecoderStage(decoder), "latents valid_latents template", ("vertices",)),
        }
        return {
            stage: trace(module, {name: inputs[name] for name in names.split()}, outputs, stage)
            for stage, (module, names, outputs) in parts.items()
        }

    def _encoder(self, setup: Setup) -> tuple[StreamingEncoder, dict[str, torch.Tensor]]:
        """The audio encoder for a hop, and examples of the inputs of all graphs."""
        config, encoder = self._config, self._model.audio_encoder
        clock = audio_window(config, encoder, setup.hop, config.stream.context_s, config.stream.lookahead_ms)
        B, p, zeros = setup.batch, config.predictor, torch.zeros
        count = torch.ones(B, dtype=torch.int64)
        inputs = {
            "pcm": zeros(B, clock.window_samples),
            "noise": zeros(B, setup.hop, p.vq_dim),
            "style": zeros(B, p.latent_dim),
            "template": zeros(B, config.vq.n_vert),
            "position": count,
            "valid_frames": count,
            "valid_latents": count,
            "kv_cache": zeros(B, p.num_layers, 2, p.n_heads, setup.history, p.latent_dim // p.n_heads),
            "latents": zeros(B, setup.decode_window, p.vq_dim),
            "active": torch.ones(B, dtype=torch.bool),
            "audio_feature": zeros(B, p.audio_encode_dim),
            "previous_latent": zeros(B, p.vq_dim),
            "latent_noise": zeros(B, p.vq_dim),
        }
        return StreamingEncoder(encoder, clock, config.audio.level_floor), inputs
