"""The graphs in onnxruntime on the CPU: bound once to preallocated memory, nothing allocated by a frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.backends.contract import compare, declared
from streamtalk.backends.protocol import Float32, LaneState
from streamtalk.backends.slots import Counts, Mask, encoder_runs
from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.manifest import (
    AUDIO_ENCODER,
    FRAME,
    Graph,
    Manifest,
    Precision,
    Tensor,
    graph_key,
    verified_graph,
)

NAME = "onnxruntime-cpu"
PROVIDERS = ["CPUExecutionProvider"]
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}
Array = npt.NDArray[Any]


class OnnxRuntimeCpu:
    """Sessions of the audio encoder and of the frame graph, with 8-bit weights where that was exported."""

    name = NAME
    fingerprint = None
    precision: Precision

    def __init__(self, directory: Path, manifest: Manifest, threads: int) -> None:
        self.runtime = _onnxruntime()
        self.manifest = manifest
        int8 = graph_key(FRAME, "int8") in manifest.graphs
        self.precision = "int8" if int8 else "fp32"
        self.encoder = _session(self.runtime, directory, manifest.graphs[AUDIO_ENCODER], threads)
        frame = manifest.graphs[graph_key(FRAME, self.precision)]
        self.frame = _session(self.runtime, directory, frame, threads)
        weights = ", 8-bit weights" if int8 else ""
        self.description = (
            f"onnxruntime {self.runtime.__version__}{weights}, CPU, {threads} thread{'s' * (threads > 1)}"
        )

    def lane(self, style: Float32, template: Float32, start_latent: Float32) -> CpuLane:
        """Allocate and bind one voice's buffers; slot 0 of the batch, the others inactive."""
        return CpuLane(self, style, template, start_latent)

    def slots(self, start_latent: Float32) -> CpuSlots:
        """Allocate and bind every slot of the batch, for `streamtalk.batch`."""
        return CpuSlots(self, start_latent)


class CpuSlots:
    """Every slot of the batch: numpy arrays that onnxruntime reads and writes in place. See `slots.Slots`."""

    def __init__(self, backend: OnnxRuntimeCpu, start_latent: Float32) -> None:
        manifest = backend.manifest
        self._manifest = manifest
        self._start_latent = start_latent
        self._encoder = backend.encoder
        self._frame = backend.frame

        windows = _allocate(manifest.graphs[AUDIO_ENCODER].inputs)
        encoded = _allocate(manifest.graphs[AUDIO_ENCODER].outputs)
        self._windows: Float32 = windows["pcm"]
        # Where every slot has a row of its own, it is written there; numpy skips the copy of memory onto itself.
        own = manifest.encoder_batch == manifest.batch
        self.pcm: Float32 = (
            self._windows if own else np.zeros((manifest.batch, manifest.window_samples), np.float32)
        )
        self._encoded: Float32 = encoded["audio_features"]
        self._encode_binding = _Binding(backend.runtime, backend.encoder, windows, encoded)
        self._features = np.zeros((manifest.batch, *self._encoded.shape[1:]), np.float32)
        self._feature_rows = self._features.reshape(-1, manifest.audio_width)
        self._first_rows = manifest.hop * np.arange(manifest.batch)
        self._rows = np.zeros_like(self._first_rows)

        # The state has two sides: the graph reads the one and writes the other, in turn.
        inputs = _allocate(manifest.graphs[FRAME].inputs)
        outputs = _allocate(manifest.graphs[FRAME].outputs)
        self._inputs = inputs
        self.noise: Float32 = inputs["noise"]
        self._kv_caches = (inputs["kv_cache"], outputs["kv_cache_out"])
        self._latents = (inputs["latents"], outputs["latents_out"])
        back = {**inputs, "kv_cache": outputs["kv_cache_out"], "latents": outputs["latents_out"]}
        back_out = {**outputs, "kv_cache_out": inputs["kv_cache"], "latents_out": inputs["latents"]}
        self._frame_bindings = (
            _Binding(backend.runtime, backend.frame, inputs, outputs),
            _Binding(backend.runtime, backend.frame, back, back_out),
        )
        self._vertices: Float32 = outputs["vertices"].view()
        self._vertices.flags.writeable = False

    def start(self, slot: int, style: Float32, template: Float32) -> None:
        """Give a slot to a voice."""
        self._inputs["style"][slot] = style
        self._inputs["template"][slot] = template.reshape(-1)
        self.reset(slot)

    def reset(self, slot: int) -> None:
        """Empty both sides of a slot's state and put the start latent into their newest places."""
        for array in (self.pcm, self.noise, self._features, *self._kv_caches, *self._latents):
            array[slot] = 0
        for latents in self._latents:
            latents[slot, -1] = self._start_latent

    def encode(self, due: Mask) -> None:
        """Run the audio encoder on the windows of the slots in `due`, to its end."""
        for parts in encoder_runs(due, len(self._windows)):
            for slot, row, count in parts:
                self._windows[row : row + count] = self.pcm[slot : slot + count]
            _run(self._encoder, self._encode_binding)
            for slot, row, count in parts:
                self._features[slot : slot + count] = self._encoded[row : row + count]

    def frame(self, turn: int, frames: Counts, active: Mask) -> None:
        """Run turn `turn`, to its end."""
        m, inputs = self._manifest, self._inputs
        # As `protocol.counters`, for all slots at once and into the graph's own inputs.
        np.remainder(frames, m.period, out=inputs["position"])
        np.minimum(frames, m.history, out=inputs["valid_frames"])
        np.add(frames, 1, out=inputs["valid_latents"])
        np.minimum(inputs["valid_latents"], m.decode_window, out=inputs["valid_latents"])
        np.copyto(inputs["active"], active)
        np.remainder(frames, m.hop, out=self._rows)
        np.add(self._rows, self._first_rows, out=self._rows)
        # mode="clip" writes straight to `out`; no row is outside.
        np.take(self._feature_rows, self._rows, axis=0, out=inputs["audio_feature"], mode="clip")
        _run(self._frame, self._frame_bindings[turn % 2])

    def vertices(self) -> Float32:
        """The newest turn [B, V, 3], in the buffer that the graph writes to."""
        return self._vertices

    def state(self, slot: int, turn: int) -> LaneState:
        """A copy of a slot's state before turn `turn`."""
        side = turn % 2
        return LaneState(
            features=self._features[slot].copy(),
            kv_cache=self._kv_caches[side][slot].copy(),
            latents=self._latents[side][slot].copy(),
        )

    def restore(self, slot: int, turn: int, state: LaneState) -> None:
        """Take a slot's state before turn `turn` from a copy."""
        side = turn % 2
        self._features[slot] = state.features
        self._kv_caches[side][slot] = state.kv_cache
        self._latents[side][slot] = state.latents

    def close(self) -> None:
        """Nothing to do: the arrays go with this object."""


