"""From a torch model to a model directory, in four steps: plan, write, certify, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from streamtalk import Talker, build_engines
from streamtalk.model import (
    SCHEMA_VERSION,
    Asset,
    Clock,
    Manifest,
    Parity,
    Precision,
    graph_key,
    hop_name,
    sha256_of,
    write_manifest,
)
from streamtalk_export.blendshapes import WeightMatrix, weight_matrix
from streamtalk_export.config import SAMPLE_RATE, Sampler
from streamtalk_export.directory import new_directory
from streamtalk_export.errors import ExportError
from streamtalk_export.fused import for_onnxruntime
from streamtalk_export.graph_files import GraphFiles, trace
from streamtalk_export.graphs import ConditionPredictor, DecoderStage, Hop, NewestFrameDecoder, diffusion_head
from streamtalk_export.half import to_half
from streamtalk_export.hubert import HubertEncoder
from streamtalk_export.model import TalkerModel
from streamtalk_export.parity import CPU, certify, coarse_part, half_graphs, missed
from streamtalk_export.probe import make_probe
from streamtalk_export.sampler import SamplerTable, sampler_table
from streamtalk_export.templates import Mesh
from streamtalk_export.windows import OfflineEncoder, StreamingEncoder, audio_window

IDENTITY = "identity.npz"
BLENDSHAPES = "blendshapes.npz"
PROBE = "probe.npz"
DEFAULT_HOP = 4
Say = Callable[[str], None]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line can change. None takes the model's own value, or the default noted here."""

    history: int | None = None
    decode_window: int | None = None
    """Default: the history."""
    hop: int | None = None
    """Default: 4 frames."""
    context_s: float | None = None
    """Default: 2 s for HuBERT; all that the mel encoder needs."""
    lookahead_ms: float | None = None
    """Default: 200 ms for HuBERT; the least possible for the mel encoder."""
    steps: int | None = None
    sampler: Sampler | None = None
    batch: tuple[int, ...] = ()
    """Rows to write a hop graph for, beside that of one row."""
    fold: bool = True
    """Fold a linear head; False unrolls it, for measuring what folding saves."""
    precision: Precision = "fp32"
    """fp16 writes float16 hop graphs beside the float32 ones. Engines are built from this precision."""
    targets: tuple[str, ...] = ()
    """Engines to build: tensorrt, tensorrt_rtx."""
    compute_capabilities: tuple[int, ...] = ()
    """GPUs that TensorRT-RTX builds for, such as 86; none is all that it knows."""


class Identities(msgspec.Struct, frozen=True, kw_only=True):
    """Faces and names for the model's styles: templates [n, V, 3], or [1, V, 3] for all, and their mesh."""

    speaker_names: tuple[str, ...]
    templates: npt.NDArray[np.float32]
    mesh: Mesh


@dataclass(frozen=True)
class Plan:
    """Everything that an export depends on, decided."""

    model: TalkerModel
    identities: Identities
    checkpoint_sha256: str
    clock: Clock
    table: SamplerTable
    sampler: Sampler
    history: int
    decode_window: int
    folded: bool
    rows: tuple[int, ...]
    settings: Settings
    weights: WeightMatrix | None


def export_model(
    model: TalkerModel,
    identities: Identities,
    out: Path,
    settings: Settings,
    checkpoint_sha256: str,
    say: Say = lambda _: None,
) -> Manifest:
    """Write a model directory at `out`, or raise ExportError and leave what was there.

    The directory is built beside `out` and takes its place complete, certificate included.
    """
    decided = plan(model, identities, settings, checkpoint_sha256)
    with new_directory(out) as directory:
        manifest = write(decided, directory, say)
        # Before the long comparison: what does not build is found in seconds.
        for target in settings.targets:
            capabilities = settings.compute_capabilities
            manifest = build_engines(directory, target, settings.precision, capabilities, say=say, lock=False)
        manifest = certified(decided, directory, manifest, say)
        write_manifest(directory, manifest)
    return manifest


