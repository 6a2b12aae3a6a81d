"""A toy model of a few KB in which every input matters, and an independent numpy account of what it does.

The graphs follow the contract of the exported ones (names, shapes, shift-register cache, right-aligned latents)
with arithmetic small enough to write down twice. The reference keeps growing lists and takes what the
windows cover, where the graphs shift registers: a mistake in counters, sides or places cannot cancel out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from streamtalk.model import (
    FILE_NAME,
    SCHEMA_VERSION,
    Asset,
    Clock,
    Graph,
    Manifest,
    graph_key,
    hop_name,
    sha256_of,
)
from streamtalk.rows import hop_tensors

Array = npt.NDArray[Any]
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
SPEAKERS = ("ada", "bo", "cy")
SHAPES = ("jawOpen", "mouthClose", "tongueOut")
LANDMARKS: dict[str, Array] = {
    "lip_pairs": np.array([[0, 1]], np.int32),
    "mouth_corners": np.array([2, 3], np.int32),
    "lids": np.array([[0, 1], [2, 3]], np.int32),
}


@dataclass(frozen=True)
class Toy:
    """The sizes of a toy model, in the manifest's terms."""

    rows: tuple[int, ...] = (1,)
    """Numbers of rows that a hop graph is written for; a graph of one row always is."""
    fps: int = 30
    hop: int = 2
    window_samples: int = 2400
    context_samples: int = 960
    history: int = 5
    decode_window: int = 3
    period: int = 7
    n_vertices: int = 4
    faces: bool = True
    shapes: bool = True
    seed: int = 0

    @property
    def manifest(self) -> Manifest:
        """The manifest, without hashes."""
        span = Clock(16000, self.fps, self.hop, self.context_samples, 0)
        return Manifest(
            schema=SCHEMA_VERSION,
            name="toy",
            exporter_version="0",
            checkpoint_sha256="0" * 64,
            fps=self.fps,
            sample_rate=16000,
            n_vertices=self.n_vertices,
            latent_width=3,
            condition_width=4,
            audio_width=6,
            layers=2,
            heads=2,
            window_samples=self.window_samples,
            context_samples=self.context_samples,
            hop=self.hop,
            lookahead_samples=self.window_samples - span.window_samples,
            history=self.history,
            decode_window=self.decode_window,
            period=self.period,
            steps=1,
            sampler="ddim",
            folded=True,
            level_floor=0.0,
            metres_per_unit=1.0,
            identity="identity.npz",
            identity_sha256="",
            graphs={},
        )

    @property
    def weights(self) -> dict[str, Array]:
        """Seeded weights, scaled so that nothing saturates."""
        m, rng = self.manifest, np.random.default_rng(self.seed)
        A, C, E, W, D = m.audio_width, m.latent_width, m.condition_width, m.history, m.decode_window
        token, cached = 5, m.layers * 2 * E
        shapes = {
            "encode": (m.window_samples, m.hop * A),
            "audio": (A, token),
            "noise_in": (C, token),
            "style_in": (E, token),
            "counts": (3, token),
            "recall": (W, cached, token),
            "remember": (token, cached),
            "latent": (token, C),
            "decode": (D, C, 3 * m.n_vertices),
        }
        scale = {"encode": 0.1, "counts": 0.05, "recall": 0.1}
        return {
            name: (rng.standard_normal(shape) * scale.get(name, 0.3)).astype(np.float32)
            for name, shape in shapes.items()
        }

    @property
    def identity(self) -> dict[str, Array]:
        """The arrays of `identity.npz`."""
        m, rng = self.manifest, np.random.default_rng(self.seed + 1)
        n, V = len(SPEAKERS), m.n_vertices
        painted = V if self.faces else 0
        paint = np.random.default_rng(self.seed + 3).integers(0, 256, (n, painted, 3), np.uint8)
        return {
            "styles": rng.standard_normal((n, m.condition_width)).astype(np.float32),
            "speaker_names": np.array(SPEAKERS),
            "start_latent": rng.standard_normal(m.latent_width).astype(np.float32),
            "templates": rng.standard_normal((n, V, 3)).astype(np.float32),
            "faces": np.array([[0, 1, 2], [0, 2, 3]] if self.faces else np.zeros((0, 3)), np.int32),
            "colors": paint[0],
            "identity_colors": paint,
            **(LANDMARKS if self.faces else {}),
        }

    @property
    def blendshapes(self) -> dict[str, Array]:
        """The arrays of `blendshapes.npz`; the second of three shapes is one that the model cannot make."""
        solver = 4 * np.random.default_rng(self.seed + 2).standard_normal((3, 6)).astype(np.float32)
        solver[1] = 0
        return {"names": np.array(SHAPES), "vertices": np.array([0, 2], np.int32), "solver": solver}

    def write(self, directory: Path) -> Path:
        """Write graphs (which share their weights), identity and manifest to `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        m = self.manifest
        graphs = {}
        data = directory / "weights.fp32.bin"
        for rows in sorted({1, *self.rows}):
            key, model = graph_key(hop_name(rows), "fp32"), _hop(self, rows)
            file = directory / f"{key}.onnx"
            onnx.checker.check_model(model, full_check=True)
            data.unlink(missing_ok=True)  # onnx would append to it; it is the same for all
            onnx.save(model, file, save_as_external_data=True, location=data.name, size_threshold=256)
            inputs, outputs = hop_tensors(m, rows)
            graphs[key] = Graph(
                file=file.name,
                files={path.name: sha256_of(path) for path in (file, data)},
                precision="fp32",
                inputs=tuple(inputs.values()),
                outputs=tuple(outputs.values()),
            )
        identity = directory / m.identity
        arrays: dict[str, Any] = self.identity
        np.savez(identity, **arrays)
        m = msgspec.structs.replace(m, graphs=graphs, identity_sha256=sha256_of(identity))
        if self.shapes:
            shapes = directory / "blendshapes.npz"
            arrays = dict(self.blendshapes)
            np.savez(shapes, **arrays)
            asset = Asset(file=shapes.name, sha256=sha256_of(shapes))
            m = msgspec.structs.replace(m, blendshapes=asset)
        (directory / FILE_NAME).write_bytes(msgspec.json.encode(m))
        return directory

    def reference(
        self,
        pcm: Array,
        noise: Array,
        speaker: int = 0,
        template: Array | None = None,
        style: Array | None = None,
    ) -> Array:
        """Vertices [L, V, 3] of a whole clip [n] in float64, by the definitions and not by the runtime's means."""
        m, w, identity = self.manifest, self.weights, self.identity
        template = identity["templates"][speaker] if template is None else template
        style = identity["styles"][speaker] if style is None else style
        n_frames = len(pcm) * m.fps // m.sample_rate
        padded = np.concatenate([np.zeros(m.context_samples), pcm, np.zeros(m.window_samples + 16000)])
        tokens: list[Array] = []
        latents: list[Array] = [identity["start_latent"]]
        frames = []
        for i in range(n_frames):
            first = i - i % m.hop
            start = int(
                np.floor(first * m.sample_rate / m.fps + 0.5)
            )  # in `padded`, where context comes first
            encoded = np.tanh(padded[start : start + m.window_samples] @ w["encode"]).reshape(m.hop, -1)[
                i % m.hop
            ]
            past, recent = tokens[-m.history :], latents[-m.decode_window :]
            x = encoded @ w["audio"] + noise[i] @ w["noise_in"] + style @ w["style_in"]
            x = x + np.array([i % m.period, len(past), len(recent)]) @ w["counts"]
            for back, cached in enumerate(reversed(past)):
                x = x + cached @ w["recall"][m.history - 1 - back]
            x = np.tanh(x)
            tokens.append(x @ w["remember"])
            latents.append(np.tanh(x @ w["latent"]))
            offsets = np.zeros(3 * m.n_vertices)
            for back, latent in enumerate(reversed(latents[-m.decode_window :])):
                offsets = offsets + latent @ w["decode"][m.decode_window - 1 - back]
            frames.append(template + offsets.reshape(-1, 3))
        return np.array(frames).reshape(n_frames, m.n_vertices, 3)

    def with_(self, **sizes: Any) -> Toy:
        """The same toy with other sizes."""
        return replace(self, **sizes)


