"""One voice on a GPU: slot 0 of slots of its own, whose turns are its frames."""

from __future__ import annotations

import numpy as np

from streamtalk.backends.protocol import Float32, LaneState
from streamtalk.cuda.array import DeviceArray
from streamtalk.cuda.driver import Driver
from streamtalk.cuda.engine import DeviceEngine
from streamtalk.cuda.slots import CudaSlots
from streamtalk.manifest import Manifest


class CudaLane:
    """See `protocol.Lane`. The other slots stay inactive."""

    def __init__(
        self,
        driver: Driver,
        encoder: DeviceEngine,
        frame: DeviceEngine,
        manifest: Manifest,
        style: Float32,
        template: Float32,
        start_latent: Float32,
        download: bool = True,
    ) -> None:
        self._slots = CudaSlots(driver, encoder, frame, manifest, start_latent, 1, download)
        try:
            self._slots.start(0, style, template)
        except BaseException:
            self._slots.close()
            raise
        self._frames = np.zeros(manifest.batch, np.int64)
        self._mine = np.zeros(manifest.batch, np.bool_)
        self._mine[0] = True
        self._device_vertices = self._slots.device_vertices.row(0)
        self.pcm: Float32 = self._slots.pcm[0]
        self.noise: Float32 = self._slots.noise[0]

    def reset(self) -> None:
        """Return to the state before frame 0."""
        self._slots.reset(0)

    def encode(self) -> None:
        """Start the audio encoder on `pcm`."""
        self._slots.encode(self._mine)

    def frame(self, index: int) -> None:
        """Start frame `index`: one launch."""
        self._frames[0] = index
        self._slots.frame(index, self._frames, self._mine)

    def vertices(self) -> Float32:
        """Wait for the newest frame [V, 3], in the pinned buffer that the device writes to; where nothing is
        downloaded it does not wait, and is [0, 3].
        """
        vertices: Float32 = self._slots.vertices()[0]
        return vertices

    @property
    def device_vertices(self) -> DeviceArray:
        """The newest frame [V, 3] where it was computed."""
        return self._device_vertices

    def state(self, index: int) -> LaneState:
        """A copy of the state before frame `index`."""
        return self._slots.state(0, index)

    def restore(self, index: int, state: LaneState) -> None:
        """Take the state before frame `index` from a copy."""
        self._slots.restore(0, index, state)

    def close(self) -> None:
        """Wait for what is in flight and give everything back."""
        self._slots.close()
