"""The graphs as TensorRT engines, classic or RTX, behind a captured CUDA graph a frame."""

from __future__ import annotations

from pathlib import Path

from streamtalk.backends.protocol import Float32
from streamtalk.cuda.driver import Driver, open_driver
from streamtalk.cuda.lane import CudaLane
from streamtalk.cuda.tensorrt import Library
from streamtalk.engine_file import RTX, check_engines, find_engines
from streamtalk.manifest import AUDIO_ENCODER, FRAME, Manifest

__all__ = ["CLASSIC", "RTX", "TensorRt"]

CLASSIC = "tensorrt"


class TensorRt:
    """Engines of the audio encoder and the frame graph, loaded on one GPU."""

    def __init__(self, name: str, directory: Path, manifest: Manifest) -> None:
        self.name = name
        check_engines(directory, manifest, name)
        library = Library(name)
        self._driver: Driver = open_driver()
        self._manifest = manifest
        capability = self._driver.compute_capability
        fits = find_engines(directory, manifest, (AUDIO_ENCODER, FRAME), name, library.version, capability)
        self._encoder = library.load(fits[AUDIO_ENCODER], self._driver)
        self._frame = library.load(fits[FRAME], self._driver)
        self.precision = fits[FRAME].engine.precision
        self.description = f"{name} {library.version}, {self.precision}, {self._driver.description}"
        hashes = ", ".join(fits[graph].engine.sha256 for graph in (AUDIO_ENCODER, FRAME))
        flags = " ".join(fits[FRAME].engine.flags)
        self.fingerprint = f"{self.description}; compute capability {capability}; {flags}; {hashes}"

    def lane(self, style: Float32, template: Float32, start_latent: Float32) -> CudaLane:
        """Take everything that one voice needs on the device."""
        return CudaLane(
            self._driver, self._encoder, self._frame, self._manifest, style, template, start_latent
        )