def speech(n: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """`n` samples of something that is nowhere constant, peak below 1."""
    return np.random.default_rng(seed).uniform(-0.9, 0.9, n).astype(np.float32)


class _Builder:
    """Nodes and initializers under construction."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def const(self, value: Any, dtype: str = "float32") -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(list(values), "int64")

    def model(self, toy: Toy, rows: int) -> Any:
        def infos(tensors: Any) -> list[Any]:
            return [helper.make_tensor_value_info(t.name, TYPES[t.dtype], t.shape) for t in tensors.values()]

        inputs, outputs = hop_tensors(toy.manifest, rows)
        graph = helper.make_graph(self.nodes, "hop", infos(inputs), infos(outputs), self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _hop(toy: Toy, B: int) -> Any:
    """The hop graph: its frames one after the other, each with the counters that its place in the hop gives it."""
    m, w, b = toy.manifest, toy.weights, _Builder()
    W, D, C, cached = m.history, m.decode_window, m.latent_width, m.layers * 2 * m.condition_width

    # Constants that every B shares come first, so that they lie alike in the file of weights.
    shared = {
        name: b.const(w[name].reshape(-1, w[name].shape[-1]))
        for name in "encode audio noise_in style_in counts recall remember latent decode".split()
    }

    def filled(places: int, count: str) -> str:
        """[B, places, 1] float: 1 where a right-aligned place is filled."""
        first = b.op("Sub", b.ints(places), b.op("Reshape", count, b.ints(B, 1)))
        mask = b.op("GreaterOrEqual", b.const(np.arange(places)[None], "int64"), first)
        return b.op("Unsqueeze", b.op("Cast", mask, to=TensorProto.FLOAT), b.ints(2))

    def place(tensor: str, j: int, axis: int = 1) -> str:
        """Entry `j` of an axis, which goes."""
        return b.op("Squeeze", b.op("Slice", tensor, b.ints(j), b.ints(j + 1), b.ints(axis)), b.ints(axis))

    encoded = b.op("Tanh", b.op("MatMul", "pcm", shared["encode"]))
    encoded = b.op("Reshape", encoded, b.ints(B, m.hop, m.audio_width))
    kv_cache, latents, vertices = "kv_cache", "latents", []
    for j in range(m.hop):
        position = b.op("Mod", b.op("Add", "position", b.ints(j)), b.ints(m.period))
        valid_frames = b.op("Min", b.op("Add", "valid_frames", b.ints(j)), b.ints(W))
        valid_latents = b.op("Min", b.op("Add", "valid_latents", b.ints(j)), b.ints(D))
        counts = [
            b.op("Cast", b.op("Unsqueeze", name, b.ints(1)), to=TensorProto.FLOAT)
            for name in (position, valid_frames, valid_latents)
        ]
        x = b.op("MatMul", place(encoded, j), shared["audio"])
        x = b.op("Add", x, b.op("MatMul", place("noise", j), shared["noise_in"]))
        x = b.op("Add", x, b.op("MatMul", "style", shared["style_in"]))
        x = b.op("Add", x, b.op("MatMul", b.op("Concat", *counts, axis=1), shared["counts"]))
        # [B, layers, 2, H, W, E/H] -> [B, W, cached]
        by_place = b.op("Reshape", b.op("Transpose", kv_cache, perm=[0, 4, 1, 2, 3, 5]), b.ints(B, W, cached))
        known = b.op("Reshape", b.op("Mul", by_place, filled(W, valid_frames)), b.ints(B, W * cached))
        x = b.op("Tanh", b.op("Add", x, b.op("MatMul", known, shared["recall"])))

        token = b.op("MatMul", x, shared["remember"])
        token = b.op("Reshape", token, b.ints(B, m.layers, 2, m.heads, 1, -1))
        kept = b.op("Slice", kv_cache, b.ints(1), b.ints(W), b.ints(4))
        kv_cache = b.op("Concat", kept, token, axis=4)
        latent = b.op("Unsqueeze", b.op("Tanh", b.op("MatMul", x, shared["latent"])), b.ints(1))
        latents = b.op("Concat", b.op("Slice", latents, b.ints(1), b.ints(D), b.ints(1)), latent, axis=1)

        seen = b.op("Add", valid_latents, b.ints(1))
        window = b.op("Reshape", b.op("Mul", latents, filled(D, seen)), b.ints(B, D * C))
        offsets = b.op("MatMul", window, shared["decode"])
        vertices.append(b.op("Reshape", b.op("Add", "template", offsets), b.ints(B, 1, m.n_vertices, 3)))
    b.op("Concat", *vertices, axis=1, name="vertices")

    def if_active(new: str, old: str, rank: int, name: str) -> None:
        b.op("Where", b.op("Reshape", "active", b.ints(B, *[1] * (rank - 1))), new, old, name=name)

    if_active(kv_cache, "kv_cache", 6, "kv_cache_out")
    if_active(latents, "latents", 3, "latents_out")
    return b.model(toy, B)