def plan(model: TalkerModel, identities: Identities, settings: Settings, checkpoint_sha256: str) -> Plan:
    """Decide what the settings leave open. Raises ExportError."""
    config = model.config
    own = config.stream
    history = settings.history or config.window_size
    decode_window = settings.decode_window or own.decode_window or history
    if decode_window < 2:
        raise ExportError("--decode-window must be at least 2: the start latent and one frame.")
    encoder = model.audio_encoder
    if isinstance(encoder, HubertEncoder):
        encoder.fuse()
    hop = settings.hop or own.hop or DEFAULT_HOP
    context_s = own.context_s if settings.context_s is None else settings.context_s
    lookahead_ms = own.lookahead_ms if settings.lookahead_ms is None else settings.lookahead_ms
    sampler = settings.sampler or config.sampler
    shapes = identities.mesh.shapes
    return Plan(
        model=model,
        identities=identities,
        checkpoint_sha256=checkpoint_sha256,
        clock=audio_window(config, encoder, hop, context_s, lookahead_ms),
        table=sampler_table(config.schedule, settings.steps or config.steps, sampler),
        sampler=sampler,
        history=history,
        decode_window=decode_window,
        folded=settings.fold and config.predictor.head == "linear",
        rows=tuple(sorted({1, *settings.batch})),
        settings=settings,
        weights=None if shapes is None else weight_matrix(shapes, model.autoencoder.decoder),
    )


def write(decided: Plan, directory: Path, say: Say) -> Manifest:
    """Write graphs, identity, blendshapes and a manifest without certificate."""
    model, identities, clock = decided.model, decided.identities, decided.clock
    config, p = model.config, model.config.predictor
    _write_identity(model, identities, directory / IDENTITY)
    blendshapes = None
    if decided.weights is not None:
        decided.weights.save(directory / BLENDSHAPES)
        blendshapes = Asset(file=BLENDSHAPES, sha256=sha256_of(directory / BLENDSHAPES))
        active = decided.weights.active
        say(f"the model moves {len(active)} ARKit shapes: {', '.join(active)}")
    manifest = Manifest(
        schema=SCHEMA_VERSION,
        name=config.name,
        exporter_version=version("streamtalk"),
        checkpoint_sha256=decided.checkpoint_sha256,
        fps=config.fps,
        sample_rate=SAMPLE_RATE,
        n_vertices=config.n_vertices,
        latent_width=p.vq_dim,
        condition_width=p.latent_dim,
        audio_width=p.audio_encode_dim,
        layers=p.num_layers,
        heads=p.n_heads,
        window_samples=clock.window_samples,
        context_samples=clock.context_samples,
        hop=clock.hop,
        lookahead_samples=clock.lookahead_samples,
        history=decided.history,
        decode_window=decided.decode_window,
        period=p.period,
        steps=len(decided.table),
        sampler=decided.sampler,
        folded=decided.folded,
        level_floor=config.audio.level_floor,
        metres_per_unit=1.0,
        identity=IDENTITY,
        identity_sha256=sha256_of(directory / IDENTITY),
        blendshapes=blendshapes,
        graphs=_write_graphs(decided, directory, say),
    )
    write_manifest(directory, manifest)
    return manifest


def certified(decided: Plan, directory: Path, manifest: Manifest, say: Say) -> Manifest:
    """The manifest with its certificate and its probe. Raises ExportError where a bound is missed."""
    talker = Talker.load(directory, CPU)
    parity = certify(directory, manifest, talker, decided.model, decided.table, decided.weights, say)
    require_parity(parity, lambda: coarse_part(directory, manifest, talker))
    half = half_graphs(manifest)
    motion_mm = next(
        (line.value for line in parity if line.graph in half and line.measure == "rms_motion_mm"), None
    )
    arrays: dict[str, Any] = make_probe(directory, manifest, talker, half, motion_mm)
    np.savez_compressed(directory / PROBE, **arrays)
    probe = Asset(file=PROBE, sha256=sha256_of(directory / PROBE))
    return msgspec.structs.replace(manifest, parity=tuple(parity), probe=probe)


def require_parity(parity: list[Parity], part: Callable[[], str]) -> None:
    """Raise ExportError where a bound is missed; `part` finds the part of the model that float16 is too coarse for."""
    wrong = missed(parity)
    if wrong and all(line.graph.startswith("hop.fp16") for line in parity if line.missed):
        raise ExportError(
            f"float16 is too coarse for this model's {part()}: {wrong}. Export with --precision fp32."
        )
    if wrong:
        raise ExportError(f"The exported graphs do not reproduce the model: {wrong}. Nothing was written.")


def _write_graphs(decided: Plan, directory: Path, say: Say) -> dict[str, Any]:
    """Trace every graph into `directory`; returns their entries in the manifest."""
    exact, half = GraphFiles(directory, "fp32"), GraphFiles(directory, "fp16")
    for name, module, inputs, outputs, dynamic in _modules(decided):
        began = time.perf_counter()
        model = trace(module, inputs, outputs, name, dynamic)
        if decided.settings.precision == "fp16" and isinstance(module, Hop):
            half.save(graph_key(name, "fp16"), to_half(model))
            half.save(graph_key(name, "fp16", "onnxruntime"), for_onnxruntime(model))
        exact.save(name, model)
        say(f"{name:24} {time.perf_counter() - began:5.1f} s")
    return exact.finished() | half.finished()


