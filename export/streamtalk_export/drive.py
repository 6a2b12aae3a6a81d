"""Exported graphs driven as the runtime drives them, frame by frame, in onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from streamtalk.manifest import Graph, Manifest, Precision, graph_key
from streamtalk_export.config import SAMPLE_RATE
from streamtalk_export.half import hold_roundings

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Probe:
    """Input that exercises a model: pcm [n], noise [L, C], style [E], start latent [C], template [3V].

    The audio is longer than its L frames by a window: silence would be encoded as rounding noise where
    a normalisation follows zeros, and two correct implementations would disagree.
    """

    pcm: Array
    noise: Array
    style: Array
    start_latent: Array
    template: Array

    @classmethod
    def make(cls, manifest: Manifest, seconds: float, identity: Mapping[str, Array]) -> Probe:
        """A probe of this length for the first speaker of an identity file."""
        frames = round(seconds * manifest.fps)
        return cls(
            pcm=probe_audio(seconds + manifest.window_samples / SAMPLE_RATE),
            noise=np.random.default_rng(0)
            .standard_normal((frames, manifest.latent_width))
            .astype(np.float32),
            style=identity["styles"][0],
            start_latent=identity["start_latent"],
            template=identity["templates"][0].reshape(-1),
        )

    def windows(self, manifest: Manifest) -> Iterator[Array]:
        """The encoder's input of every hop, as the runtime cuts it."""
        return windows(self.pcm, len(self.noise), manifest)


def windows(pcm: Array, frames: int, manifest: Manifest) -> Iterator[Array]:
    """The encoder's inputs [window_samples] for `frames` frames of pcm [n], silence around it."""
    padded = np.pad(pcm, (manifest.context_samples, manifest.window_samples))
    for first in range(0, frames, manifest.hop):
        start = round(first * SAMPLE_RATE / manifest.fps)
        yield padded[start : start + manifest.window_samples]


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


class Graphs:
    """Sessions of a model directory at one precision, addressed by graph name."""

    def __init__(self, directory: Path, manifest: Manifest, precision: Precision = "fp32") -> None:
        self._sessions: dict[str, Any] = {}
        self._directory, self._manifest, self._precision = directory, manifest, precision

    def run(self, name: str, **inputs: Array) -> list[Array]:
        """Outputs of the first slot; every slot gets the same inputs, given without the batch axis."""
        batch = int(self._graph(name).inputs[0].shape[0])
        batched = {
            key: np.ascontiguousarray(np.broadcast_to(value, (batch, *value.shape)))
            for key, value in inputs.items()
        }
        return [out[0] for out in self.run_slots(name, batched)]

    def run_slots(self, name: str, inputs: Mapping[str, Array]) -> list[Array]:
        """Outputs of every slot, of inputs with the batch axis."""
        if name not in self._sessions:
            self._sessions[name] = self._session(self._graph(name))
        outputs: list[Array] = self._sessions[name].run(None, dict(inputs))
        return outputs

    def close(self, name: str) -> None:
        """Let a session's memory go: full-size graphs are large."""
        self._sessions.pop(name, None)

    def _graph(self, name: str) -> Graph:
        return self._manifest.graphs[graph_key(name, self._precision)]

    def _session(self, graph: Graph) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        path = self._directory / graph.file
        source: str | bytes = str(path)
        if self._precision in ("fp16", "fused"):
            source = hold_roundings(onnx.load(path)).SerializeToString()
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class Stream:
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


def frame_inputs(stream: Stream, feature: Array, probe: Probe) -> dict[str, Array]:
    """What the fused graph is given for the stream's next frame, without the batch axis."""
    return {
        "audio_feature": feature,
        "noise": probe.noise[stream.frame],
        "style": probe.style,
        "template": probe.template,
        "kv_cache": stream.cache,
        "latents": stream.latents,
        "active": np.array(True),
        **stream.counters(),
    }


def next_frame(graphs: Graphs, stream: Stream, feature: Array, probe: Probe) -> Array:
    """Run the fused graph for the stream's next frame: vertices [V, 3]."""
    inputs = frame_inputs(stream, feature, probe)
    vertices, stream.cache, stream.latents = graphs.run("frame", **inputs)
    stream.frame += 1
    return vertices


def closed_loop(graphs: Graphs, manifest: Manifest, probe: Probe) -> Iterator[tuple[Array, Array]]:
    """The probe's stream, encoder included: vertices [V, 3] and the newest latent [C] of every frame."""
    stream = Stream(manifest, probe.start_latent)
    for window in probe.windows(manifest):
        (features,) = graphs.run("audio_encoder", pcm=window)
        for feature in features[: len(probe.noise) - stream.frame]:
            vertices = next_frame(graphs, stream, feature, probe)
            yield vertices, stream.latents[-1]
