"""The parity certificate: exported graphs, run by onnxruntime, against the torch model.

Each graph is driven the way the runtime drives it, over consecutive frames, and every frame counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from streamtalk.manifest import Manifest, Parity
from streamtalk_export.blendshapes import WeightMatrix
from streamtalk_export.config import SAMPLE_RATE
from streamtalk_export.hubert import HubertEncoder
from streamtalk_export.model import TalkerModel, stream_frames
from streamtalk_export.sampler import SamplerTable
from streamtalk_export.windows import AudioWindow, StreamingEncoder

Array = npt.NDArray[Any]

STAGE_BOUND = 2e-5
"""Largest error of conditions, latents and vertices, relative to the reference's peak where that passes 1."""
FEATURE_BOUND = 1e-4
"""The same for audio features, which pass through many more layers."""
MAX_FRAMES = 80
FRAMES_AFTER_FILLING = 8
"""Frames certified beyond the point where history and decode window are full and begin to forget."""
PROBE_SECONDS = 4


@dataclass(frozen=True)
class Probe:
    """Input that exercises a model: pcm [n], noise [L, C], speaker, template [3V].

    The audio is longer than `PROBE_SECONDS` by a window: silence would be encoded as rounding noise where
    a normalisation follows zeros, and two correct implementations would disagree.
    """

    pcm: Array
    noise: Array
    speaker: int
    template: Array


def probe_audio(seconds: float) -> Array:
    """Voiced bursts with moving formants and pauses, [n] float32 at 16 kHz; the same everywhere."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t)) / SAMPLE_RATE
    harmonics = np.arange(1, 25)[:, None]
    formant = 900 + 600 * np.sin(2 * np.pi * 2.3 * t)
    weight = np.exp(-(((harmonics * 130 - formant) / 500) ** 2)) + 0.1 / harmonics
    voice = (weight * np.sin(harmonics * pitch)).sum(0)
    envelope = np.clip(np.sin(2 * np.pi * 3.1 * t) + 0.4, 0, 1) * (np.sin(2 * np.pi * 0.45 * t) > -0.8)
    return (0.1 * envelope * voice + 1e-4 * np.sin(2 * np.pi * 3333 * t)).astype(np.float32)


class _Graphs:
    """Sessions of a model directory, addressed by graph name."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._sessions: dict[str, Any] = {}
        self._directory, self._manifest, self._options = directory, manifest, options

    def run(self, name: str, **inputs: Array) -> list[Array]:
        """Outputs of the first slot; every slot gets the same inputs, given without the batch axis."""
        graph = self._manifest.graphs[name]
        if name not in self._sessions:
            self._sessions[name] = onnxruntime.InferenceSession(
                str(self._directory / graph.file), self._options, providers=["CPUExecutionProvider"]
            )
        batch = int(graph.inputs[0].shape[0])
        batched = {
            key: np.ascontiguousarray(np.broadcast_to(value, (batch, *value.shape)))
            for key, value in inputs.items()
        }
        return [out[0] for out in self._sessions[name].run(None, batched)]

    def close(self, name: str) -> None:
        """Let a session's memory go: full-size graphs are large."""
        self._sessions.pop(name, None)


def _line(
    subject: str, quantity: str, frames: int, error: float, peak: float | None, bound: float = STAGE_BOUND
) -> Parity:
    limit = None if peak is None else bound * max(1.0, peak)
    return Parity(subject=subject, quantity=quantity, frames=frames, measured=error, bound=limit)


class _Error:
    """Running maximum of an absolute error and of the reference's size."""

    def __init__(self) -> None:
        self.error, self.peak, self.count = 0.0, 0.0, 0

    def add(self, got: Array, want: Array) -> None:
        difference = float(np.abs(got.astype(np.float64) - want).max())
        # max() would drop a NaN.
        self.error = difference if not difference <= self.error else self.error
        self.peak = max(self.peak, float(np.abs(want).max()))
        self.count += 1

    def line(self, subject: str, quantity: str = "max_abs_error") -> Parity:
        return _line(subject, quantity, self.count, self.error, self.peak)


