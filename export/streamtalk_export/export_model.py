"""From a torch model to a model directory: graphs, identities, certificate and manifest."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from streamtalk.errors import OutputError
from streamtalk.interrupt import signals_after
from streamtalk.manifest import (
    AUDIO_ENCODER,
    FILE_NAME,
    FRAME,
    SCHEMA_VERSION,
    Asset,
    Engine,
    Graph,
    Manifest,
    Parity,
    Precision,
    graph_key,
    sha256_of,
)
from streamtalk_export.blendshapes import WeightMatrix, weight_matrix
from streamtalk_export.certificate import PROBE_SECONDS, certify
from streamtalk_export.config import SAMPLE_RATE, Sampler
from streamtalk_export.drive import Probe
from streamtalk_export.eight_bit import GRAPHS as INT8_GRAPHS
from streamtalk_export.engines import build_engines, only_one, write_manifest
from streamtalk_export.errors import ExportError
from streamtalk_export.graphs import ConditionPredictor, Frame, NewestFrameDecoder, diffusion_head
from streamtalk_export.hubert import HubertEncoder
from streamtalk_export.model import TalkerModel
from streamtalk_export.onnx_file import write_graph, write_reduced
from streamtalk_export.reduced_certificate import STREAM_SECONDS, certify_reduced, make_probe
from streamtalk_export.sampler import SamplerTable, sampler_table
from streamtalk_export.slots_certificate import certify_slots, moments
from streamtalk_export.templates import Mesh
from streamtalk_export.windows import AudioWindow, OfflineEncoder, StreamingEncoder, audio_window

OFFLINE = "audio_encoder_offline"
STREAMED = (AUDIO_ENCODER, "condition_predictor", "diffusion_head", "vq_decoder", FRAME)
IDENTITY = "identity.npz"
BLENDSHAPES = "blendshapes.npz"
PROBE = "probe.npz"
SINGLE = "single"
"""The graphs of one voice, gone when the directory is complete."""
KINDS: dict[Precision, tuple[Precision, ...]] = {"fp32": (), "fp16": ("fp16", "fused"), "int8": ("int8",)}
"""What an export at a precision writes beside the float32 graphs."""
REDUCED: dict[Precision, tuple[str, ...]] = {"int8": INT8_GRAPHS, "fused": (AUDIO_ENCODER, FRAME)}
"""Which graphs are written at a precision, where not all are."""
Say = Callable[[str], None]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line can change. None takes the model's own value, or the default noted here."""

    history: int | None = None
    decode_window: int | None = None
    """Default: the history."""
    hop: int | None = None
    """Default: 4 frames."""
    context_s: float | None = None
    """Default: 2 s for HuBERT; all that the mel encoder hears."""
    lookahead_ms: float | None = None
    """Default: 200 ms for HuBERT; the least possible for the mel encoder."""
    steps: int | None = None
    sampler: Sampler | None = None
    batch: int = 1
    encoder_batch: int | None = None
    """Windows that a run of the audio encoder hears, at most the batch, which is the default. Where hops begin at
    different frames, some batch / hop of the voices have one due in a step."""
    fold: bool = True
    """Fold a linear head; False unrolls it, for measuring what folding saves."""
    precision: Precision = "fp32"
    """fp16 and int8 write such graphs beside the float32 ones. Engines are built from this precision, which int8 is
    not for: it is what the CPU backend then runs."""
    targets: tuple[str, ...] = ()
    """Engines to build: tensorrt, tensorrt_rtx."""
    compute_capabilities: tuple[int, ...] = ()
    """What TensorRT-RTX builds for, such as 86; none is all that it knows."""


