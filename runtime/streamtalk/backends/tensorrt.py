"""The graphs as TensorRT engines, classic or RTX, behind a captured CUDA graph a frame."""

from __future__ import annotations

from pathlib import Path

from streamtalk.cuda.backend import CudaBackend
from streamtalk.cuda.driver import open_driver
from streamtalk.cuda.tensorrt import Library
from streamtalk.engine_file import RTX, check_engines, find_engines
from streamtalk.manifest import AUDIO_ENCODER, FRAME, Manifest, Precision

__all__ = ["CLASSIC", "RTX", "load"]

CLASSIC = "tensorrt"


def load(name: str, directory: Path, manifest: Manifest, precision: Precision) -> CudaBackend:
    """Engines of the audio encoder and the frame graph at a precision, on one GPU. Raises BackendError,
    MissingDependencyError and, for an engine that is not what the manifest says, ModelError.
    """
    check_engines(directory, manifest, name, precision)
    library = Library(name)
    driver = open_driver()
    capability = driver.compute_capability
    graphs = (AUDIO_ENCODER, FRAME)
    fits = find_engines(directory, manifest, graphs, name, library.version, capability, precision)
    encoder, frame = (library.load(fits[graph], driver) for graph in graphs)
    built = fits[FRAME].engine
    description = f"{name} {library.version}, {manifest.told(built.precision)}, {driver.description}"
    hashes = ", ".join(fits[graph].engine.sha256 for graph in graphs)
    device = f"{driver.build}; compute capability {capability}"
    fingerprint = f"{description}; {device}; {' '.join(built.flags)}; {hashes}"
    return CudaBackend(name, description, fingerprint, built.precision, driver, encoder, frame, manifest)
