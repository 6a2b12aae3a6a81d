"""Rows of a hop graph on a GPU: all memory is allocated at open, and state never leaves the device.

A hop is one launch on one stream. Its CUDA graph holds the packed upload (windows, noise, counters, active rows), the
hop graph, and the download of the vertices. It is captured once for each side of the double-buffered state.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from streamtalk.backends.cuda.buffers import Buffers
from streamtalk.backends.cuda.capture import Work, captured
from streamtalk.backends.cuda.device_array import DeviceArray, Fence
from streamtalk.backends.cuda.driver import Driver, Handle
from streamtalk.backends.cuda.engine import DeviceEngine
from streamtalk.backends.onnxruntime import swapped
from streamtalk.errors import BackendError
from streamtalk.model import Manifest
from streamtalk.rows import STATE, Array, Counts, Float32, Mask, RowState


class CudaRows:
    """Rows on a GPU. See `rows.Rows`. Without `download`, vertices stay where they are computed."""

    device_vertices: DeviceArray
    """Vertices [B, hop, V, 3] of the newest launch on the device."""

    def __init__(
        self, driver: Driver, engine: DeviceEngine, manifest: Manifest, start_latent: Float32, download: bool
    ) -> None:
        self._driver, self._start_latent, self._download = driver, start_latent, download
        with driver.current(), ExitStack() as held:
            self._buffers = buffers = Buffers(driver, engine.graph, download, held)
            self._stream = stream = self._own(driver.stream(), held)
            self._sent = [self._own(driver.event(), held) for _ in buffers.blocks]
            self._done = self._own(driver.event(), held)
            fence = Fence(driver, stream, self._done, self._own(driver.event(), held))
            buffers.clear(stream)
            works = [self._work(engine, side, held) for side in range(2)]
            self._launches = captured(works, held) if engine.capturable else [work.enqueue for work in works]
            (B, hop, _, _), V = buffers.vertices.shape, manifest.n_vertices
            self.device_vertices = DeviceArray(fence, buffers.device["vertices"], (B, hop, V, 3))
            self._counts = Counts(manifest, B)
            self.frames = self._counts.frames
            self.inputs: Mapping[str, Array] = {
                name: np.zeros_like(buffers.uploads[0][name]) for name in ("pcm", "noise")
            }
            # Nothing may be in flight when the rest goes back, in the reverse order.
            held.callback(driver.drain, stream)
            self._held = held.pop_all()

    def start(self, row: int, style: Float32, template: Float32) -> None:
        """Give a row to a stream."""
        with self._driver.current():
            self._buffers.put("style", row, style, self._stream)
            self._buffers.put("template", row, template.reshape(-1), self._stream)
        self.reset(row)

    def reset(self, row: int) -> None:
        """Put a row into the state before frame 0."""
        for array in self.inputs.values():
            array[row] = 0
        state = {name: self._buffers.zeros(name) for name in STATE}
        state["latents"][-1] = self._start_latent
        self.restore(row, 0, RowState(**state))

    def launch(self, active: Mask) -> None:
        """Start a hop of the rows in `active`: one launch."""
        driver, side = self._driver, self._counts.side
        upload = self._buffers.uploads[side]
        with driver.current():
            # The launch before last reads the block that is written here.
            driver.synchronize(self._sent[side])
            for name, array in self.inputs.items():
                np.copyto(upload[name], array)
            self._counts.write(upload["position"], upload["valid_frames"], upload["valid_latents"])
            np.copyto(upload["active"], active)
            self._launches[side]()
            driver.record(self._sent[side], self._stream)
            driver.record(self._done, self._stream)

    def vertices(self) -> Float32:
        """Wait for the newest launch: vertices [B, hop, V, 3], in the pinned memory that the device writes to.

        Without a download it does not wait, and V is 0.
        """
        if self._download:
            with self._driver.current():
                self._driver.synchronize(self._done)
        return self._buffers.vertices

    def advance(self, active: Mask) -> None:
        """Make the state that the newest launch left the current one."""
        self._counts.advance(active)

    def state(self, row: int) -> RowState:
        """Copy the current state of a row. Waits for what is in flight."""
        with self._driver.current():
            return RowState(
                **{name: self._buffers.get(self._current(name), row, self._stream) for name in STATE}
            )

    def restore(self, row: int, frame: int, state: RowState) -> None:
        """Set the current state of a row. Waits for what is in flight."""
        with self._driver.current():
            for name in STATE:
                self._buffers.put(self._current(name), row, getattr(state, name), self._stream)
        self.frames[row] = frame

    def close(self) -> None:
        """Wait for what is in flight and give everything back. A failure is raised when the rest has gone back."""
        self._launches = [_closed, _closed]
        with self._driver.current():
            self._held.close()

    def _current(self, name: str) -> str:
        """Name of the tensor that holds the current side of a state."""
        return STATE[name] if self._counts.side else name

    def _own(self, handle: Handle, held: ExitStack) -> Handle:
        held.callback(self._driver.discard, handle)
        return handle

    def _work(self, engine: DeviceEngine, side: int, held: ExitStack) -> Work:
        """Bind the graph to one side of the state."""
        buffers = self._buffers
        addresses = swapped(buffers.device) if side else buffers.device
        run = engine.bind(addresses, self._stream)
        held.callback(run.close)
        return Work(
            driver=self._driver,
            stream=self._stream,
            inputs=buffers.device["pcm"],
            source=buffers.blocks[side],
            run=run,
            vertices=buffers.device["vertices"],
            target=buffers.downloaded,
        )


def _closed() -> None:
    raise BackendError("These rows are closed: no hop can be launched.")
