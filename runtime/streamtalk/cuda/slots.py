"""All slots of a batch on a GPU: everything taken at open, state that never leaves the device, one launch a turn.

A turn's graph holds its packed upload (noise, counters, who is active), the row of audio features that the turn
reads, the engine, and the download of its vertices. It is captured once for each side of the state's ping-pong and
each row. The encoder has its own stream and graph, and waits for no frame: only for the copy of its last output (a
second run for the same step, where a small encoder needs one, so for the frames before that copy).

Slots are at different places in their hops. So that a turn can read the features of all of them with one copy, they
are laid out by the turn that will read them: `ring` is [hop, B, A], and turn t reads row t % hop. The frames of a
hop follow each other turn by turn, so a hop is laid out once; if they do not, as after a `restore`, it is again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.backends.protocol import Float32, LaneState
from streamtalk.backends.slots import Counts, Mask, encoder_runs, stretches
from streamtalk.cuda.array import DeviceArray
from streamtalk.cuda.driver import Bytes, Driver, Handle
from streamtalk.cuda.engine import DeviceEngine, Plan, Run, size_bytes
from streamtalk.errors import BackendError
from streamtalk.manifest import Manifest

UPLOADED = ("noise", "position", "valid_frames", "valid_latents", "active")
"""Inputs of the frame graph that change with every turn and come from the host: one packed copy."""
KV_CACHES, LATENTS = ("kv_cache", "kv_cache_out"), ("latents", "latents_out")
"""Both sides of the state: what turn t reads has number t % 2."""
NOT_LAID = -1


class CudaSlots:
    """See `slots.Slots`. With `download` False vertices stay on the device, see `device_vertices`, and `vertices`
    is empty. `width` is how many of the slots are used, from the first: only their vertices are downloaded.
    """

    def __init__(
        self,
        driver: Driver,
        encoder: DeviceEngine,
        frame: DeviceEngine,
        manifest: Manifest,
        start_latent: Float32,
        width: int,
        download: bool,
    ) -> None:
        self._driver, self._manifest = driver, manifest
        self._width, self._download = width, download
        self._closers: list[Callable[[], None]] = []
        with driver.current():
            try:
                self._take_memory(encoder, frame)
                self._take_streams()
                driver.clear(min(self._device.values()), self._plan.total, self._frame_stream)
                self._put(self._device["start_latent"], start_latent.astype(np.float32))
                self._bind(encoder, frame)
                for slot in range(manifest.batch):
                    self._clear(slot)
                driver.drain(self._frame_stream)
            except BaseException:
                self.close()
                raise

    def start(self, slot: int, style: Float32, template: Float32) -> None:
        """Give a slot to a voice."""
        with self._driver.current():
            self._put(self._row("style", slot), style.astype(np.float32))
            self._put(self._row("template", slot), template.astype(np.float32))
        self.reset(slot)

    def reset(self, slot: int) -> None:
        """Empty both sides of a slot's state and copy the start latent into their newest places."""
        with self._driver.current():
            self._clear(slot)

    def encode(self, due: Mask) -> None:
        """Start the audio encoder on its own stream, and the copy of what the slots in `due` get behind the frames
        that are in flight.
        """
        driver, device, hop_bytes = self._driver, self._device, self._row_bytes["features"]
        window_bytes = 4 * self._manifest.window_samples
        self._laid[due] = NOT_LAID
        with driver.current():
            # The last upload must have left the pinned block.
            driver.synchronize(self._heard)
            for parts in encoder_runs(due, self._manifest.encoder_batch):
                for slot, row, count in parts:
                    last = slot + count
                    self._pinned_pcm[slot:last] = self.pcm[slot:last]  # `where` would take 7 times as long
                    driver.upload(
                        device["pcm"] + row * window_bytes,
                        self._pinned_pcm_bytes[slot * window_bytes : last * window_bytes],
                        self._encoder_stream,
                    )
                driver.record(self._heard, self._encoder_stream)
                # The last output must have been copied.
                driver.wait(self._encoder_stream, self._kept)
                self._launch_encoder()
                driver.record(self._encoded, self._encoder_stream)
                driver.wait(self._frame_stream, self._encoded)
                for slot, row, count in parts:
                    driver.copy(
                        device["features"] + slot * hop_bytes,
                        device["audio_features"] + row * hop_bytes,
                        count * hop_bytes,
                        self._frame_stream,
                    )
                driver.record(self._kept, self._frame_stream)

    def frame(self, turn: int, frames: Counts, active: Mask) -> None:
        """Start turn `turn`: one launch, and at the beginning of a hop the layout of its features."""
        driver, m, side = self._driver, self._manifest, turn % 2
        upload = self._upload[side]
        with driver.current():
            # The graph of the turn before last reads the pinned block that is written here.
            driver.synchronize(self._sent[side])
            # As `protocol.counters`, for all slots at once and into what is uploaded.
            np.copyto(upload["noise"], self.noise)
            np.remainder(frames, m.period, out=upload["position"])
            np.minimum(frames, m.history, out=upload["valid_frames"])
            np.add(frames, 1, out=upload["valid_latents"])
            np.minimum(upload["valid_latents"], m.decode_window, out=upload["valid_latents"])
            np.copyto(upload["active"], active)
            self._lay_out(turn, frames, active)
            self._launch_frame[turn % len(self._launch_frame)]()
            driver.record(self._sent[side], self._frame_stream)
            driver.record(self._done, self._frame_stream)

    def vertices(self) -> Float32:
        """Wait for the newest turn [width, V, 3], in the pinned buffer that the device writes to. Where nothing is
        downloaded it does not wait, and is [width, 0, 3].
        """
        if self._download:
            with self._driver.current():
                self._driver.synchronize(self._done)
        return self._vertices

    @property
    def device_vertices(self) -> DeviceArray:
        """The newest turn's vertices [width, V, 3] where they were computed."""
        return self._device_vertices

    def state(self, slot: int, turn: int) -> LaneState:
        """A copy of a slot's state before turn `turn`. Not for the steady loop: it waits and allocates."""
        m, side = self._manifest, turn % 2
        kv_cache = (m.layers, 2, m.heads, m.history, m.condition_width // m.heads)
        with self._driver.current():
            return LaneState(
                features=self._get("features", slot, (m.hop, m.audio_width)),
                kv_cache=self._get(KV_CACHES[side], slot, kv_cache),
                latents=self._get(LATENTS[side], slot, (m.decode_window, m.latent_width)),
            )

    def restore(self, slot: int, turn: int, state: LaneState) -> None:
        """Take a slot's state before turn `turn` from a copy."""
        side = turn % 2
        with self._driver.current():
            self._put(self._row("features", slot), state.features)
            self._put(self._row(KV_CACHES[side], slot), state.kv_cache)
            self._put(self._row(LATENTS[side], slot), state.latents)
        self._laid[slot] = NOT_LAID

    def close(self) -> None:
        """Wait for what is in flight and give everything back, in the reverse order of taking. What fails does not
        keep the rest from going back; the first failure is raised then.
        """
        failures: list[BackendError] = []
        if self._closers:
            with self._driver.current():
                while self._closers:
                    try:
                        self._closers.pop()()
                    except BackendError as error:
                        failures.append(error)
        # What launches refers to these slots: without that, pinned memory goes when they do.
        self._launch_encoder, self._launch_frame = _closed, [_closed]
        if failures:
            raise failures[0]

    def _lay_out(self, turn: int, frames: Counts, active: Mask) -> None:
        """Bring the features of active slots to the rows of the ring that their turns will read."""
        m, row = self._manifest, 4 * self._manifest.audio_width
        np.subtract(turn, frames, out=self._shift)
        np.remainder(self._shift, m.hop, out=self._shift)
        np.not_equal(self._shift, self._laid, out=self._stale)
        np.logical_and(self._stale, active, out=self._stale)
        if not self._stale.any():
            return
        ring, features = self._device["ring"], self._device["features"]
        for shift in range(m.hop):
            for _, first, count in stretches(np.flatnonzero(self._stale & (self._shift == shift))):
                for place in range(m.hop):
                    self._driver.copy_rows(
                        ring + ((place + shift) % m.hop * m.batch + first) * row,
                        row,
                        features + (first * m.hop + place) * row,
                        m.hop * row,
                        row,
                        count,
                        self._frame_stream,
                    )
        np.copyto(self._laid, self._shift, where=self._stale)

    def _clear(self, slot: int) -> None:
        """Put a slot into the state before frame 0, behind what is in flight."""
        driver, m, stream = self._driver, self._manifest, self._frame_stream
        self.pcm[slot], self.noise[slot], self._laid[slot] = 0, 0, NOT_LAID
        for name in ("features", *KV_CACHES, *LATENTS):
            driver.clear(self._row(name, slot), self._row_bytes[name], stream)
        latent = 4 * m.latent_width
        for name in LATENTS:
            newest = self._row(name, slot) + latent * (m.decode_window - 1)
            driver.copy(newest, self._device["start_latent"], latent, stream)

    def _take_memory(self, encoder: DeviceEngine, frame: DeviceEngine) -> None:
        driver, m = self._driver, self._manifest
        tensors = [*frame.graph.inputs, *frame.graph.outputs, *encoder.graph.inputs, *encoder.graph.outputs]
        sizes = {tensor.name: size_bytes(tensor) for tensor in tensors}
        features = 4 * m.batch * m.hop * m.audio_width
        windows = 4 * m.batch * m.window_samples
        # The uploaded ones come first, so that one copy serves them all.
        ordered = {name: sizes[name] for name in UPLOADED} | sizes
        ordered |= {"features": features, "ring": features, "start_latent": 4 * m.latent_width}
        self._plan = Plan.of(ordered)
        by_slot = ("style", "template", "features", *KV_CACHES, *LATENTS)
        self._row_bytes = {name: ordered[name] // m.batch for name in by_slot}
        base = driver.device_memory(self._plan.total)
        self._closers.append(lambda: driver.release([base]))
        self._device = {name: base + offset for name, offset in self._plan.offsets.items()}
        packed = Plan.of({name: sizes[name] for name in UPLOADED}).total
        host = Plan.of(
            {
                "upload": packed,
                "upload of odd turns": packed,
                "pcm": windows,
                "vertices": 12 * m.n_vertices * self._width if self._download else 0,
                "spare": max(self._row_bytes.values()),
            }
        )
        pinned = driver.pinned_memory(host.total)
        pinned[:] = 0

        def block(name: str) -> Bytes:
            return pinned[host.offsets[name] : host.offsets[name] + host.sizes[name]]

        self._upload_bytes = block("upload"), block("upload of odd turns")
        self._pinned_pcm_bytes = block("pcm")
        self._vertex_bytes, self._spare = block("vertices"), block("spare")
        shapes = {t.name: ([int(n) for n in t.shape], t.dtype) for t in frame.graph.inputs}
        self._upload: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for name in UPLOADED:
            shape, dtype = shapes[name]
            start = self._plan.offsets[name]
            for views, side in zip(self._upload, self._upload_bytes, strict=True):
                views[name] = side[start : start + sizes[name]].view(dtype).reshape(shape)
        self._pinned_pcm = self._pinned_pcm_bytes.view(np.float32).reshape(m.batch, -1)
        self.pcm: Float32 = np.zeros((m.batch, m.window_samples), np.float32)
        self.noise: Float32 = np.zeros((m.batch, m.latent_width), np.float32)
        rows = m.n_vertices if self._download else 0
        self._vertices: Float32 = self._vertex_bytes.view(np.float32).reshape(self._width, rows, 3)
        self._vertices.flags.writeable = False
        self._laid, self._shift = np.full(m.batch, NOT_LAID, np.int64), np.zeros(m.batch, np.int64)
        self._stale = np.zeros(m.batch, np.bool_)

    def _take_streams(self) -> None:
        driver = self._driver
        own: list[Handle] = []
        # Taken now, discarded in `close` after both streams are empty.
        self._closers.append(lambda: driver.discard(own))

        def taken(handle: Handle) -> Handle:
            own.append(handle)
            return handle

        def event() -> Handle:
            return taken(driver.event())

        self._encoder_stream, self._frame_stream = taken(driver.stream()), taken(driver.stream())
        self._heard, self._encoded, self._kept, self._done = event(), event(), event(), event()
        self._sent = event(), event()
        self._device_vertices = DeviceArray(
            driver,
            self._device["vertices"],
            (self._width, self._manifest.n_vertices, 3),
            self._frame_stream,
            self._done,
            event(),
        )

    def _bind(self, encoder: DeviceEngine, frame: DeviceEngine) -> None:
        """Bind the encoder, both sides of the frame, and capture what a turn is."""
        driver, m, device = self._driver, self._manifest, self._device

        def bound(engine: DeviceEngine, addresses: dict[str, int], stream: Handle) -> Run:
            run = engine.bind(addresses, stream)
            self._closers.append(run.close)
            return run

        names = [t.name for t in (*encoder.graph.inputs, *encoder.graph.outputs)]
        heard = bound(encoder, {name: device[name] for name in names}, self._encoder_stream)
        names = [t.name for t in (*frame.graph.inputs, *frame.graph.outputs)]
        front = {name: device[name] for name in names}
        back = front | {
            "kv_cache": front["kv_cache_out"],
            "kv_cache_out": front["kv_cache"],
            "latents": front["latents_out"],
            "latents_out": front["latents"],
        }
        sides = [bound(frame, addresses, self._frame_stream) for addresses in (front, back)]
        row = self._plan.sizes["audio_feature"]

        def turn_body(turn: int) -> Callable[[], None]:
            side, ring_row, packed = sides[turn % 2], turn % m.hop, self._upload_bytes[turn % 2]

            def enqueue() -> None:
                stream = self._frame_stream
                driver.upload(device[UPLOADED[0]], packed, stream)
                driver.copy(device["audio_feature"], device["ring"] + ring_row * row, row, stream)
                side.enqueue(stream)
                if self._download:
                    driver.download(self._vertex_bytes, device["vertices"], stream)

            return enqueue

        bodies = [turn_body(turn) for turn in range(lcm(2, m.hop))]
        # Last taken, first given back: nothing may be in flight when the rest goes.
        graphs: list[Handle] = []
        self._closers.append(lambda: driver.discard(graphs))
        self._closers.append(lambda: driver.drain(self._frame_stream))
        self._closers.append(lambda: driver.drain(self._encoder_stream))

        plain: list[DeviceEngine] = []

        def ready(engine: DeviceEngine, stream: Handle, enqueue: Callable[[], None]) -> Callable[[], None]:
            if not engine.capturable or engine in plain:
                return enqueue
            try:
                graphs.append(graph := driver.capture(stream, enqueue))
            except BackendError as error:
                # Still right, launch by launch, until the next open: it may have been for want of memory. Classic
                # TensorRT does not tell beforehand what it cannot capture.
                plain.append(engine)
                warnings.warn(f"No CUDA graph, so frames take longer: {error}", RuntimeWarning, stacklevel=2)
                return enqueue
            return lambda: driver.launch(graph, stream)

        driver.drain(self._frame_stream)
        driver.drain(self._encoder_stream)
        self._launch_encoder = ready(
            encoder, self._encoder_stream, lambda: heard.enqueue(self._encoder_stream)
        )
        self._launch_frame = [ready(frame, self._frame_stream, body) for body in bodies]

    def _row(self, name: str, slot: int) -> int:
        """Address of a slot's part of a tensor."""
        return self._device[name] + slot * self._row_bytes[name]

    def _put(self, target: int, values: npt.NDArray[Any]) -> None:
        """Copy an array to the device, to its end, through pinned memory."""
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._spare[: len(flat)] = flat
        self._driver.upload(target, self._spare[: len(flat)], self._frame_stream)
        self._driver.drain(self._frame_stream)

    def _get(self, name: str, slot: int, shape: tuple[int, ...]) -> Float32:
        """Copy a slot's part of a float32 tensor from the device."""
        size = 4 * int(np.prod(shape))
        self._driver.download(self._spare[:size], self._row(name, slot), self._frame_stream)
        self._driver.drain(self._frame_stream)
        values: Float32 = self._spare[:size].view(np.float32).reshape(shape).copy()
        return values


def _closed() -> None:
    raise BackendError("These slots were given back.")
