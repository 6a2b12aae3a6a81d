"""A model on a GPU: its hop graphs as loaded engines, and the rows that run on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from streamtalk.backends.cuda.driver import Driver
from streamtalk.backends.cuda.engine import DeviceEngine
from streamtalk.backends.cuda.rows import CudaRows
from streamtalk.backends.probe import require_probe
from streamtalk.model import Manifest, Precision
from streamtalk.rows import Float32


@dataclass(frozen=True)
class CudaBackend:
    """See `rows.Backend`. With `download` False vertices stay on the device.

    `load` gives the engine of a number of rows, and is called once for each.
    """

    name: str
    description: str
    fingerprint: str
    precision: Precision
    driver: Driver
    directory: Path
    manifest: Manifest
    load: Callable[[int], DeviceEngine]
    engines: dict[int, DeviceEngine] = field(default_factory=dict)
    download: bool = True
    _loading: Lock = field(default_factory=Lock)

    def rows(self, count: int, start_latent: Float32) -> CudaRows:
        """Allocate everything that rows need on the device.

        Raises BackendError where their engine cannot be loaded or does not reproduce the model's probe.
        """
        return CudaRows(self.driver, self.engine(count), self.manifest, start_latent, self.download)

    def on_device(self) -> CudaBackend:
        """The same engines, without a download."""
        return replace(self, download=False)

    def engine(self, count: int) -> DeviceEngine:
        """The engine of a number of rows. One that is loaded now must reproduce the model's probe first."""
        with self._loading:
            if count not in self.engines:
                engine = self.load(count)
                fingerprint = f"{self.fingerprint}; {engine.fingerprint}"
                alone = replace(
                    self, fingerprint=fingerprint, engines={count: engine}, download=True, _loading=Lock()
                )
                require_probe(alone, self.directory, self.manifest, count)
                self.engines[count] = engine
            return self.engines[count]
