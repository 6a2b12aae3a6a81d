"""One voice on a GPU: everything taken at open, state that never leaves the device, one launch a frame.

A frame's graph holds its packed upload (noise and counters), the choice of its audio feature, the engine and the
download of its vertices. It is captured once for each side of the state's ping-pong and each place in the hop.
The encoder has its own stream and graph. The host sleeps on events; it never spins.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import Any

import numpy as np

from streamtalk.backends.protocol import Float32, LaneState, counters
from streamtalk.cuda.driver import Bytes, Driver, Handle
from streamtalk.cuda.engine import DeviceEngine, Plan, Run, size_bytes
from streamtalk.manifest import Manifest

UPLOADED = ("noise", "position", "valid_frames", "valid_latents")
"""Inputs of the frame graph that change with every frame and come from the host: one packed copy."""


class CudaLane:
    """See `protocol.Lane`. Slot 0 of the batch is the voice's, the others stay inactive."""

    def __init__(
        self,
        driver: Driver,
        encoder: DeviceEngine,
        frame: DeviceEngine,
        manifest: Manifest,
        style: Float32,
        template: Float32,
        start_latent: Float32,
    ) -> None:
        self._driver, self._manifest, self._start_latent = driver, manifest, start_latent
        self._closers: list[Callable[[], None]] = []
        try:
            self._take_memory(encoder, frame)
            self._take_streams(encoder, frame)
            self._set_constants(style, template)
            self._bind(encoder, frame)
            self.reset()
        except BaseException:
            self.close()
            raise

    def reset(self) -> None:
        """Empty both sides of the state and put the start latent into the newest slot of side 0."""
        driver, stream = self._driver, self._frame_stream
        driver.drain(self._encoder_stream)
        driver.drain(stream)
        for name in ("audio_features", "kv_cache", "latents", "kv_cache_out", "latents_out"):
            driver.clear(self._device[name], self._plan.sizes[name], stream)
        row = self._start_latent.astype(np.float32)
        self._put(self._newest_latent(), row)
        driver.drain(stream)

    def encode(self) -> None:
        """Start the audio encoder on `pcm`, on its own stream; the next frame waits for it on the device."""
        driver = self._driver
        # The last upload must have left the pinned block, the last frame the features.
        driver.synchronize(self._heard)
        self._pinned_pcm[:] = self.pcm
        driver.wait(self._encoder_stream, self._done)
        driver.upload(self._device["pcm"], self._pinned_pcm_bytes, self._encoder_stream)
        driver.record(self._heard, self._encoder_stream)
        self._launch_encoder()
        driver.record(self._encoded, self._encoder_stream)

    def frame(self, index: int) -> None:
        """Start frame `index`: one launch."""
        driver, now = self._driver, counters(index, self._manifest)
        # The graph before reads the pinned block that is written here.
        driver.synchronize(self._done)
        self._upload["noise"][0] = self.noise
        self._upload["position"].fill(now.position)
        self._upload["valid_frames"].fill(now.valid_frames)
        self._upload["valid_latents"].fill(now.valid_latents)
        driver.wait(self._frame_stream, self._encoded)
        self._launch_frame[index % len(self._launch_frame)]()
        driver.record(self._done, self._frame_stream)

    def vertices(self) -> Float32:
        """Wait for the newest frame [V, 3], in the pinned buffer that the device writes to."""
        self._driver.synchronize(self._done)
        return self._vertices

    def state(self, index: int) -> LaneState:
        """A copy of the state before frame `index`. Not for the steady loop: it waits and allocates."""
        m, side = self._manifest, index % 2
        kv_cache = (m.layers, 2, m.heads, m.history, m.condition_width // m.heads)
        self._driver.drain(self._encoder_stream)
        return LaneState(
            features=self._get("audio_features", (m.hop, m.audio_width)),
            kv_cache=self._get(("kv_cache", "kv_cache_out")[side], kv_cache),
            latents=self._get(("latents", "latents_out")[side], (m.decode_window, m.latent_width)),
        )

    def restore(self, index: int, state: LaneState) -> None:
        """Take the state before frame `index` from a copy."""
        side = index % 2
        self._driver.drain(self._encoder_stream)
        self._driver.drain(self._frame_stream)
        self._put(self._device["audio_features"], state.features)
        self._put(self._device[("kv_cache", "kv_cache_out")[side]], state.kv_cache)
        self._put(self._device[("latents", "latents_out")[side]], state.latents)

    def close(self) -> None:
        """Wait for what is in flight and give everything back, in the reverse order of taking."""
        while self._closers:
            self._closers.pop()()

    def _take_memory(self, encoder: DeviceEngine, frame: DeviceEngine) -> None:
        driver = self._driver
        tensors = [*frame.graph.inputs, *frame.graph.outputs, *encoder.graph.inputs, *encoder.graph.outputs]
        sizes = {tensor.name: size_bytes(tensor) for tensor in tensors}
        # The uploaded ones come first, so that one copy serves them all.
        ordered = {name: sizes[name] for name in UPLOADED} | sizes
        self._plan = Plan.of(ordered)
        base = driver.device_memory(self._plan.total)
        self._closers.append(lambda: driver.release([base], []))
        self._device = {name: base + offset for name, offset in self._plan.offsets.items()}
        m = self._manifest
        host = Plan.of(
            {
                "upload": Plan.of({name: sizes[name] for name in UPLOADED}).total,
                "pcm": sizes["pcm"],
                "vertices": 12 * m.n_vertices,
                "spare": max(sizes.values()),
            }
        )
        pinned = driver.pinned_memory(host.total)
        self._closers.append(lambda: driver.release([], [pinned]))
        pinned[:] = 0

        def block(name: str) -> Bytes:
            return pinned[host.offsets[name] : host.offsets[name] + host.sizes[name]]

        self._upload_bytes, self._pinned_pcm_bytes = block("upload"), block("pcm")
        self._vertex_bytes, self._spare = block("vertices"), block("spare")
        shapes = {t.name: (t.shape, t.dtype) for t in frame.graph.inputs}
        self._upload: dict[str, Any] = {}
        for name in UPLOADED:
            shape, dtype = shapes[name]
            start = self._plan.offsets[name]
            self._upload[name] = (
                self._upload_bytes[start : start + sizes[name]].view(dtype).reshape([int(n) for n in shape])
            )
        self._pinned_pcm = self._pinned_pcm_bytes.view(np.float32).reshape(m.batch, -1)[0]
        self.pcm: Float32 = np.zeros(m.window_samples, np.float32)
        self.noise: Float32 = np.zeros(m.latent_width, np.float32)
        self._vertices: Float32 = self._vertex_bytes.view(np.float32).reshape(m.n_vertices, 3)
        self._vertices.flags.writeable = False

    def _take_streams(self, encoder: DeviceEngine, frame: DeviceEngine) -> None:
        driver = self._driver
        own: list[Handle] = []
        # Taken now, discarded in `close` after both streams are empty.
        self._closers.append(lambda: driver.discard(own))

        def stream_for(engine: DeviceEngine) -> Handle:
            if engine.stream is not None:
                return engine.stream
            own.append(stream := driver.stream())
            return stream

        def event() -> Handle:
            own.append(made := driver.event())
            return made

        self._encoder_stream, self._frame_stream = stream_for(encoder), stream_for(frame)
        self._heard, self._encoded, self._done = event(), event(), event()

    def _set_constants(self, style: Float32, template: Float32) -> None:
        driver, stream = self._driver, self._frame_stream
        driver.clear(min(self._device.values()), self._plan.total, stream)
        self._put(self._device["style"], style)
        self._put(self._device["template"], template)
        self._put(self._device["active"], np.ones(1, np.bool_))

    def _bind(self, encoder: DeviceEngine, frame: DeviceEngine) -> None:
        """Bind the encoder, both sides of the frame, and capture what a frame is."""
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
        row = 4 * m.audio_width

        def frame_body(side: Run, place: int) -> Callable[[], None]:
            def enqueue() -> None:
                stream = self._frame_stream
                driver.upload(device[UPLOADED[0]], self._upload_bytes, stream)
                driver.copy(device["audio_feature"], device["audio_features"] + place * row, row, stream)
                side.enqueue(stream)
                driver.download(self._vertex_bytes, device["vertices"], stream)

            return enqueue

        bodies = [frame_body(sides[i % 2], i % m.hop) for i in range(lcm(2, m.hop))]
        # Last taken, first given back: nothing may be in flight when the rest goes.
        graphs: list[Handle] = []
        self._closers.append(lambda: driver.discard(graphs))
        self._closers.append(lambda: driver.drain(self._frame_stream))
        self._closers.append(lambda: driver.drain(self._encoder_stream))

        def ready(engine: DeviceEngine, stream: Handle, enqueue: Callable[[], None]) -> Callable[[], None]:
            if not engine.capturable:
                return enqueue
            graphs.append(graph := driver.capture(stream, enqueue))
            return lambda: driver.launch(graph, stream)

        driver.drain(self._frame_stream)
        driver.drain(self._encoder_stream)
        self._launch_encoder = ready(
            encoder, self._encoder_stream, lambda: heard.enqueue(self._encoder_stream)
        )
        self._launch_frame = [ready(frame, self._frame_stream, body) for body in bodies]

    def _newest_latent(self) -> int:
        m = self._manifest
        return self._device["latents"] + 4 * m.latent_width * (m.decode_window - 1)

    def _put(self, target: int, values: Any) -> None:
        """Copy an array to the device, to its end, through pinned memory."""
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._spare[: len(flat)] = flat
        self._driver.upload(target, self._spare[: len(flat)], self._frame_stream)
        self._driver.drain(self._frame_stream)

    def _get(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Copy slot 0 of a tensor from the device."""
        size = 4 * int(np.prod(shape))
        self._driver.download(self._spare[:size], self._device[name], self._frame_stream)
        self._driver.drain(self._frame_stream)
        values: Float32 = self._spare[:size].view(np.float32).reshape(shape).copy()
        return values