class _Stream:
    """The state that the runtime keeps for a stream, for driving graphs frame by frame."""

    def __init__(self, manifest: Manifest, start_latent: Array) -> None:
        m = self.manifest = manifest
        self.cache = np.zeros(
            (m.layers, 2, m.heads, m.history, m.condition_width // m.heads), dtype=np.float32
        )
        self.latents = np.zeros((m.decode_window, m.latent_width), dtype=np.float32)
        self.latents[-1] = start_latent
        self.frame = 0

    def counters(self) -> dict[str, Array]:
        m, i = self.manifest, self.frame
        return {
            "position": np.array(i % m.period),
            "valid_frames": np.array(min(i, m.history)),
            "valid_latents": np.array(min(i + 1, m.decode_window)),
        }


def certify(
    directory: Path,
    manifest: Manifest,
    model: TalkerModel,
    table: SamplerTable,
    window: AudioWindow,
    probe: Probe,
    weights: WeightMatrix | None,
) -> list[Parity]:
    """Measure every graph of `directory` against `model`, and state what the blendshapes leave out. The caller
    decides what a missed bound means.
    """
    graphs = _Graphs(directory, manifest)
    features, lines = _certify_encoders(graphs, manifest, model, window, probe)
    lines += _certify_frames(graphs, manifest, model, table, features["offline"], probe)
    moved = {kind: _moved(graphs, manifest, model, values, probe) for kind, values in features.items()}
    graphs.close("frame")
    lines += _streaming_cost(moved, manifest.metres_per_unit)
    if weights is not None:
        lines += weights.error(moved["streaming"] - probe.template.reshape(-1, 3), manifest.metres_per_unit)
    return lines


def _certify_encoders(
    graphs: _Graphs, manifest: Manifest, model: TalkerModel, window: AudioWindow, probe: Probe
) -> tuple[dict[str, Array], list[Parity]]:
    clip = probe.pcm[: PROBE_SECONDS * SAMPLE_RATE]
    reference = model.offline_features(torch.from_numpy(clip)).numpy()
    (offline,) = graphs.run("audio_encoder_offline", pcm=clip)
    graphs.close("audio_encoder_offline")
    streaming_module = StreamingEncoder(model.audio_encoder, window, manifest.level_floor).eval()
    frames = len(clip) * manifest.fps // SAMPLE_RATE
    padded = np.pad(probe.pcm, (window.context_samples, 0))
    streamed, worst = [], _Error()
    for first in range(0, frames, manifest.hop):
        start = round(first * SAMPLE_RATE / manifest.fps)
        pcm = padded[start : start + window.window_samples]
        (got,) = graphs.run("audio_encoder", pcm=pcm)
        with torch.no_grad():
            worst.add(got, streaming_module(torch.from_numpy(pcm[None]))[0].numpy())
        streamed.append(got)
    graphs.close("audio_encoder")
    lines = [
        _line(
            "audio_encoder_offline",
            "max_abs_error",
            len(offline),
            float(np.abs(offline - reference).max()),
            float(np.abs(reference).max()),
            FEATURE_BOUND,
        ),
        _line("audio_encoder", "max_abs_error", worst.count, worst.error, worst.peak, FEATURE_BOUND),
    ]
    if isinstance(model.audio_encoder, HubertEncoder):
        encoder = model.audio_encoder
        hf = encoder.hubert(_normalised(clip)).last_hidden_state
        own = encoder(torch.from_numpy(clip[None]))
        lines.append(
            _line(
                "audio_encoder",
                "max_abs_error_of_torch_against_transformers",
                own.shape[1],
                float((hf - own).abs().max()),
                float(hf.abs().max()),
                FEATURE_BOUND,
            )
        )
    return {"offline": offline, "streaming": np.concatenate(streamed)[:frames]}, lines


def _normalised(pcm: Array) -> torch.Tensor:
    x = torch.from_numpy(pcm[None])
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-7)


