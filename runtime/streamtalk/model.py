"""The manifest: what an exported model directory holds, and the only way in.

`manifest.json` is written last by the exporter, so a directory that has one is complete. Unknown keys are
refused: a field this version does not understand may change what the graphs mean.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from streamtalk.audio_window import Clock
from streamtalk.errors import ModelError

__all__ = [
    "FILE_NAME",
    "LANDMARKS",
    "SCHEMA_VERSION",
    "Asset",
    "Clock",
    "Engine",
    "Graph",
    "Manifest",
    "Parity",
    "Precision",
    "Tensor",
    "contained",
    "graph_key",
    "hop_name",
    "is_hop",
    "read_manifest",
    "sha256_of",
    "verified",
    "verified_graph",
    "write_manifest",
]

SCHEMA_VERSION = 2
FILE_NAME = "manifest.json"
LARGEST = 2**31
"""Above every size and count."""

LANDMARKS = ("lip_pairs", "mouth_corners", "lids")
"""Arrays of vertex numbers in the identity file, each where the face names it: inner upper and lower lip [n, 2],
left and right corner [2], left and right eye's upper and lower margin [2, 2]."""

Precision = Literal["fp32", "fp16"]
Counts = npt.NDArray[np.int64]


class Tensor(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One graph input or output. A dynamic axis is given by its name."""

    name: str
    dtype: Literal["float32", "int64", "bool"]
    shape: tuple[int | str, ...]


class Graph(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One ONNX file. `files` maps it and the weights that it shares with others (paths within the directory) to
    SHA-256 sums. Graphs with `operators` "onnxruntime" use that runtime's own beside ONNX's.
    """

    file: str
    files: dict[str, str]
    precision: Precision
    operators: Literal["onnx", "onnxruntime"] = "onnx"
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def sha256(self) -> str:
        """One hash over the graph's files: what an engine is built from."""
        lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


class Engine(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One TensorRT engine, built from graph `graph` at `precision`, whose `Graph.sha256` was `graph_sha256`.

    `compute_capability`: numbers such as `86` or `75,86`, or `any` that the library builds for.
    """

    graph: str
    file: str
    sha256: str
    backend: Literal["tensorrt", "tensorrt_rtx"]
    precision: Precision
    tensorrt_version: str
    compute_capability: str
    graph_sha256: str
    flags: tuple[str, ...] = ()


class Asset(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One more file of the directory."""

    file: str
    sha256: str


class Parity(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One line of the parity certificate: `value` of `measure` over `frames` frames of `graph`, and its bound.

    A `bound` of None marks a figure that is stated but not gated, such as what streaming features cost.
    """

    graph: str
    measure: str
    frames: int
    value: float
    bound: float | None

    @property
    def missed(self) -> bool:
        """Whether the value is beyond its bound; not a number is."""
        return self.bound is not None and not self.value <= self.bound


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The contents of `manifest.json`. Sizes are those of the letters in the README's model section."""

    schema: int
    name: str
    exporter_version: str
    checkpoint_sha256: str
    fps: int
    sample_rate: int
    n_vertices: int
    latent_width: int
    condition_width: int
    audio_width: int
    layers: int
    heads: int
    window_samples: int
    context_samples: int
    hop: int
    lookahead_samples: int
    history: int
    decode_window: int
    period: int
    steps: int
    sampler: Literal["ddim", "ddim_legacy"]
    folded: bool
    level_floor: float
    metres_per_unit: float
    identity: str
    identity_sha256: str
    blendshapes: Asset | None = None
    graphs: dict[str, Graph]
    engines: tuple[Engine, ...] = ()
    probe: Asset | None = None
    """Inputs and expected outputs that a GPU backend must reproduce on a device before it is used there."""
    parity: tuple[Parity, ...] = ()

    @property
    def clock(self) -> Clock:
        """The relation between audio samples and frames."""
        return Clock(self.sample_rate, self.fps, self.hop, self.context_samples, self.lookahead_samples)

    def write_counters(
        self, frames: Counts, position: Counts, valid_frames: Counts, valid_latents: Counts
    ) -> None:
        """Write the hop graph's counters [B] for hops that begin with `frames` [B]: positions, and how much of the
        cache and of the latents is filled. The start latent counts as a latent.
        """
        np.remainder(frames, self.period, out=position)
        np.minimum(frames, self.history, out=valid_frames)
        np.add(frames, 1, out=valid_latents)
        np.minimum(valid_latents, self.decode_window, out=valid_latents)

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Numbers of rows that a hop graph was exported for, ascending."""
        sizes = (graph.inputs[0].shape[0] for key, graph in self.graphs.items() if is_hop(key))
        return tuple(sorted({size for size in sizes if isinstance(size, int)}))

    @property
    def stream_model(self) -> str:
        """One hash over all that a stream's state depends on: the checkpoint, and how it was exported."""
        fields = (getattr(self, name) for name in _STATE_FIELDS)
        return hashlib.sha256(msgspec.json.encode(tuple(fields))).hexdigest()

    def check(self, where: Path) -> None:
        """Refuse values that no exporter writes. Raises ModelError."""
        positive = (
            "fps sample_rate n_vertices latent_width condition_width audio_width layers heads "
            "window_samples hop history decode_window period steps metres_per_unit"
        )
        for field in positive.split():
            if not 0 < getattr(self, field) < LARGEST:
                raise ModelError(
                    f"{where}: {field} must be positive and below {LARGEST}; it is {getattr(self, field)}."
                )
        if self.context_samples < 0 or self.window_samples != self.clock.window_samples:
            raise ModelError(
                f"{where}: window_samples is {self.window_samples}; context, hop and lookahead add up to "
                f"{self.clock.window_samples}. Export again."
            )
        if self.schema != SCHEMA_VERSION:
            raise ModelError(
                f"{where}: manifest schema {self.schema}, this version reads {SCHEMA_VERSION}; "
                "export again with the matching version."
            )


_STATE_FIELDS = tuple(
    "checkpoint_sha256 fps sample_rate context_samples lookahead_samples hop latent_width condition_width layers heads "
    "history decode_window period steps sampler level_floor".split()
)


def hop_name(rows: int) -> str:
    """Name of the hop graph of so many rows."""
    return "hop" if rows == 1 else f"hop_b{rows}"


def is_hop(key: str) -> bool:
    """Whether a key in `Manifest.graphs` is a hop graph's."""
    return re.fullmatch(r"hop(_b\d+)?(\..*)?", key) is not None


def graph_key(name: str, precision: Precision, operators: str = "onnx") -> str:
    """The key in `Manifest.graphs` of graph `name`: `hop`, `hop_b8.fp16`, `hop.fp16.onnxruntime`."""
    parts = (name, "" if precision == "fp32" else precision, "" if operators == "onnx" else operators)
    return ".".join(part for part in parts if part)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read and check `directory/manifest.json`. Raises ModelError."""
    path = directory / FILE_NAME
    if not path.is_file():
        raise ModelError(
            f"No exported model in {directory}: {FILE_NAME} is missing. Run `python export.py` first, "
            "or name a directory that it wrote."
        )
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.MsgspecError as error:
        raise ModelError(f"{path} is not a manifest of this version ({error}); export again.") from error
    manifest.check(path)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a model whose other files are there. Raises OSError."""
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (directory / FILE_NAME).write_bytes(encoded)


def contained(directory: Path, name: str) -> Path:
    """Path of file `name` of the manifest, which may not lie outside `directory`. Raises ModelError."""
    path = directory / name
    try:
        outside = "\0" in name or directory.resolve() not in path.resolve().parents
        if not outside:
            path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links before Python 3.13
        raise ModelError(f"{name!r} in the manifest cannot be read: {error}. Export again.") from error
    if outside:
        raise ModelError(f"{name!r} in the manifest points outside {directory}; refusing to load it.")
    return path


def verified(directory: Path, name: str, expected: str) -> Path:
    """Path of file `name` in `directory` after its SHA-256 was compared. Raises ModelError."""
    path = contained(directory, name)
    if not path.is_file():
        raise ModelError(f"{path} is missing; the manifest lists it. Export again.")
    actual = sha256_of(path)
    if actual != expected:
        raise ModelError(
            f"{path} is not the file that was exported: SHA-256 {actual[:12]}..., the manifest says "
            f"{expected[:12]}.... Export again."
        )
    return path


def verified_graph(directory: Path, graph: Graph) -> Path:
    """Path of a graph after all its files were compared with their SHA-256. Raises ModelError."""
    if graph.file not in graph.files:
        raise ModelError(f"The manifest gives no SHA-256 for {graph.file}. Export again.")
    for name, sha256 in graph.files.items():
        verified(directory, name, sha256)
    return directory / graph.file