class Identities(msgspec.Struct, frozen=True, kw_only=True):
    """Faces and names for the model's styles: templates [n, V, 3], or [1, V, 3] for all, and their mesh."""

    speaker_names: tuple[str, ...]
    templates: npt.NDArray[np.float32]
    mesh: Mesh


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
    config = model.config
    defaults = config.stream
    history = settings.history or config.window_size
    decode_window = settings.decode_window or defaults.decode_window or history
    hop = settings.hop or defaults.hop or 4
    steps = settings.steps or config.steps
    sampler = settings.sampler or config.sampler
    if settings.precision == "int8" and settings.targets:
        raise ExportError("int8 graphs are for the CPU: engines are built with --precision fp16 or fp32.")
    if settings.precision == "int8" and settings.batch > 1:
        raise ExportError(
            "int8 graphs serve one voice: they scale a product's input over the whole batch, so that voices would "
            "hear of each other. Leave --batch away."
        )
    encoder_batch = settings.encoder_batch or settings.batch
    if encoder_batch > settings.batch:
        raise ExportError(
            f"--encoder-batch {encoder_batch} is more than --batch {settings.batch}: there would be no voices for it."
        )
    if decode_window < 2:
        raise ExportError("--decode-window must be at least 2: the start latent and one frame.")
    encoder = model.audio_encoder
    if isinstance(encoder, HubertEncoder):
        encoder.fuse_weight_norm()
    window = audio_window(
        config,
        encoder,
        hop,
        _first(settings.context_s, defaults.context_s),
        _first(settings.lookahead_ms, defaults.lookahead_ms),
    )
    table = sampler_table(config.schedule, steps, sampler)
    folded = settings.fold and config.predictor.head == "linear"
    with _new_directory(out) as directory:
        _write_identity(model, identities, directory / IDENTITY)
        sizes = _Sizes(
            history=history,
            decode_window=decode_window,
            batch=settings.batch,
            encoder_batch=encoder_batch,
            folded=folded,
        )
        graphs = _write_graphs(model, table, window, directory, sizes, (OFFLINE, *STREAMED), say)
        shapes = identities.mesh.shapes
        weights = None if shapes is None else weight_matrix(shapes, model.autoencoder.decoder)
        manifest = Manifest(
            schema=SCHEMA_VERSION,
            name=config.name,
            exporter_version=version("streamtalk"),
            checkpoint_sha256=checkpoint_sha256,
            batch=settings.batch,
            encoder_batch=encoder_batch,
            fps=config.fps,
            sample_rate=SAMPLE_RATE,
            n_vertices=config.n_vertices,
            latent_width=config.predictor.vq_dim,
            condition_width=config.predictor.latent_dim,
            audio_width=config.predictor.audio_encode_dim,
            layers=config.predictor.num_layers,
            heads=config.predictor.n_heads,
            window_samples=window.window_samples,
            context_samples=window.context_samples,
            hop=hop,
            lookahead_samples=window.lookahead_samples,
            history=history,
            decode_window=decode_window,
            period=config.predictor.period,
            steps=steps,
            sampler=sampler,
            folded=folded,
            level_floor=config.audio.level_floor,
            metres_per_unit=1.0,
            identity=IDENTITY,
            identity_sha256=sha256_of(directory / IDENTITY),
            blendshapes=None if weights is None else _write_blendshapes(weights, directory, say),
            graphs=graphs,
        )
        with np.load(directory / IDENTITY) as archive:
            identity = dict(archive)
        precision = settings.precision
        kinds = KINDS[precision]
        if kinds:
            say(f"writing {precision} graphs")
            manifest = msgspec.structs.replace(
                manifest, graphs=_with_reduced(directory, graphs, kinds, tuple(graphs))
            )

        def built(graphs: dict[str, Graph]) -> dict[str, Engine]:
            wanted = settings.targets, settings.compute_capabilities
            return {e.file: e for e in build_engines(directory, graphs, precision, *wanted, say)}

        engines = built(manifest.graphs)  # before the long checks: what does not build is found in seconds
        # Graphs of many slots are judged by those of one voice, and then only held to them.
        single, alone = directory, manifest
        if settings.batch > 1:
            say("writing the graphs of one voice, to judge by")
            single = directory / SINGLE
            single.mkdir()
            one = msgspec.structs.replace(sizes, batch=1, encoder_batch=1)
            graphs = _write_graphs(model, table, window, single, one, STREAMED, lambda _: None)
            graphs = _with_reduced(single, graphs, kinds, (AUDIO_ENCODER, FRAME))
            # This one knows no batch, and what ships is what is judged.
            graphs[OFFLINE] = manifest.graphs[OFFLINE]
            for name in graphs[OFFLINE].files:
                shutil.copyfile(directory / name, single / name)
            alone = msgspec.structs.replace(manifest, batch=1, encoder_batch=1, graphs=graphs)
        say("checking every graph against the torch model")
        parity = certify(
            single,
            alone,
            model,
            table,
            window,
            Probe.make(manifest, PROBE_SECONDS, identity),
            weights,
        )
        _enforce(parity)
        if kinds:
            say(f"checking {precision} against fp32 over {STREAM_SECONDS} s of audio")
            lines = certify_reduced(single, alone, identity, kinds)
            if "fp16" in kinds and (missed := _missed(lines, "fp16")):
                say(f"float16 misses its bound ({missed}): it is kept in the audio encoder alone")
                exact = _exact_frames(directory, manifest)
                alone_exact = exact if single == directory else _exact_frames(single, alone)
                manifest = msgspec.structs.replace(
                    manifest, float32_frames=True, graphs=manifest.graphs | exact
                )
                alone = msgspec.structs.replace(alone, graphs=alone.graphs | alone_exact)
                engines |= built(exact)
                lines = [line for line in lines if line.subject != graph_key(FRAME, "fp16")]
                lines += certify_reduced(single, alone, identity, ("fp16",))
                if missed := _missed(lines, "fp16"):
                    raise ExportError(
                        f"The audio encoder too is too coarse in float16: {missed}. Nothing was written; export "
                        "with --precision fp32."
                    )
            if "fused" in kinds and (missed := _missed(lines, "fused")):
                say(f"graphs in onnxruntime's own operators miss their bound ({missed}) and are left out")
                kinds = tuple(kind for kind in kinds if kind != "fused")
                manifest = _without(directory, manifest, "fused")
                lines = [line for line in lines if line.subject != graph_key(FRAME, "fused")]
            parity += lines
            _enforce(parity)
        motion_mm = next((line.measured for line in parity if line.quantity == "rms_motion_mm"), None)
        on_devices = [kind for kind in kinds if kind != "int8"]
        make_probe(single, alone, identity, on_devices, motion_mm).save(directory / PROBE)
        if settings.batch > 1:
            say(f"checking each of {settings.batch} slots")
            found = moments(single, alone, identity)
            shutil.rmtree(single)
            parity += certify_slots(directory, manifest, found, kinds, parity)
            _enforce(parity)
        probe = Asset(file=PROBE, sha256=sha256_of(directory / PROBE))
        manifest = msgspec.structs.replace(
            manifest, parity=tuple(parity), engines=tuple(engines.values()), probe=probe
        )
        write_manifest(directory, manifest)
    return manifest