Traced = tuple[
    str, torch.nn.Module, dict[str, torch.Tensor], tuple[str, ...], dict[str, dict[int, str]] | None
]
"""Name, module, example inputs, names of outputs, and the axes that are dynamic."""


def _modules(decided: Plan) -> Iterator[Traced]:
    """Every module that is traced: hop graphs, their stages, and the offline encoder."""
    model, clock = decided.model, decided.clock
    encoder = StreamingEncoder(model.audio_encoder, clock, model.config.audio.level_floor)
    head = diffusion_head(model.diff_ar_network, decided.table, decided.folded)
    decoder = model.autoencoder.decoder
    for rows in decided.rows:
        predictor = ConditionPredictor(model.diff_ar_network, decided.history, clock.hop)
        windows = NewestFrameDecoder(decoder, decided.decode_window, rows, clock.hop)
        hop = Hop(encoder, predictor, head, windows)
        yield hop_name(rows), hop, _example(decided, rows), ("vertices", "kv_cache_out", "latents_out"), None

    given = _example(decided, 1)
    given["audio_feature"] = torch.zeros(1, model.config.predictor.audio_encode_dim)
    given |= {"previous_latent": given["latents"][:, 0], "condition": given["style"]}

    def stage(name: str, module: torch.nn.Module, inputs: str, *outputs: str) -> Traced:
        return name, module, {key: given[key] for key in inputs.split()}, outputs, None

    yield stage("audio_encoder", encoder, "pcm", "audio_features")
    predictor = ConditionPredictor(model.diff_ar_network, decided.history)
    inputs = "audio_feature previous_latent style position kv_cache valid_frames"
    yield stage("condition_predictor", predictor, inputs, "condition", "kv_cache_out")
    given["noise"] = given["noise"][:, 0]
    yield stage("diffusion_head", head, "noise condition", "latent")
    newest = DecoderStage(NewestFrameDecoder(decoder, decided.decode_window, 1))
    yield stage("vq_decoder", newest, "latents valid_latents template", "vertices")
    offline = OfflineEncoder(model.audio_encoder, model.config.fps)
    clip = {"pcm": torch.zeros(1, 2 * SAMPLE_RATE)}
    yield "audio_encoder_offline", offline, clip, ("audio_features",), {"pcm": {1: "samples"}}


def _example(decided: Plan, B: int) -> dict[str, torch.Tensor]:
    """Inputs of the hop graph of B rows."""
    config, clock = decided.model.config, decided.clock
    p, W = config.predictor, decided.history
    count = torch.ones(B, dtype=torch.int64)
    return {
        "pcm": torch.zeros(B, clock.window_samples),
        "noise": torch.zeros(B, clock.hop, p.vq_dim),
        "style": torch.zeros(B, p.latent_dim),
        "template": torch.zeros(B, config.vq.n_vert),
        "position": count,
        "valid_frames": count,
        "valid_latents": count,
        "kv_cache": torch.zeros(B, p.num_layers, 2, p.n_heads, W, p.latent_dim // p.n_heads),
        "latents": torch.zeros(B, decided.decode_window, p.vq_dim),
        "active": torch.ones(B, dtype=torch.bool),
    }


def _write_identity(model: TalkerModel, identities: Identities, path: Path) -> None:
    styles = model.diff_ar_network.obj_vector.weight.numpy()
    shape = (len(styles), model.config.n_vertices, 3)
    own = identities.mesh.identity_colors
    if own is not None and own.shape != shape:
        raise ExportError(
            f"The faces file holds `identity_colors` of {len(own)} speakers; the model has {len(styles)}. "
            "Give one row a speaker, in the model's order, or leave the array out."
        )
    arrays: dict[str, Any] = {
        "styles": styles,
        "speaker_names": np.array(identities.speaker_names),
        "start_latent": model.autoencoder.start_latent().numpy(),
        "templates": np.broadcast_to(identities.templates, shape),
        "faces": identities.mesh.faces,
        "colors": identities.mesh.colors,
        **({} if own is None else {"identity_colors": own}),
        **identities.mesh.landmarks,
    }
    np.savez(path, **arrays)
