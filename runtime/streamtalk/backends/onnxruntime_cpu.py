"""The graphs in onnxruntime on the CPU: bound once to preallocated memory, nothing allocated by a frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.backends.contract import compare, declared
from streamtalk.backends.protocol import Float32, LaneState, counters
from streamtalk.errors import BackendError, MissingDependencyError, ModelError
from streamtalk.manifest import AUDIO_ENCODER, FRAME, Graph, Manifest, Tensor, verified

NAME = "onnxruntime-cpu"
PROVIDERS = ["CPUExecutionProvider"]
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}
Array = npt.NDArray[Any]


class OnnxRuntimeCpu:
    """Sessions of the audio encoder and the frame graph."""

    name = NAME

    def __init__(self, directory: Path, manifest: Manifest, threads: int) -> None:
        self.runtime = _onnxruntime()
        self.manifest = manifest
        self.encoder = _session(self.runtime, directory, manifest.graphs[AUDIO_ENCODER], threads)
        self.frame = _session(self.runtime, directory, manifest.graphs[FRAME], threads)
        self.description = (
            f"onnxruntime {self.runtime.__version__}, CPU, {threads} thread{'s' * (threads > 1)}"
        )

    def lane(self, style: Float32, template: Float32, start_latent: Float32) -> CpuLane:
        """Allocate and bind one voice's buffers; slot 0 of the batch, the others inactive."""
        return CpuLane(self, style, template, start_latent)


class CpuLane:
    """One voice: numpy arrays that onnxruntime reads and writes in place. See `protocol.Lane`."""

    def __init__(
        self, backend: OnnxRuntimeCpu, style: Float32, template: Float32, start_latent: Float32
    ) -> None:
        manifest = backend.manifest
        self._manifest = manifest
        self._start_latent = start_latent
        self._encoder = backend.encoder
        self._frame = backend.frame

        windows = _allocate(manifest.graphs[AUDIO_ENCODER].inputs)
        encoded = _allocate(manifest.graphs[AUDIO_ENCODER].outputs)
        self.pcm: Float32 = windows["pcm"][0]
        self._features: Float32 = encoded["audio_features"][0]
        self._encode_binding = _Binding(backend.runtime, backend.encoder, windows, encoded)

        # The state has two sides: the graph reads the one and writes the other, in turn.
        inputs = _allocate(manifest.graphs[FRAME].inputs)
        outputs = _allocate(manifest.graphs[FRAME].outputs)
        inputs["style"][0] = style
        inputs["template"][0] = template.reshape(-1)
        inputs["active"][0] = True
        self.noise: Float32 = inputs["noise"][0]
        self._audio_feature: Float32 = inputs["audio_feature"][0]
        self._counters = (inputs["position"], inputs["valid_frames"], inputs["valid_latents"])
        self._kv_caches = (inputs["kv_cache"], outputs["kv_cache_out"])
        self._latents = (inputs["latents"], outputs["latents_out"])
        back = {**inputs, "kv_cache": outputs["kv_cache_out"], "latents": outputs["latents_out"]}
        back_out = {**outputs, "kv_cache_out": inputs["kv_cache"], "latents_out": inputs["latents"]}
        self._frame_bindings = (
            _Binding(backend.runtime, backend.frame, inputs, outputs),
            _Binding(backend.runtime, backend.frame, back, back_out),
        )
        self._vertices: Float32 = outputs["vertices"][0]
        self._vertices.flags.writeable = False
        self.reset()

    def reset(self) -> None:
        """Empty both sides of the state and put the start latent into the newest slot of side 0."""
        self._features.fill(0)
        for side in (*self._kv_caches, *self._latents):
            side.fill(0)
        self._latents[0][0, -1] = self._start_latent

    def encode(self) -> None:
        """Run the audio encoder, to its end."""
        _run(self._encoder, self._encode_binding)

    def frame(self, index: int) -> None:
        """Run frame `index`, to its end."""
        now = counters(index, self._manifest)
        position, valid_frames, valid_latents = self._counters
        position.fill(now.position)
        valid_frames.fill(now.valid_frames)
        valid_latents.fill(now.valid_latents)
        self._audio_feature[:] = self._features[index % self._manifest.hop]
        _run(self._frame, self._frame_bindings[index % 2])

    def vertices(self) -> Float32:
        """The newest frame [V, 3], in the buffer that the graph writes to."""
        return self._vertices

    def state(self, index: int) -> LaneState:
        """A copy of the state before frame `index`."""
        side = index % 2
        return LaneState(
            features=self._features.copy(),
            kv_cache=self._kv_caches[side][0].copy(),
            latents=self._latents[side][0].copy(),
        )

    def restore(self, index: int, state: LaneState) -> None:
        """Take the state before frame `index` from a copy."""
        side = index % 2
        self._features[:] = state.features
        self._kv_caches[side][0] = state.kv_cache
        self._latents[side][0] = state.latents

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
    for name, sha256 in graph.files.items():
        verified(directory, name, sha256)
    if graph.file not in graph.files:
        raise ModelError(f"The manifest gives no SHA-256 for {graph.file}. Export again.")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    # Spinning threads win microseconds and take a core from whoever renders the face.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    path = directory / graph.file
    try:
        session = runtime.InferenceSession(str(path), options, providers=PROVIDERS)
    except Exception as error:  # onnxruntime's own errors share no base class
        raise BackendError(
            f"onnxruntime {runtime.__version__} cannot load {path}: {_first_line(error)}"
        ) from error
    want_inputs, want_outputs = declared(graph)
    compare(f"The inputs of {path}", want_inputs, _tensors(session.get_inputs()))
    compare(f"The outputs of {path}", want_outputs, _tensors(session.get_outputs()))
    return session


def _tensors(nodes: Any) -> dict[str, Tensor]:
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
        raise BackendError(f"onnxruntime failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