class CpuLane:
    """One voice: slot 0 of a batch of its own, whose turns are its frames. See `protocol.Lane`."""

    def __init__(
        self, backend: OnnxRuntimeCpu, style: Float32, template: Float32, start_latent: Float32
    ) -> None:
        self._slots = CpuSlots(backend, start_latent)
        self._slots.start(0, style, template)
        self._frames = np.zeros(backend.manifest.batch, np.int64)
        self._mine = np.zeros(backend.manifest.batch, np.bool_)
        self._mine[0] = True
        self._vertices: Float32 = self._slots.vertices()[0]
        self.pcm: Float32 = self._slots.pcm[0]
        self.noise: Float32 = self._slots.noise[0]

    def reset(self) -> None:
        """Return to the state before frame 0."""
        self._slots.reset(0)

    def encode(self) -> None:
        """Run the audio encoder, to its end."""
        self._slots.encode(self._mine)

    def frame(self, index: int) -> None:
        """Run frame `index`, to its end."""
        self._frames[0] = index
        self._slots.frame(index, self._frames, self._mine)

    def vertices(self) -> Float32:
        """The newest frame [V, 3], in the buffer that the graph writes to."""
        return self._vertices

    def state(self, index: int) -> LaneState:
        """A copy of the state before frame `index`."""
        return self._slots.state(0, index)

    def restore(self, index: int, state: LaneState) -> None:
        """Take the state before frame `index` from a copy."""
        self._slots.restore(0, index, state)

    def close(self) -> None:
        """Nothing to do: the arrays go with the lane."""


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"{NAME} needs the package onnxruntime: pip install 'streamtalk[cpu]'. ({error})"
        ) from error
    return onnxruntime


def _session(runtime: Any, directory: Path, graph: Graph, threads: int) -> Any:
    path = verified_graph(directory, graph)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    # Spinning threads win microseconds and take a core from whoever renders the face.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=PROVIDERS)
    except Exception as error:  # onnxruntime's own errors share no base class
        raise BackendError(
            f"onnxruntime {runtime.__version__} cannot load {path}: {first_line(error)}"
        ) from error
    want_inputs, want_outputs = declared(graph)
    compare(f"The inputs of {path}", want_inputs, tensors_of(session.get_inputs()))
    compare(f"The outputs of {path}", want_outputs, tensors_of(session.get_outputs()))
    return session


def tensors_of(nodes: Any) -> dict[str, Tensor]:
    """A session's inputs or outputs in the manifest's terms."""
    return {
        node.name: Tensor(node.name, DTYPES.get(node.type, node.type), tuple(node.shape)) for node in nodes
    }


def _allocate(tensors: tuple[Tensor, ...]) -> dict[str, Array]:
    return {tensor.name: np.zeros([int(n) for n in tensor.shape], tensor.dtype) for tensor in tensors}


class _Binding:
    """Arrays bound to a session by name: onnxruntime reads and writes their own memory."""

    def __init__(
        self, runtime: Any, session: Any, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> None:
        self.io = session.io_binding()
        # Kept here: in some versions (seen with 1.23.2) a binding does not keep the memory alive that it points to.
        self._inputs = {name: runtime.OrtValue.ortvalue_from_numpy(a) for name, a in inputs.items()}
        self._outputs = {name: runtime.OrtValue.ortvalue_from_numpy(a) for name, a in outputs.items()}
        self._arrays = (inputs, outputs)
        for name, value in self._inputs.items():
            self.io.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self.io.bind_ortvalue_output(name, value)


def _run(session: Any, binding: _Binding) -> None:
    try:
        session.run_with_iobinding(binding.io)
    except Exception as error:  # onnxruntime's own errors share no base class
        raise BackendError(f"onnxruntime failed: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What to quote of an error whose text runs on."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