class _Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What the graphs' shapes depend on beside the model."""

    history: int
    decode_window: int
    batch: int
    encoder_batch: int
    folded: bool


def _with_reduced(
    directory: Path, graphs: dict[str, Graph], kinds: tuple[Precision, ...], names: tuple[str, ...]
) -> dict[str, Graph]:
    """The graphs, and beside them those of `names` in fewer bits."""
    return graphs | {
        graph_key(name, kind): write_reduced(directory, graphs[name], kind)
        for kind in kinds
        for name in REDUCED.get(kind, graphs)
        if name in names
    }


def _exact_frames(directory: Path, manifest: Manifest) -> dict[str, Graph]:
    """Replace the float16 graphs of all but audio encoders by float32 ones, under the same names."""
    graphs = manifest.graphs
    names = [
        name for name in graphs if graph_key(name, "fp16") in graphs if name not in (AUDIO_ENCODER, OFFLINE)
    ]
    exact = {}
    for name in names:
        key = graph_key(name, "fp16")
        _remove(directory, graphs[key])  # onnx would add to a file of weights that is there
        exact[key] = write_reduced(directory, graphs[name], "fp16", exact=True)
    return exact


def _without(directory: Path, manifest: Manifest, precision: Precision) -> Manifest:
    """Without the graphs of a precision, and their files."""
    for graph in manifest.graphs.values():
        if graph.precision == precision:
            _remove(directory, graph)
    left = {key: graph for key, graph in manifest.graphs.items() if graph.precision != precision}
    return msgspec.structs.replace(manifest, graphs=left)


def _remove(directory: Path, graph: Graph) -> None:
    for name in graph.files:
        (directory / name).unlink()


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _missed(parity: Iterable[Parity], precision: Precision | None = None) -> str:
    """Which bounds were missed, of the frames at a precision or of all; empty where none was."""
    return "; ".join(
        f"{p.subject} {p.quantity} {p.measured:.3g} > {p.bound:.3g}"
        for p in parity
        if precision is None or p.subject == graph_key(FRAME, precision)
        if p.bound is not None and not p.measured <= p.bound
    )


