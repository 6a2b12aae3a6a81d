"""A model on a GPU: two loaded engines, and the voices that run on them."""

from __future__ import annotations

from dataclasses import dataclass

from streamtalk.backends.protocol import Float32
from streamtalk.cuda.driver import Driver
from streamtalk.cuda.engine import DeviceEngine
from streamtalk.cuda.lane import CudaLane
from streamtalk.cuda.slots import CudaSlots
from streamtalk.manifest import Manifest, Precision


@dataclass(frozen=True)
class CudaBackend:
    """See `protocol.Backend` and `slots.SlotBackend`. With `download` False vertices stay on the device."""

    name: str
    description: str
    fingerprint: str
    precision: Precision
    driver: Driver
    encoder: DeviceEngine
    frame: DeviceEngine
    manifest: Manifest
    download: bool = True

    def lane(self, style: Float32, template: Float32, start_latent: Float32) -> CudaLane:
        """Take everything that one voice needs on the device."""
        engines = (self.driver, self.encoder, self.frame, self.manifest)
        return CudaLane(*engines, style, template, start_latent, self.download)

    def slots(self, start_latent: Float32) -> CudaSlots:
        """Take everything that a batch needs on the device."""
        engines = (self.driver, self.encoder, self.frame, self.manifest)
        return CudaSlots(*engines, start_latent, self.manifest.batch, self.download)
