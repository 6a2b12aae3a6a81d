"""Engine files: which of a model's engines fits this library and device, and what a file says about itself.

An engine is code: it is never deserialised before its hash was compared with the manifest's.
"""

from __future__ import annotations

import hashlib
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamtalk.errors import BackendError, ModelError
from streamtalk.model import Engine, Graph, Manifest, Precision, contained, graph_key, hop_name

ANY = "any"
RTX: Literal["tensorrt_rtx"] = "tensorrt_rtx"
RTX_HEADER_BYTES = 64
RTX_MAGIC = b"vtrt"


@dataclass(frozen=True)
class RtxHeader:
    """What the first bytes of a TensorRT-RTX engine say."""

    size_bytes: int
    version: str


def read_rtx_header(file: Path) -> RtxHeader:
    """The header of a TensorRT-RTX engine, checked against the file's length. Raises ModelError.

    Laid out (observed with 1.7) as the magic, three words, the size as a 64-bit number, the version as four bytes.
    """
    with file.open("rb") as stream:
        head = stream.read(RTX_HEADER_BYTES)
    if len(head) < RTX_HEADER_BYTES or head[:4] != RTX_MAGIC:
        raise ModelError(f"{file} is no TensorRT-RTX engine. Build it again.")
    (size,) = struct.unpack_from("<Q", head, 16)
    actual = file.stat().st_size
    if size != actual:
        raise ModelError(
            f"{file} has {actual} bytes, its header says {size}: it was cut off. Build it again."
        )
    return RtxHeader(size, ".".join(str(byte) for byte in head[24:28]))


@dataclass(frozen=True)
class Fit:
    """An engine that may be loaded, the graph that it was built from, and its file."""

    engine: Engine
    graph: Graph
    path: Path

    def read(self) -> bytes:
        """Return the file's bytes, whose SHA-256 is the manifest's. Raises ModelError.

        The bytes that are compared are those that are deserialised: the file is read once.
        """
        try:
            plan = self.path.read_bytes()
        except OSError as error:
            raise ModelError(
                f"Cannot read {self.path}: {error.strerror or error}. Build it again."
            ) from error
        actual = hashlib.sha256(plan).hexdigest()
        if actual != self.engine.sha256:
            raise ModelError(
                f"{self.path} is not the engine that was built: SHA-256 {actual[:12]}..., the manifest says "
                f"{self.engine.sha256[:12]}.... Build it again."
            )
        return plan


def how_to_build(directory: Path, backend: str) -> str:
    """The command that builds a model's engines for a backend."""
    return f"streamtalk build {shlex.quote(str(directory))} --backend {backend}"


def require_engines(directory: Path, manifest: Manifest, backend: str, precision: Precision) -> None:
    """Raise BackendError unless the manifest lists engines of a backend at a precision. Takes no library and no GPU."""
    if not any((engine.backend, engine.precision) == (backend, precision) for engine in manifest.engines):
        command = how_to_build(directory, backend)
        raise BackendError(f"{directory} holds no {backend} engines; build them with `{command}`.")


def find_engine(
    directory: Path,
    manifest: Manifest,
    rows: int,
    backend: str,
    version: str,
    capability: int,
    precision: Precision,
) -> Fit:
    """The engine of the hop graph of so many rows at a precision, for this library and device.

    `version` is the installed library's, `capability` the device's (86 for 8.6). Raises BackendError where the model
    has none that fits, with the reason, and ModelError for a file outside the directory.
    """
    name = hop_name(rows)
    graph = manifest.graphs.get(graph_key(name, precision))
    reasons = []
    for engine in manifest.engines:
        if (engine.graph, engine.backend, engine.precision) != (name, backend, precision):
            continue
        reason = _misfit(engine, graph, version, capability)
        if graph is not None and reason is None:
            return Fit(engine, graph, contained(directory, engine.file))
        reasons.append(f"{engine.file} {reason}")
    raise BackendError(
        f"No {backend} engine of `{name}` in {directory} fits this machine: {'; '.join(reasons) or 'it has none'}. "
        f"Build it here with `{how_to_build(directory, backend)}`."
    )


def _misfit(engine: Engine, graph: Graph | None, version: str, capability: int) -> str | None:
    """Why an engine cannot be used, or None."""
    if graph is None or engine.graph_sha256 != graph.sha256:
        return "is stale: it was built from another graph"
    if engine.tensorrt_version != version:
        return f"was built by version {engine.tensorrt_version}, installed is {version}"
    if engine.compute_capability != ANY and str(capability) not in engine.compute_capability.split(","):
        return f"was built for compute capability {engine.compute_capability}, the GPU has {capability}"
    return None