def _certify_frames(
    graphs: _Graphs,
    manifest: Manifest,
    model: TalkerModel,
    table: SamplerTable,
    features: Array,
    probe: Probe,
) -> list[Parity]:
    """Stages and the fused graph against the model, which recomputes every frame from scratch."""
    filled = max(manifest.history, manifest.decode_window)
    count = min(MAX_FRAMES, filled + FRAMES_AFTER_FILLING, len(features))
    reference = stream_frames(
        model,
        torch.from_numpy(features[:count]),
        torch.from_numpy(probe.noise),
        probe.speaker,
        table,
        manifest.history,
        manifest.decode_window,
    )
    style = model.diff_ar_network.obj_vector.weight[probe.speaker].numpy()
    start = model.autoencoder.start_latent().numpy()
    by_stage, fused = _Stream(manifest, start), _Stream(manifest, start)
    errors = {
        name: _Error() for name in ("condition_predictor", "diffusion_head", "vq_decoder", "frame", "state")
    }
    for i, (condition_t, latent_t, offsets_t) in enumerate(reference):
        condition, latent, offsets = condition_t.numpy(), latent_t.numpy(), offsets_t.numpy()
        want = (probe.template + offsets).reshape(-1, 3)
        counters = by_stage.counters()
        got_condition, by_stage.cache = graphs.run(
            "condition_predictor",
            audio_feature=features[i],
            previous_latent=by_stage.latents[-1],
            style=style,
            kv_cache=by_stage.cache,
            position=counters["position"],
            valid_frames=counters["valid_frames"],
        )
        (got_latent,) = graphs.run("diffusion_head", noise=probe.noise[i], condition=got_condition)
        by_stage.latents = np.concatenate([by_stage.latents[1:], got_latent[None]])
        (got_vertices,) = graphs.run(
            "vq_decoder",
            latents=by_stage.latents,
            valid_latents=np.array(min(i + 2, manifest.decode_window)),
            template=probe.template,
        )
        vertices = _next_frame(graphs, fused, features[i], style, probe)
        errors["condition_predictor"].add(got_condition, condition)
        errors["diffusion_head"].add(got_latent, latent)
        errors["vq_decoder"].add(got_vertices, want)
        errors["frame"].add(vertices, want)
        by_stage.frame += 1
    # After the last frame the fused state must be the one that the stages kept.
    errors["state"].add(fused.cache, by_stage.cache)
    errors["state"].add(fused.latents, by_stage.latents)
    for name in ("condition_predictor", "diffusion_head", "vq_decoder"):
        graphs.close(name)
    lines = [error.line(name) for name, error in errors.items() if name != "state"]
    return [*lines, errors["state"].line("frame", "max_abs_error_of_final_state")]


def _next_frame(graphs: _Graphs, stream: _Stream, feature: Array, style: Array, probe: Probe) -> Array:
    """Run the fused graph for the stream's next frame: vertices [V, 3]."""
    vertices, stream.cache, stream.latents = graphs.run(
        "frame",
        audio_feature=feature,
        noise=probe.noise[stream.frame],
        style=style,
        template=probe.template,
        kv_cache=stream.cache,
        latents=stream.latents,
        active=np.array(True),
        **stream.counters(),
    )
    stream.frame += 1
    return vertices


def _moved(
    graphs: _Graphs, manifest: Manifest, model: TalkerModel, features: Array, probe: Probe
) -> npt.NDArray[np.float64]:
    """Vertices [L, V, 3] of the probe's stream, driven by the fused graph."""
    style = model.diff_ar_network.obj_vector.weight[probe.speaker].numpy()
    stream = _Stream(manifest, model.autoencoder.start_latent().numpy())
    driven = features[: len(probe.noise)]
    frames = [_next_frame(graphs, stream, feature, style, probe) for feature in driven]
    return np.stack(frames).astype(np.float64)


def _streaming_cost(moved: dict[str, npt.NDArray[np.float64]], metres_per_unit: float) -> list[Parity]:
    """How far vertices driven by streaming features are from those driven by offline ones. Stated, not gated."""
    count = min(map(len, moved.values()))
    streaming, offline = (1000 * metres_per_unit * moved[kind][:count] for kind in ("streaming", "offline"))
    difference = np.linalg.norm(streaming - offline, axis=-1)
    motion = np.linalg.norm(offline - offline.mean(0), axis=-1)
    rms = float(np.sqrt((motion**2).mean()))
    figures = {
        "streaming_vs_offline_features_rms_mm": float(np.sqrt((difference**2).mean())),
        "streaming_vs_offline_features_p99_mm": float(np.quantile(difference, 0.99)),
        "rms_motion_mm": rms,
    }
    return [_line("frame", name, count, value, None) for name, value in figures.items()]
