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
    def make(
        cls,
        manifest: Manifest,
        seconds: float,
        identity: Mapping[str, Array],
        speech: bool = False,
        seed: int = 0,
    ) -> Probe:
        """A probe of this length for the first speaker of an identity file; with `speech` it sounds like speech.
        `seed` draws the noise."""
        frames = round(seconds * manifest.fps)
        sound = speech_audio if speech else probe_audio
        return cls(
            pcm=sound(seconds + manifest.window_samples / SAMPLE_RATE),
            noise=np.random.default_rng(seed)
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


_VOWELS_HZ = ((730, 1090, 2440), (270, 2290, 3010), (530, 1840, 2480), (300, 870, 2240), (570, 840, 2410))
_NASAL_HZ = (250, 1100, 2200)
_FORMANTS = ((1.0, 90.0), (0.5, 130.0), (0.25, 200.0))  # strength and width in Hz


def speech_audio(seconds: float) -> Array:
    """Vowels, stops, hisses, nasals and pauses of a made-up voice, [n] float32 at 16 kHz; the same everywhere.

    A talker that was taught what is no speech keeps its mouth shut to `probe_audio`, and opens it to this. Formants
    after Peterson and Barney, "Control methods used in a study of the vowels" (1952).
    """
    random = np.random.default_rng(0)
    times_s, formants, voiced, hissed = [0.0], [_VOWELS_HZ[0]], [0.0], [0.0]

    def hold(duration_s: float, hz: tuple[int, int, int], voice: float, hiss: float) -> None:
        end_s = times_s[-1] + duration_s
        for at_s in (times_s[-1] + 0.02, end_s):
            times_s.append(at_s)
            formants.append(hz)
            voiced.append(voice)
            hissed.append(hiss)

    while times_s[-1] < seconds:
        vowel = _VOWELS_HZ[random.integers(len(_VOWELS_HZ))]
        hold(random.uniform(0.09, 0.2), vowel, 1.0, 0.0)
        consonant_s = random.uniform(0.05, 0.09)
        if random.random() < 0.25:
            hold(consonant_s, _NASAL_HZ, 0.3, 0.0)
        else:
            hold(consonant_s, vowel, 0.0, 0.3 * (random.random() < 1 / 3))
        if random.random() < 0.08:
            hold(random.uniform(0.3, 0.7), vowel, 0.0, 0.0)

    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tracks = [np.interp(t, times_s, track) for track in np.array(formants, np.float64).T]
    pitch_hz = 120 + 25 * np.sin(2 * np.pi * 0.6 * t) + 10 * np.sin(2 * np.pi * 2.1 * t)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE
    voice = np.zeros(len(t))
    for harmonic in range(1, 31):
        hz = harmonic * pitch_hz
        loud = sum(
            strength * np.exp(-np.abs(hz - track) / width)
            for track, (strength, width) in zip(tracks, _FORMANTS, strict=True)
        )
        voice += loud * np.sin(harmonic * phase) / harmonic**0.3
    noise = np.diff(random.normal(size=len(t)), prepend=0.0)
    sound = np.interp(t, times_s, voiced) * voice + np.interp(t, times_s, hissed) * noise
    return (0.1 * sound + 1e-4 * random.normal(size=len(t))).astype(np.float32)


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
