"""The parity certificate: exported graphs, run by onnxruntime, against the torch model.

Each graph is driven the way the runtime drives it, over consecutive frames, and every frame counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from streamtalk.manifest import Manifest, Parity
from streamtalk_export.blendshapes import WeightMatrix
from streamtalk_export.config import SAMPLE_RATE
from streamtalk_export.drive import Graphs, Probe, Stream, closed_loop, next_frame
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
REBUILT_SECONDS = 20
"""Over which blendshapes are judged: a face that draws its blinks may have none in a few seconds."""


def parity_line(
    subject: str, quantity: str, frames: int, error: float, peak: float | None, bound: float = STAGE_BOUND
) -> Parity:
    """Of the certificate; `bound` is relative to the reference's `peak` where that passes 1, and none without one."""
    limit = None if peak is None else bound * max(1.0, peak)
    return Parity(subject=subject, quantity=quantity, frames=frames, measured=error, bound=limit)


class MaxError:
    """Running maximum of an absolute error and of the reference's size."""

    def __init__(self) -> None:
        self.error, self.peak, self.count = 0.0, 0.0, 0

    def add(self, got: Array, want: Array) -> None:
        """Take in what should be equal."""
        difference = float(np.abs(got.astype(np.float64) - want).max())
        # max() would drop a NaN, of this pair or of one before.
        self.error = float(np.maximum(self.error, difference))
        self.peak = max(self.peak, float(np.abs(want).max()))
        self.count += 1

    def line(self, subject: str, quantity: str = "max_abs_error") -> Parity:
        """Of the certificate, with the bound of a stage."""
        return parity_line(subject, quantity, self.count, self.error, self.peak)


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
    graphs = Graphs(directory, manifest)
    features, lines = _certify_encoders(graphs, manifest, model, window, probe)
    lines += _certify_frames(graphs, manifest, model, table, features["offline"], probe)
    moved = {kind: _moved(graphs, manifest, values, probe) for kind, values in features.items()}
    lines += _streaming_cost(moved, manifest.metres_per_unit)
    if weights is not None:
        lines += weights.error(_long_motion(graphs, manifest, probe), manifest.metres_per_unit)
    graphs.close("frame")
    return lines


def _long_motion(graphs: Graphs, manifest: Manifest, probe: Probe) -> Array:
    """Vertex offsets [L, V, 3] of a stream that talks, and long enough to blink, which is when weights are clipped."""
    identity = {
        "styles": probe.style[None],
        "start_latent": probe.start_latent,
        "templates": probe.template[None],
    }
    long = Probe.make(manifest, REBUILT_SECONDS, identity, speech=True)
    rest = probe.template.reshape(-1, 3)
    return np.stack([vertices - rest for vertices, _ in closed_loop(graphs, manifest, long)])


def _certify_encoders(
    graphs: Graphs, manifest: Manifest, model: TalkerModel, window: AudioWindow, probe: Probe
) -> tuple[dict[str, Array], list[Parity]]:
    clip = probe.pcm[: PROBE_SECONDS * SAMPLE_RATE]
    reference = model.offline_features(torch.from_numpy(clip)).numpy()
    (offline,) = graphs.run("audio_encoder_offline", pcm=clip)
    graphs.close("audio_encoder_offline")
    streaming_module = StreamingEncoder(model.audio_encoder, window, manifest.level_floor).eval()
    frames = len(clip) * manifest.fps // SAMPLE_RATE
    streamed, worst = [], MaxError()
    for pcm in probe.windows(manifest):
        (got,) = graphs.run("audio_encoder", pcm=pcm)
        with torch.no_grad():
            worst.add(got, streaming_module(torch.from_numpy(pcm[None]))[0].numpy())
        streamed.append(got)
    graphs.close("audio_encoder")
    lines = [
        parity_line(
            "audio_encoder_offline",
            "max_abs_error",
            len(offline),
            float(np.abs(offline - reference).max()),
            float(np.abs(reference).max()),
            FEATURE_BOUND,
        ),
        parity_line("audio_encoder", "max_abs_error", worst.count, worst.error, worst.peak, FEATURE_BOUND),
    ]
    if isinstance(model.audio_encoder, HubertEncoder):
        encoder = model.audio_encoder
        hf = encoder.hubert(_normalised(clip)).last_hidden_state
        own = encoder(torch.from_numpy(clip[None]))
        lines.append(
            parity_line(
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
    graphs: Graphs,
    manifest: Manifest,
    model: TalkerModel,
    table: SamplerTable,
    features: Array,
    probe: Probe,
) -> list[Parity]:
    """Stages and the fused graph against the model, which recomputes every frame from scratch.

    A folded head is judged in a closed loop. A nonlinear one may draw events, and while a blink hangs by a hair a
    rounding grows from frame to frame (a trained talker's by 2.7 a frame): its graphs are given the model's own
    latents. What its closed loop came to is told beside them, without a bound.
    """
    filled = max(manifest.history, manifest.decode_window)
    count = min(MAX_FRAMES, filled + FRAMES_AFTER_FILLING, len(features))
    reference = stream_frames(
        model,
        torch.from_numpy(features[:count]),
        torch.from_numpy(probe.noise),
        0,
        table,
        manifest.history,
        manifest.decode_window,
    )
    by_stage, fused, free = (Stream(manifest, probe.start_latent) for _ in range(3))
    stages = ("condition_predictor", "diffusion_head", "vq_decoder")
    errors = {name: MaxError() for name in (*stages, "frame")}
    state, closed = MaxError(), MaxError()
    latent = probe.start_latent
    for i, (condition_t, latent_t, offsets_t) in enumerate(reference):
        if not manifest.folded:
            by_stage.latents[-1] = fused.latents[-1] = latent
        condition, latent, offsets = condition_t.numpy(), latent_t.numpy(), offsets_t.numpy()
        want = (probe.template + offsets).reshape(-1, 3)
        counters = by_stage.counters()
        got_condition, by_stage.cache = graphs.run(
            "condition_predictor",
            audio_feature=features[i],
            previous_latent=by_stage.latents[-1],
            style=probe.style,
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
        vertices = next_frame(graphs, fused, features[i], probe)
        errors["condition_predictor"].add(got_condition, condition)
        errors["diffusion_head"].add(got_latent, latent)
        errors["vq_decoder"].add(got_vertices, want)
        errors["frame"].add(vertices, want)
        if not manifest.folded:
            closed.add(next_frame(graphs, free, features[i], probe), want)
        by_stage.frame += 1
    # After the last frame the fused state must be the one that the stages kept.
    state.add(fused.cache, by_stage.cache)
    state.add(fused.latents, by_stage.latents)
    for name in stages:
        graphs.close(name)
    lines = [error.line(name) for name, error in errors.items()]
    lines.append(state.line("frame", "max_abs_error_of_final_state"))
    if closed.count:
        lines.append(parity_line("frame", "closed_loop_max_abs_error", closed.count, closed.error, None))
    return lines


def _moved(graphs: Graphs, manifest: Manifest, features: Array, probe: Probe) -> npt.NDArray[np.float64]:
    """Vertices [L, V, 3] of the probe's stream, driven by the fused graph."""
    stream = Stream(manifest, probe.start_latent)
    driven = features[: len(probe.noise)]
    frames = [next_frame(graphs, stream, feature, probe) for feature in driven]
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
    return [parity_line("frame", name, count, value, None) for name, value in figures.items()]
