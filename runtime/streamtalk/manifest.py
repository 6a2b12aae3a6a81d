"""The manifest: what an exported model directory holds, and the only way in.

`manifest.json` is written last by the exporter, so a directory that has one is complete. Unknown keys are
refused: a field this version does not understand may change what the graphs mean.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from streamtalk.errors import ModelError

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
LARGEST = 2**31
"""Above every size and count."""

LANDMARKS = ("lip_pairs", "mouth_corners", "lids")
"""Arrays of vertex numbers in the identity file, each where the face names it: inner upper and lower lip [n, 2],
left and right corner [2], left and right eye's upper and lower margin [2, 2]."""

FRAME = "frame"
AUDIO_ENCODER = "audio_encoder"
Precision = Literal["fp32", "fp16", "fused", "int8"]
"""`fused` is float16 in onnxruntime's own operators, for its GPU backend alone."""


class Tensor(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One graph input or output. A dynamic axis is given by its name."""

    name: str
    dtype: Literal["float32", "int64", "bool"]
    shape: tuple[int | str, ...]


class Graph(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One ONNX file. `files` maps it and its external data (paths within the directory) to SHA-256 sums."""

    file: str
    files: dict[str, str]
    precision: Precision
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
    """A line of the parity certificate: an error measured against the torch model, and its bound.

    A `bound` of None marks a figure that is stated but not gated, such as what streaming features cost.
    """

    subject: str
    quantity: str
    frames: int
    measured: float
    bound: float | None


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The contents of `manifest.json`. Sizes are those of the letters in the README's model section."""

    schema: int
    name: str
    exporter_version: str
    checkpoint_sha256: str
    batch: int
    encoder_batch: int
    """Windows that one run of the audio encoder hears; where more voices have a hop due, it runs again."""
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
    float32_frames: bool = False
    """Whether float16 was too coarse for all but the audio encoder: then the other fp16 graphs are float32 ones."""
    engines: tuple[Engine, ...] = ()
    probe: Asset | None = None
    """Inputs and expected outputs that an engine must reproduce on a device before it is trusted there."""
    parity: tuple[Parity, ...] = ()

    def told(self, precision: Precision) -> str:
        """A precision, for people."""
        return "fp16, frames in fp32" if precision == "fp16" and self.float32_frames else precision

    def check(self, where: Path) -> None:
        """Refuse values that no exporter writes. Raises ModelError."""
        positive = (
            "batch encoder_batch fps sample_rate n_vertices latent_width condition_width audio_width layers heads "
            "window_samples hop history decode_window period steps metres_per_unit"
        )
        for field in positive.split():
            if not 0 < getattr(self, field) < LARGEST:
                raise ModelError(
                    f"{where}: {field} must be positive and below {LARGEST}; it is {getattr(self, field)}."
                )
        if self.encoder_batch > self.batch:
            raise ModelError(f"{where}: encoder_batch {self.encoder_batch} is more than batch {self.batch}.")
        last_frame = -(-(self.hop - 1) * self.sample_rate // self.fps)
        window = self.context_samples + last_frame + self.lookahead_samples
        if self.context_samples < 0 or self.window_samples != window:
            raise ModelError(
                f"{where}: window_samples is {self.window_samples}; context, hop and lookahead add up to "
                f"{window}. Export again."
            )
        if self.schema != SCHEMA_VERSION:
            raise ModelError(
                f"{where}: manifest schema {self.schema}, this version reads {SCHEMA_VERSION}; "
                "export again with the matching version."
            )


def graph_key(name: str, precision: Precision) -> str:
    """The key in `Manifest.graphs` of graph `name` at a precision: all but float32 carry a suffix."""
    return name if precision == "fp32" else f"{name}.{precision}"


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


def verified(directory: Path, name: str, expected: str) -> Path:
    """Path of file `name` in `directory` after its SHA-256 was compared. Raises ModelError."""
    path = directory / name
    try:
        outside = "\0" in name or directory.resolve() not in path.resolve().parents
        missing = not outside and not path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links before Python 3.13
        raise ModelError(f"{name!r} in the manifest cannot be read: {error}. Export again.") from error
    if outside:
        raise ModelError(f"{name!r} in the manifest points outside {directory}; refusing to load it.")
    if missing:
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