def _enforce(parity: list[Parity]) -> None:
    if missed := _missed(parity):
        raise ExportError(f"The exported graphs do not reproduce the model: {missed}. Nothing was written.")


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A directory that becomes `out` when the block ends well, and vanishes when it does not."""
    try:
        out = out.resolve()  # a link stays, and what it points to is replaced
        if out.exists() and not (_is_export(out) or (out.is_dir() and not any(out.iterdir()))):
            raise ExportError(f"{out} exists and is not an exported model; name another --out or remove it.")
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ExportError(f"Cannot write to {out.parent}: {error.strerror}.") from error
    except RuntimeError as error:  # of a loop of links, before Python 3.13
        raise ExportError(f"Cannot write to {out}: {error}.") from error
    try:
        yield building
        building.chmod(0o755)
        with ExitStack() as stack:
            with suppress(OutputError):  # nowhere to lock: two at once may then see each other's
                stack.enter_context(only_one(out))
            _take_place(building, out)
    except OSError as error:
        raise ExportError(f"Writing {out} failed: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is_export(directory: Path) -> bool:
    """Whether a folder holds a manifest of ours, of whatever version: other programs have files of that name."""
    try:
        found = json.loads((directory / FILE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"schema", "graphs", "checkpoint_sha256"} <= found.keys()


def _take_place(building: Path, out: Path) -> None:
    """Rename a folder to `out`, and remove what was there; or leave all as it is. Raises OSError."""
    if not out.exists():
        building.replace(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    with signals_after():
        try:
            out.replace(old)
        except OSError:
            old.rmdir()
            raise
        try:
            building.replace(out)
        except OSError:
            old.replace(out)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _write_graphs(
    model: TalkerModel,
    table: SamplerTable,
    window: AudioWindow,
    directory: Path,
    sizes: _Sizes,
    names: tuple[str, ...],
    say: Say,
) -> dict[str, Graph]:
    """The graphs of these `names`."""
    config = model.config
    history, decode_window, B = sizes.history, sizes.decode_window, sizes.batch
    p = config.predictor
    C, E, A = p.vq_dim, p.latent_dim, p.audio_encode_dim
    network = model.diff_ar_network
    predictor = ConditionPredictor(network, history)
    head = diffusion_head(network, table, sizes.folded)
    decoder = NewestFrameDecoder(model.autoencoder.decoder, decode_window, B)
    zeros = torch.zeros
    counter = torch.ones(B, dtype=torch.int64)
    cache = zeros(B, p.num_layers, 2, p.n_heads, history, E // p.n_heads)
    latents, template = zeros(B, decode_window, C), zeros(B, config.vq.n_vert)
    graphs: dict[str, Graph] = {}

    def write(
        name: str,
        module: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        *outputs: str,
        dynamic: dict[str, dict[int, str]] | None = None,
    ) -> None:
        if name not in names:
            return
        began = time.perf_counter()
        graphs[name] = graph = write_graph(module, inputs, outputs, directory / f"{name}.onnx", dynamic)
        size = sum((directory / file).stat().st_size for file in graph.files) / 1e6
        say(f"{graph.file:28} {size:8.1f} MB  {time.perf_counter() - began:5.1f} s")

    write(
        AUDIO_ENCODER,
        StreamingEncoder(model.audio_encoder, window, config.audio.level_floor),
        {"pcm": zeros(sizes.encoder_batch, window.window_samples)},
        "audio_features",
    )
    write(
        OFFLINE,
        OfflineEncoder(model.audio_encoder, config.fps),
        {"pcm": zeros(1, 2 * SAMPLE_RATE)},
        "audio_features",
        dynamic={"pcm": {1: "samples"}},
    )
    write(
        "condition_predictor",
        predictor,
        {
            "audio_feature": zeros(B, A),
            "previous_latent": zeros(B, C),
            "style": zeros(B, E),
            "position": counter,
            "kv_cache": cache,
            "valid_frames": counter,
        },
        "condition",
        "kv_cache_out",
    )
    write("diffusion_head", head, {"noise": zeros(B, C), "condition": zeros(B, E)}, "latent")
    write(
        "vq_decoder",
        decoder,
        {"latents": latents, "valid_latents": counter, "template": template},
        "vertices",
    )
    write(
        "frame",
        Frame(predictor, head, decoder),
        {
            "audio_feature": zeros(B, A),
            "noise": zeros(B, C),
            "style": zeros(B, E),
            "position": counter,
            "valid_frames": counter,
            "valid_latents": counter,
            "template": template,
            "kv_cache": cache,
            "latents": latents,
            "active": torch.ones(B, dtype=torch.bool),
        },
        "vertices",
        "kv_cache_out",
        "latents_out",
    )
    return graphs


def _write_identity(model: TalkerModel, identities: Identities, path: Path) -> None:
    styles = model.diff_ar_network.obj_vector.weight.numpy()
    shape = (len(styles), model.config.n_vertices, 3)
    own = identities.mesh.identity_colors
    if own is not None and own.shape != shape:
        raise ExportError(
            f"The faces file holds `identity_colors` of {len(own)} speakers; the model has {len(styles)}. "
            "Give one row a speaker, in the model's order, or leave the array out."
        )
    arrays: dict[str, npt.NDArray[Any]] = dict(
        styles=styles,
        speaker_names=np.array(identities.speaker_names),
        start_latent=model.autoencoder.start_latent().numpy(),
        templates=np.broadcast_to(identities.templates, shape),
        faces=identities.mesh.faces,
        colors=identities.mesh.colors,
        **({} if own is None else {"identity_colors": own}),
        **identities.mesh.landmarks,
    )
    np.savez(path, **arrays)  # type: ignore[arg-type]  # of the stubs: an array might be named allow_pickle


def _write_blendshapes(weights: WeightMatrix, directory: Path, say: Say) -> Asset:
    weights.save(directory / BLENDSHAPES)
    say(f"the model moves {len(weights.active)} ARKit shapes: {', '.join(weights.active)}")
    return Asset(file=BLENDSHAPES, sha256=sha256_of(directory / BLENDSHAPES))
