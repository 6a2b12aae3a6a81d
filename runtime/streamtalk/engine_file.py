"""Engine files: which of a model's engines fits this library and device, and what a file says about itself.

An engine is code: it is never deserialised before its hash was compared with the manifest's.
"""

from __future__ import annotations

import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamtalk.errors import BackendError, ModelError
from streamtalk.manifest import FRAME, Engine, Graph, Manifest, Precision, graph_key, verified

ANY = "any"
RTX: Literal["tensorrt_rtx"] = "tensorrt_rtx"
RTX_HEADER_BYTES = 64
RTX_MAGIC = b"vtrt"
PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32")
"""In order of preference."""


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
        raise ModelError(f"{file} is no TensorRT-RTX engine. Export again with --targets tensorrt_rtx.")
    (size,) = struct.unpack_from("<Q", head, 16)
    actual = file.stat().st_size
    if size != actual:
        raise ModelError(f"{file} has {actual} bytes, its header says {size}: it was cut off. Export again.")
    return RtxHeader(size, ".".join(str(byte) for byte in head[24:28]))


@dataclass(frozen=True)
class Fit:
    """An engine that may be loaded, and the graph that it was built from."""

    engine: Engine
    graph: Graph
    path: Path


def check_engines(
    directory: Path, manifest: Manifest, backend: str, precision: Precision | None = None
) -> None:
    """Compare the engine files that are listed for a backend, at one precision or all, with the manifest; takes neither
    library nor GPU.

    Raises BackendError where there are none, or where one is missing, cut off, renamed or foreign: `auto` goes on
    to a backend that does not need them.
    """
    own = [e for e in manifest.engines if e.backend == backend and precision in (None, e.precision)]
    if not own:
        command = how_to_build(directory, manifest, backend)
        raise BackendError(f"{directory} holds no {backend} engines; build them with `{command}`.")
    try:
        for engine in own:
            path = verified(directory, engine.file, engine.sha256)
            if backend == RTX:
                header = read_rtx_header(path)
                if header.version != engine.tensorrt_version:
                    raise ModelError(
                        f"{path} was built by TensorRT-RTX {header.version}, the manifest says "
                        f"{engine.tensorrt_version}. Export again."
                    )
    except ModelError as error:
        raise BackendError(str(error)) from error


def how_to_build(directory: Path, manifest: Manifest, backend: str) -> str:
    """The command that builds a model's engines for a backend: from its float16 graphs, which takes no torch, or
    else by exporting it again.
    """
    if graph_key(FRAME, "fp16") in manifest.graphs:
        return f"python -m streamtalk_export.engines {shlex.quote(str(directory))} --targets {backend}"
    return f"python export.py --targets onnx,{backend} --precision fp16"


def find_engines(
    directory: Path,
    manifest: Manifest,
    names: tuple[str, ...],
    backend: str,
    version: str,
    capability: int,
    precision: Precision,
) -> dict[str, Fit]:
    """Engines of the graphs `names` at a precision, for this library and device.

    `version` is the installed library's, `capability` the device's (86 for 8.6). Raises BackendError where the
    model has none that fit, with the reason. The files must have passed `check_engines`.
    """
    reasons: list[str] = []
    fits: dict[str, Fit] = {}
    for engine in manifest.engines:
        if (engine.backend, engine.precision) != (backend, precision) or engine.graph not in names:
            continue
        graph = manifest.graphs.get(graph_key(engine.graph, precision))
        problem = _misfit(engine, graph, version, capability)
        if problem:
            reasons.append(f"{engine.file} {problem}")
        elif graph is not None:
            fits[engine.graph] = Fit(engine, graph, directory / engine.file)
    if len(fits) < len(names):
        raise BackendError(
            f"No {backend} engines in {directory} fit this machine: {'; '.join(reasons) or 'some are missing'}. "
            "Build them again here."
        )
    return fits


def _misfit(engine: Engine, graph: Graph | None, version: str, capability: int) -> str | None:
    """Why an engine cannot be used, or None."""
    if graph is None or engine.graph_sha256 != graph.sha256:
        return "is stale: it was built from another graph"
    if engine.tensorrt_version != version:
        return f"was built by version {engine.tensorrt_version}, installed is {version}"
    if engine.compute_capability != ANY and str(capability) not in engine.compute_capability.split(","):
        return f"was built for compute capability {engine.compute_capability}, the GPU has {capability}"
    return None
