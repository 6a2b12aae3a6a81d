"""The parity certificate: exported graphs against the torch model, and against each other.

The stage graphs are held to the torch model, the hop graph to their composition, graphs of more rows and of fewer bits
to the hop graph. Hop graphs are driven by the runtime itself, stage graphs by `Stages`. A folded head is compared in a
closed loop. A nonlinear one may draw events: while a blink hangs by a hair a rounding grows from frame to frame (a
trained talker's by 2.7 a frame), and both streams are right. There each hop starts from the reference's state.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

from streamtalk import Snapshot, Stream, Talker
from streamtalk.model import Manifest, Parity, hop_name, write_manifest
from streamtalk_export.blendshapes import WeightMatrix
from streamtalk_export.config import SAMPLE_RATE
from streamtalk_export.excerpt import Excerpt
from streamtalk_export.graph_files import GraphFiles
from streamtalk_export.half import coarsest_part, hold_roundings
from streamtalk_export.hubert import HubertEncoder
from streamtalk_export.model import TalkerModel, stream_frames
from streamtalk_export.sampler import SamplerTable
from streamtalk_export.windows import StreamingEncoder

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
CPU = "onnxruntime-cpu"

STAGE_BOUND = 2e-5
"""Largest error of conditions, latents, vertices and state, relative to the reference's peak where that passes 1."""
FEATURE_BOUND = 1e-4
"""The same for audio features, which pass through many more layers."""
MAX_FRAMES = 80
FRAMES_AFTER_FILLING = 8
"""Frames compared beyond the point where history and decode window are full and begin to forget."""
EXCERPT_S = 4
REBUILT_S = 20
"""Length over which blendshapes are judged: a face that draws its blinks may have none in a few seconds."""
HALF_S = 30
PART_S = 3
"""Length over which the parts of a float16 graph that missed its bound are compared."""
QUANTILE = 0.99
MOMENTS = 3
"""Hops of a stream that rows start from: its first, one as the windows fill, one when they are full."""


class Worst:
    """Largest absolute error so far, and the size of the reference."""

    def __init__(self) -> None:
        self.error, self.peak, self.count = 0.0, 0.0, 0

    def add(self, got: Array, want: Array) -> None:
        """Take in a pair that should be equal."""
        difference = float(np.abs(got.astype(np.float64) - want).max(initial=0.0))
        self.error = float(np.maximum(self.error, difference))  # max() would drop a NaN
        self.peak = max(self.peak, float(np.abs(want).max(initial=0.0)))
        self.count += 1

    def line(self, graph: str, measure: str = "max_abs_error", bound: float = STAGE_BOUND) -> Parity:
        """A line of the certificate; `bound` is relative to the peak where that passes 1."""
        limit = bound * max(1.0, self.peak)
        return Parity(graph=graph, measure=measure, frames=self.count, value=self.error, bound=limit)


def stated(graph: str, measure: str, frames: int, value: float) -> Parity:
    """A line without a bound."""
    return Parity(graph=graph, measure=measure, frames=frames, value=value, bound=None)


