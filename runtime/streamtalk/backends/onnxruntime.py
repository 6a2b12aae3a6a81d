"""Hop graphs in onnxruntime: what its CPU and GPU backends share, and the CPU backend.

Tensors are bound once to preallocated memory; a launch allocates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.model import Graph, Manifest, Precision, Tensor, graph_key, hop_name, verified_graph
from streamtalk.rows import STATE, Array, Counts, Float32, Mask, RowState, compare, declared

NAME = "onnxruntime-cpu"
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}


def load(directory: Path, manifest: Manifest, _: Precision, threads: int) -> CpuBackend:
    """Load the hop graph of one row on the CPU. Raises BackendError, MissingDependencyError and ModelError."""
    backend = CpuBackend(directory, manifest, threads)
    backend.session(1)
    return backend


class CpuBackend:
    """Sessions of the hop graphs on the CPU, loaded when they are first asked for. See `rows.Backend`."""

    name = NAME
    fingerprint = None
    precision: Precision = "fp32"

    def __init__(self, directory: Path, manifest: Manifest, threads: int) -> None:
        self.manifest = manifest
        self._runtime = _onnxruntime()
        self._directory = directory
        self._threads = threads
        self._sessions: dict[int, Any] = {}
        self._loading = Lock()
        self.description = (
            f"onnxruntime {self._runtime.__version__}, CPU, {threads} thread{'s' * (threads > 1)}"
        )

    def session(self, rows: int) -> Any:
        """Session of the hop graph of so many rows. Raises BackendError and ModelError."""
        with self._loading:
            if rows not in self._sessions:
                self._sessions[rows] = self._load(hop_graph(self.manifest, rows, self.precision))
            return self._sessions[rows]

    def rows(self, count: int, start_latent: Float32) -> CpuRows:
        """Allocate and bind rows of the hop graph of `count` rows."""
        graph = hop_graph(self.manifest, count, self.precision)
        return CpuRows(self.session(count), graph, self.manifest, start_latent)

    def on_device(self) -> CpuBackend:
        """Refuse: raises BackendError."""
        raise BackendError(f"{NAME} makes vertices in host memory: download=False needs a GPU backend.")

    def _load(self, graph: Graph) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._runtime.ExecutionMode.ORT_SEQUENTIAL
        # Spinning threads win microseconds and take a core from whoever renders the face.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        return open_session(self._runtime, self._directory, graph, options, providers=providers)


class CpuRows:
    """Rows as numpy arrays that onnxruntime reads and writes in place. See `rows.Rows`."""

    def __init__(self, session: Any, graph: Graph, manifest: Manifest, start_latent: Float32) -> None:
        self._session = session
        self._start_latent = start_latent
        self._tensors = {
            t.name: np.zeros([int(n) for n in t.shape], t.dtype) for t in (*graph.inputs, *graph.outputs)
        }
        self._bindings = [
            bind(session, graph, {name: array.ctypes.data for name, array in tensors.items()})
            for tensors in (self._tensors, swapped(self._tensors))
        ]
        self._counts = Counts(manifest, len(self._tensors["active"]))
        self.frames = self._counts.frames
        self.inputs: Mapping[str, Array] = {name: self._tensors[name] for name in ("pcm", "noise")}
        self._vertices: Float32 = self._tensors["vertices"].view()
        self._vertices.flags.writeable = False

    def start(self, row: int, style: Float32, template: Float32) -> None:
        """Give a row to a stream."""
        self._tensors["style"][row] = style
        self._tensors["template"][row] = template.reshape(-1)
        self.reset(row)

    def reset(self, row: int) -> None:
        """Put a row into the state before frame 0."""
        for array in self.inputs.values():
            array[row] = 0
        latents = np.zeros_like(self._tensors["latents"][row])
        latents[-1] = self._start_latent
        self.restore(row, 0, RowState(np.zeros_like(self._tensors["kv_cache"][row]), latents))

    def launch(self, active: Mask) -> None:
        """Run a hop of the rows in `active`, to its end."""
        tensors = self._tensors
        self._counts.write(tensors["position"], tensors["valid_frames"], tensors["valid_latents"])
        np.copyto(tensors["active"], active)
        try:
            self._session.run_with_iobinding(self._bindings[self._counts.side])
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BackendError(f"onnxruntime failed: {first_line(error)}") from error

    def vertices(self) -> Float32:
        """Vertices [B, hop, V, 3] of the newest launch, in the buffer that the graph writes to."""
        return self._vertices

    def advance(self, active: Mask) -> None:
        """Make the state that the newest launch left the current one."""
        self._counts.advance(active)

    def state(self, row: int) -> RowState:
        """Copy the current state of a row."""
        return RowState(**{name: array[row].copy() for name, array in self._current().items()})

    def restore(self, row: int, frame: int, state: RowState) -> None:
        """Set the current state of a row."""
        for name, array in self._current().items():
            array[row] = getattr(state, name)
        self.frames[row] = frame

    def close(self) -> None:
        """Do nothing: the arrays go with this object."""

    def _current(self) -> dict[str, Array]:
        tensors = swapped(self._tensors) if self._counts.side else self._tensors
        return {name: tensors[name] for name in STATE}


def swapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors with each state's input and output exchanged: the other side of the double buffer."""
    back = {name: tensors[out] for name, out in STATE.items()} | {
        out: tensors[name] for name, out in STATE.items()
    }
    return {**tensors, **back}


def hop_graph(manifest: Manifest, rows: int, precision: Precision, operators: str = "onnx") -> Graph:
    """The manifest's hop graph of so many rows. Raises BackendError where there is none."""
    graph = manifest.graphs.get(graph_key(hop_name(rows), precision, operators))
    if graph is None:
        raise BackendError(
            f"This model has no {precision} hop graph of {rows} rows (exported: "
            f"{', '.join(map(str, manifest.row_counts))}). Export again with --batch {rows}."
        )
    return graph


def open_session(runtime: Any, directory: Path, graph: Graph, options: Any, **settings: Any) -> Any:
    """A session of a graph whose files and tensors are the manifest's. Raises BackendError and ModelError."""
    path = verified_graph(directory, graph)
    try:
        session = runtime.InferenceSession(str(path), options, **settings)
    except Exception as error:  # onnxruntime's own errors share no base class
        raise BackendError(
            f"onnxruntime {runtime.__version__} cannot load {path}: {first_line(error)}"
        ) from error
    found = tensors_of(session.get_inputs()), tensors_of(session.get_outputs())
    compare(str(path), declared(graph), found)
    return session


def bind(
    session: Any, graph: Graph, addresses: Mapping[str, int], device: str = "cpu", number: int = 0
) -> Any:
    """A binding of a graph's tensors to memory at these addresses, which the caller keeps alive."""
    io = session.io_binding()
    for tensors, bind_one in ((graph.inputs, io.bind_input), (graph.outputs, io.bind_output)):
        for t in tensors:
            bind_one(t.name, device, number, np.dtype(t.dtype), list(t.shape), addresses[t.name])
    return io


def tensors_of(nodes: Any) -> dict[str, Tensor]:
    """A session's inputs or outputs in the manifest's terms."""
    return {n.name: Tensor(n.name, DTYPES.get(n.type, n.type), tuple(n.shape)) for n in nodes}


def first_line(error: Exception) -> str:
    """What to quote of an error whose text runs on."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"{NAME} needs the package onnxruntime: pip install 'streamtalk[cpu]'. ({error})"
        ) from error
    return onnxruntime