class Stages:
    """The stage graphs of a model directory, run one after the other with the state of one stream."""

    def __init__(self, directory: Path, manifest: Manifest, start_latent: Array) -> None:
        self._directory, self._manifest = directory, manifest
        self._sessions: dict[str, Any] = {}
        self._start_latent = start_latent
        self.begin()

    def begin(self) -> None:
        """Start a stream."""
        m = self._manifest
        self.kv_cache = np.zeros((m.layers, 2, m.heads, m.history, m.condition_width // m.heads), np.float32)
        self.latents = np.zeros((m.decode_window, m.latent_width), np.float32)
        self.latents[-1] = self._start_latent
        self.frame = 0

    def run(self, name: str, **inputs: Array) -> list[Array]:
        """Outputs of a graph; inputs and outputs without the batch axis."""
        if name not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            path = str(self._directory / self._manifest.graphs[name].file)
            self._sessions[name] = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        outputs: list[Array] = self._sessions[name].run(
            None, {key: value[None] for key, value in inputs.items()}
        )
        return [output[0] for output in outputs]

    def next(self, feature: Array, excerpt: Excerpt) -> tuple[Array, Array, Array]:
        """Condition [E], latent [C] and vertices [V, 3] of the next frame, whose audio feature [A] is given."""
        m = self._manifest
        position, valid_frames, valid_latents = (np.zeros(1, np.int64) for _ in range(3))
        m.write_counters(np.array([self.frame]), position, valid_frames, valid_latents)
        condition, self.kv_cache = self.run(
            "condition_predictor",
            audio_feature=feature,
            previous_latent=self.latents[-1],
            style=excerpt.style,
            position=position[0],
            kv_cache=self.kv_cache,
            valid_frames=valid_frames[0],
        )
        (latent,) = self.run("diffusion_head", noise=excerpt.noise[self.frame], condition=condition)
        self.latents = np.concatenate([self.latents[1:], latent[None]])
        (vertices,) = self.run(
            "vq_decoder",
            latents=self.latents,
            valid_latents=np.minimum(valid_latents[0] + 1, m.decode_window),
            template=excerpt.template.reshape(-1),
        )
        self.frame += 1
        return condition, latent, vertices

    def hops(self, excerpt: Excerpt, frames: int) -> Iterator[list[Array]]:
        """Vertices of the excerpt's frames, a hop at a time, audio encoder included."""
        for first in range(0, frames, self._manifest.hop):
            (features,) = self.run("audio_encoder", pcm=excerpt.window(self._manifest, first))
            yield [self.next(feature, excerpt)[2] for feature in features]

    def close(self) -> None:
        """Let the sessions' memory go: full-size graphs are large."""
        self._sessions.clear()


def open_excerpt(talker: Talker, excerpt: Excerpt) -> Stream:
    """A stream that has all of an excerpt's audio and its noise."""
    stream = talker.open(0, template=excerpt.template, noise=excerpt.noise)
    stream.push(excerpt.pcm)
    return stream


def next_hop(stream: Stream, hop: int) -> Array:
    """Vertices [hop, V, 3] of a stream's next hop."""
    frames = stream.push(np.zeros(0, np.float32))
    return np.stack([next(frames).vertices.copy() for _ in range(hop)])


def hops(stream: Stream, manifest: Manifest, frames: int) -> Iterator[Array]:
    """Vertices [hop, V, 3] of a stream's next hops, for at least so many frames."""
    for _ in range(0, frames, manifest.hop):
        yield next_hop(stream, manifest.hop)


def follow(stream: Stream, kv_cache: Array, latents: Array) -> None:
    """Give a stream the model's state of another at the same hop."""
    own = stream.state()
    stream.restore(replace(own, row=replace(own.row, kv_cache=kv_cache, latents=latents)))


def certify(
    directory: Path,
    manifest: Manifest,
    talker: Talker,
    model: TalkerModel,
    table: SamplerTable,
    weights: WeightMatrix | None,
    say: Callable[[str], None],
) -> list[Parity]:
    """Measure every graph of `directory`, of which `talker` is loaded. The caller decides what a missed bound means."""
    identity = read_identity(directory, manifest)
    excerpt = Excerpt.make(manifest, EXCERPT_S * manifest.fps, identity)
    stages = Stages(directory, manifest, identity["start_latent"])
    say("comparing the stages with the torch model")
    features, lines = certify_encoders(stages, manifest, model, excerpt)
    lines += certify_stages(stages, manifest, model, table, features["offline"], excerpt)
    lines += streaming_cost(stages, manifest, features, excerpt)
    say("comparing the hop graph with the stages")
    lines += certify_hop(stages, manifest, talker, excerpt, filled_frames(manifest))
    stages.close()
    for rows in manifest.row_counts[1:]:
        say(f"comparing {rows} rows with one")
        lines += certify_rows(talker, rows, identity)
    if weights is not None:
        lines += weights.error(long_motion(talker, identity), manifest.metres_per_unit)
    for key in half_graphs(manifest):
        say(f"comparing {key} with {hop_name(1)} over {HALF_S} s of audio")
        lines += certify_half(directory, manifest, talker, key, HALF_S)
    return lines


def filled_frames(manifest: Manifest) -> int:
    """Frames that fill history and decode window, and some more."""
    return min(MAX_FRAMES, max(manifest.history, manifest.decode_window) + FRAMES_AFTER_FILLING)


def read_identity(directory: Path, manifest: Manifest) -> dict[str, Array]:
    """Arrays of the identity file."""
    with np.load(directory / manifest.identity) as archive:
        return dict(archive)


def certify_encoders(
    stages: Stages, manifest: Manifest, model: TalkerModel, excerpt: Excerpt
) -> tuple[dict[str, Array], list[Parity]]:
    """Compare both audio encoders with torch's, and HuBERT with the library's own forward."""
    clip = excerpt.pcm[: EXCERPT_S * SAMPLE_RATE]
    offline = Worst()
    (features,) = stages.run("audio_encoder_offline", pcm=clip)
    offline.add(features, model.offline_features(torch.from_numpy(clip)).numpy())
    module = StreamingEncoder(model.audio_encoder, manifest.clock, manifest.level_floor).eval()
    streamed, worst = [], Worst()
    for first in range(0, EXCERPT_S * manifest.fps, manifest.hop):
        window = excerpt.window(manifest, first)
        (got,) = stages.run("audio_encoder", pcm=window)
        with torch.no_grad():
            worst.add(got, module(torch.from_numpy(window[None]))[0].numpy())
        streamed.append(got)
    lines = [
        offline.line("audio_encoder_offline", bound=FEATURE_BOUND),
        worst.line("audio_encoder", bound=FEATURE_BOUND),
    ]
    if isinstance(model.audio_encoder, HubertEncoder):
        own = Worst()
        pcm = torch.from_numpy(clip[None])
        normalised = (pcm - pcm.mean()) / torch.sqrt(pcm.var(unbiased=False) + 1e-7)
        with torch.no_grad():
            library = model.audio_encoder.hubert(normalised).last_hidden_state
            own.add(model.audio_encoder(pcm).numpy(), library.numpy())
        lines.append(own.line("audio_encoder", "max_abs_error_of_torch_against_transformers", FEATURE_BOUND))
    return {"offline": features, "streaming": np.concatenate(streamed)}, lines


def certify_stages(
    stages: Stages,
    manifest: Manifest,
    model: TalkerModel,
    table: SamplerTable,
    features: Array,
    excerpt: Excerpt,
) -> list[Parity]:
    """Compare predictor, head and decoder with the model, which recomputes every frame from scratch."""
    count = min(filled_frames(manifest), len(features))
    reference = stream_frames(
        model,
        torch.from_numpy(features[:count]),
        torch.from_numpy(excerpt.noise),
        0,
        table,
        manifest.history,
        manifest.decode_window,
    )
    errors = {name: Worst() for name in ("condition_predictor", "diffusion_head", "vq_decoder")}
    stages.begin()
    for feature, (condition, latent, offsets) in zip(features, reference, strict=False):
        want = condition.numpy(), latent.numpy(), excerpt.template + offsets.numpy().reshape(-1, 3)
        for error, got, wanted in zip(errors.values(), stages.next(feature, excerpt), want, strict=True):
            error.add(got, wanted)
        if not manifest.folded:
            stages.latents[-1] = want[1]
    return [error.line(name) for name, error in errors.items()]


def certify_hop(
    stages: Stages, manifest: Manifest, talker: Talker, excerpt: Excerpt, frames: int
) -> list[Parity]:
    """Compare the hop graph with the composition of the stages: vertices, and the state after every hop."""
    vertices, state = Worst(), Worst()
    stages.begin()
    with open_excerpt(talker, excerpt) as stream:
        for want in stages.hops(excerpt, frames):
            vertices.add(next_hop(stream, manifest.hop), np.stack(want))
            row = stream.state().row
            state.add(row.kv_cache, stages.kv_cache)
            state.add(row.latents, stages.latents)
            if not manifest.folded:
                follow(stream, stages.kv_cache, stages.latents)
    return [vertices.line(hop_name(1)), state.line(hop_name(1), "max_abs_error_of_state")]


@dataclass(frozen=True)
class Moment:
    """A hop of a stream by itself: the stream's face, its state before, the hop's vertices and its state after."""

    speaker: int
    template: Array
    before: Snapshot
    vertices: Array
    after: Snapshot


def certify_rows(talker: Talker, rows: int, identity: Mapping[str, Array]) -> list[Parity]:
    """Compare rows of one launch with streams by themselves, of other faces and at other moments than their neighbours.

    Every second row has a hop due; the others must keep their state to the bit.
    """
    m = talker.manifest
    last = -(-max(m.history, m.decode_window) // m.hop)
    excerpt = Excerpt.make(m, (last + 1) * m.hop, identity)
    moments = [
        _moment(talker, excerpt, place % len(talker.speakers), 0.1 * place, last * place // (MOMENTS - 1))
        for place in range(MOMENTS)
    ]
    vertices, state, kept = Worst(), Worst(), Worst()
    for shift in range(MOMENTS):
        with talker.batch(rows) as batch:
            streams = []
            for row in range(rows):
                moment = moments[(row + shift) % MOMENTS]
                stream = batch.open(moment.speaker, template=moment.template, noise=excerpt.noise)
                stream.restore(moment.before if row % 2 == shift % 2 else _starved(moment.before))
                streams.append((stream, moment))
            made = dict(batch.step())
            for stream, moment in streams:
                row_state, due = stream.state().row, stream in made
                want = moment.after.row if due else moment.before.row
                if due:
                    vertices.add(np.stack([frame.vertices for frame in made[stream]]), moment.vertices)
                for name in ("kv_cache", "latents"):
                    (state if due else kept).add(getattr(row_state, name), getattr(want, name))
    name = hop_name(rows)
    lines = [vertices.line(name, "max_abs_error_of_rows"), state.line(name, "max_abs_error_of_state_of_rows")]
    return [*lines, kept.line(name, "change_of_state_of_inactive_rows", 0.0)]


def _moment(talker: Talker, excerpt: Excerpt, speaker: int, shift: float, hop: int) -> Moment:
    m = talker.manifest
    template = talker.identity.templates[speaker] + np.float32(shift)
    with talker.open(speaker, template=template, noise=excerpt.noise) as stream:
        stream.push(excerpt.pcm[: m.clock.window_start(hop * m.hop) + m.window_samples])
        for _ in hops(stream, m, hop * m.hop):
            pass
        before = stream.state()
        return Moment(speaker, template, before, next_hop(stream, m.hop), stream.state())


def _starved(snapshot: Snapshot) -> Snapshot:
    """The same state without the last sample that its hop waits for."""
    return replace(snapshot, samples=snapshot.samples - 1, pcm=snapshot.pcm[:-1])


def certify_half(
    directory: Path, manifest: Manifest, talker: Talker, key: str, seconds: float
) -> list[Parity]:
    """Compare a float16 hop graph with the float32 one over speech, audio encoder included."""
    with tempfile.TemporaryDirectory() as folder:
        half = rounded_talker(
            directory, manifest, onnx.load(directory / manifest.graphs[key].file), Path(folder)
        )
        errors, closed, rms_mm = compare_speech(directory, manifest, talker, half, seconds)
    limits = BOUNDS[manifest.graphs[key].operators].limits_mm(rms_mm)
    return _half_lines(key, errors, closed, limits, rms_mm)


def compare_speech(
    directory: Path, manifest: Manifest, talker: Talker, half: Talker, seconds: float
) -> tuple[Array, Array, float]:
    """Vertex errors of a float16 graph over speech, in mm: [hops, hop, V]; of its closed loop where the head is not
    folded; and the RMS motion.
    """
    identity = read_identity(directory, manifest)
    excerpt = Excerpt.make(manifest, round(seconds * manifest.fps), identity, speech=True)
    errors: list[Array] = []
    closed: list[Array] = []
    motion = Motion()
    with (
        open_excerpt(talker, excerpt) as exact,
        open_excerpt(half, excerpt) as following,
        open_excerpt(half, excerpt) as free,
    ):
        for _ in range(0, len(excerpt.noise), manifest.hop):
            row = exact.state().row
            want = next_hop(exact, manifest.hop)
            motion.add(want)
            if not manifest.folded:
                follow(following, row.kv_cache, row.latents)
                closed.append(vertex_distance(next_hop(free, manifest.hop), want))
            errors.append(vertex_distance(next_hop(following, manifest.hop), want))
    unit_mm = 1000 * manifest.metres_per_unit
    return np.stack(errors) * unit_mm, np.array(closed) * unit_mm, motion.rms() * unit_mm


def coarse_part(directory: Path, manifest: Manifest, talker: Talker) -> str:
    """The part of the model that float16 costs most."""

    def error(model: onnx.ModelProto) -> float:
        with tempfile.TemporaryDirectory() as folder:
            half = rounded_talker(directory, manifest, model, Path(folder))
            return float(np.quantile(compare_speech(directory, manifest, talker, half, PART_S)[0], QUANTILE))

    return coarsest_part(onnx.load(directory / manifest.graphs[hop_name(1)].file), error)


def _half_lines(key: str, error: Array, closed: Array, limits: Limits, rms_mm: float) -> list[Parity]:
    frames = error.shape[0] * error.shape[1]
    # A NaN must miss its bound: numpy's quantile and max carry it on.
    bounded = (
        ("vertex_error_p99_mm", float(np.quantile(error, QUANTILE)), limits.p99),
        ("vertex_error_max_mm", float(error.max()), limits.max),
    )
    lines = [
        Parity(graph=key, measure=name, frames=frames, value=value, bound=bound)
        for name, value, bound in bounded
    ]
    lines.append(stated(key, "rms_motion_mm", frames, rms_mm))
    if closed.size:
        lines.append(stated(key, "closed_loop_vertex_error_p50_mm", frames, float(np.median(closed))))
        lines.append(
            stated(key, "closed_loop_vertex_error_p99_mm", frames, float(np.quantile(closed, QUANTILE)))
        )
    return lines


def rounded_talker(directory: Path, manifest: Manifest, half: onnx.ModelProto, folder: Path) -> Talker:
    """A float16 hop graph on the CPU, with its roundings held, as a model of its own in an empty folder."""
    files = GraphFiles(folder, "fp32")
    files.save(hop_name(1), hold_roundings(half))
    (folder / manifest.identity).write_bytes((directory / manifest.identity).read_bytes())
    plain = {
        name: msgspec.structs.replace(graph, operators="onnx") for name, graph in files.finished().items()
    }
    write_manifest(
        folder, msgspec.structs.replace(manifest, graphs=plain, blendshapes=None, probe=None, engines=())
    )
    return Talker.load(folder, CPU)


@dataclass(frozen=True)
class Limits:
    """Largest allowed vertex error: its 99th percentile and its maximum."""

    p99: float
    max: float


@dataclass(frozen=True)
class Bounds:
    """Allowed errors of a precision: a vertex in mm, and as a share of the RMS motion for models that move metres
    (random weights). The larger of the two holds.
    """

    p99_mm: float
    max_mm: float
    p99_of_motion: float
    max_of_motion: float

    def limits_mm(self, rms_motion_mm: float) -> Limits:
        """Limits for a model that moves this much."""
        return Limits(
            p99=max(self.p99_mm, self.p99_of_motion * rms_motion_mm),
            max=max(self.max_mm, self.max_of_motion * rms_motion_mm),
        )


BOUNDS: dict[str, Bounds] = {
    "onnx": Bounds(0.05, 0.2, 0.01, 0.04),
    "onnxruntime": Bounds(0.03, 0.12, 0.006, 0.024),
}
"""By a float16 graph's operators. "onnx": below what a face shows, and a tenth of what streaming features cost.
"onnxruntime": three fifths of that, for the probe on a device holds them to the same, and a GPU rounds within an
operator too (an H200 came to 1.4 times of what the CPU had measured, and refused a model)."""


class Motion:
    """Running mean and mean square of vertices."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, np.zeros(()), np.zeros(())

    def add(self, vertices: Array) -> None:
        """Take in frames [n, V, 3]."""
        v = vertices.astype(np.float64)
        self.count, self.sum, self.squares = (
            self.count + len(v),
            self.sum + v.sum(0),
            self.squares + (v * v).sum(0),
        )

    def rms(self) -> float:
        """Root mean square distance of a vertex from its mean position, in the vertices' unit."""
        mean = self.sum / self.count
        variance = np.maximum(self.squares / self.count - mean * mean, 0)
        return float(np.sqrt(variance.sum(-1).mean()))


def vertex_distance(got: Array, want: Array) -> Array:
    """Distance of each vertex, float32."""
    return np.linalg.norm(got.astype(np.float64) - want, axis=-1).astype(np.float32)


def long_motion(talker: Talker, identity: Mapping[str, Array]) -> Doubles:
    """Vertex offsets [L, V, 3] of a stream that talks, and long enough to blink, which is when weights are clipped."""
    m = talker.manifest
    excerpt = Excerpt.make(m, REBUILT_S * m.fps, identity, speech=True)
    with open_excerpt(talker, excerpt) as stream:
        vertices = np.concatenate(list(hops(stream, m, REBUILT_S * m.fps)))
    return vertices.astype(np.float64) - excerpt.template


def streaming_cost(
    stages: Stages, manifest: Manifest, features: Mapping[str, Array], excerpt: Excerpt
) -> list[Parity]:
    """State how far vertices driven by streaming features are from those driven by offline ones."""
    count = min(map(len, features.values()))
    unit_mm = 1000 * manifest.metres_per_unit
    moved = {}
    for kind, rows in features.items():
        stages.begin()
        moved[kind] = unit_mm * np.stack([stages.next(row, excerpt)[2] for row in rows[:count]]).astype(
            np.float64
        )
    difference = vertex_distance(moved["streaming"], moved["offline"])
    motion = Motion()
    motion.add(moved["offline"])
    figures = {
        "streaming_vs_offline_features_rms_mm": float(np.sqrt((difference**2).mean())),
        "streaming_vs_offline_features_p99_mm": float(np.quantile(difference, QUANTILE)),
        "rms_motion_mm": motion.rms(),
    }
    return [stated("audio_encoder", name, count, value) for name, value in figures.items()]


def missed(parity: Sequence[Parity]) -> str:
    """The lines whose bound was missed, as text; empty where none was."""
    return "; ".join(f"{p.graph} {p.measure} {p.value:.3g} > {p.bound:.3g}" for p in parity if p.missed)


def half_graphs(manifest: Manifest) -> list[str]:
    """Keys of the float16 hop graphs of one row."""
    return [
        key
        for key, graph in manifest.graphs.items()
        if key.partition(".")[0] == hop_name(1) and graph.precision == "fp16"
    ]
