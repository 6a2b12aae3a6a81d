"""The graphs in onnxruntime on an NVIDIA GPU, where no TensorRT runs.

onnxruntime captures its own CUDA graphs, one for each number it is given, so its runs stay outside the lane's
capture: a frame is an upload, a graph launch and a download, one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from streamtalk.backends.contract import compare, declared
from streamtalk.backends.onnxruntime_cpu import first_line, tensors_of
from streamtalk.cuda.backend import CudaBackend
from streamtalk.cuda.driver import Driver, Handle, open_driver
from streamtalk.engine_file import PRECISIONS
from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.manifest import AUDIO_ENCODER, FRAME, Graph, Manifest, graph_key, verified

NAME = "onnxruntime-cuda"
PROVIDER = "CUDAExecutionProvider"


def load(directory: Path, manifest: Manifest) -> CudaBackend:
    """Sessions of the audio encoder and the frame graph, on one GPU. Raises BackendError, MissingDependencyError and
    ModelError.
    """
    runtime = _onnxruntime()
    driver = open_driver()
    if not driver.primary:
        raise BackendError(
            f"{NAME} works in the GPU's primary context only, and another one is current: with PyCUDA import "
            "pycuda.autoprimaryctx, or use a TensorRT backend."
        )
    precision = next(p for p in PRECISIONS if graph_key(FRAME, p) in manifest.graphs)
    graphs = [manifest.graphs[graph_key(name, precision)] for name in (AUDIO_ENCODER, FRAME)]
    encoder, frame = (CudaSession(runtime, directory, graph, driver) for graph in graphs)
    description = f"onnxruntime {runtime.__version__}, {precision}, {driver.description}"
    fingerprint = f"{description}; {graphs[0].sha256}, {graphs[1].sha256}"
    return CudaBackend(NAME, description, fingerprint, precision, driver, encoder, frame, manifest)


class CudaSession:
    """See `engine.DeviceEngine`: a session on a stream of its own, which all its runs share.

    onnxruntime captures on that stream in CUDA's global mode, so nothing else may ever be put on it: a copy of another
    lane's would become part of the captured graph.
    """

    capturable = False

    def __init__(self, runtime: Any, directory: Path, graph: Graph, driver: Driver) -> None:
        self.runtime, self.graph, self.driver = runtime, graph, driver
        self.stream: Handle = driver.stream()
        self.lock = Lock()
        self.numbers = itertools.count(1)
        for name, sha256 in graph.files.items():
            verified(directory, name, sha256)
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        provider = {
            "device_id": str(driver.device),
            "user_compute_stream": str(int(self.stream)),
            "enable_cuda_graph": "1",
            # TF32 has float16's mantissa: left on, it would undo every float32 island.
            "use_tf32": "0",
        }
        path = directory / graph.file
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=[(PROVIDER, provider)])
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BackendError(
                f"onnxruntime {runtime.__version__} cannot load {path}: {first_line(error)}"
            ) from error
        if PROVIDER not in self.session.get_providers():
            raise BackendError(
                f"onnxruntime {runtime.__version__} cannot start {PROVIDER} here; its CUDA and cuDNN libraries "
                "are missing or of another version."
            )
        want_inputs, want_outputs = declared(graph)
        compare(f"The inputs of {path}", want_inputs, tensors_of(self.session.get_inputs()))
        compare(f"The outputs of {path}", want_outputs, tensors_of(self.session.get_outputs()))

    def bind(self, addresses: Mapping[str, int], stream: Handle) -> CudaSessionRun:
        """Bind device addresses; the first runs allocate and capture."""
        io = self.session.io_binding()
        for tensors, bound in ((self.graph.inputs, io.bind_input), (self.graph.outputs, io.bind_output)):
            for t in tensors:
                bound(t.name, "cuda", self.driver.device, t.dtype, list(t.shape), addresses[t.name])
        run = CudaSessionRun(self, io, next(self.numbers))
        # One to allocate, one to capture, one to replay: whatever fails does so here.
        for _ in range(3):
            run.enqueue(stream)
        self.driver.drain(stream)
        return run


class CudaSessionRun:
    """A binding with its own captured graph, ordered with the lane's stream by two events.

    onnxruntime keeps captured graphs by thread: a lane that is used in another thread than it was opened in captures
    again there, in its first frames.
    """

    def __init__(self, session: CudaSession, io: Any, number: int) -> None:
        self._session, self._io = session, io
        self._options = session.runtime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        # The lane waits with an event that sleeps; without this the run would wait by spinning.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        self._asked, self._answered = session.driver.event(), session.driver.event()

    def enqueue(self, stream: Handle) -> None:
        """Put one run on the session's stream, after what is on `stream` and before what comes there."""
        session, driver = self._session, self._session.driver
        driver.record(self._asked, stream)
        try:
            with session.lock:
                driver.wait(session.stream, self._asked)
                session.session.run_with_iobinding(self._io, self._options)
                driver.record(self._answered, session.stream)
        except BackendError:
            raise
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BackendError(f"onnxruntime failed on the GPU: {first_line(error)}") from error
        driver.wait(stream, self._answered)

    def close(self) -> None:
        """Let the binding go; onnxruntime keeps the captured graph as long as the session."""
        self._io = None
        self._session.driver.discard([self._asked, self._answered])


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"{NAME} needs the package onnxruntime-gpu: pip install 'streamtalk[gpu]'. ({error})"
        ) from error
    if PROVIDER not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"{NAME} needs onnxruntime-gpu; installed is an onnxruntime without {PROVIDER}. Uninstall it first, "
            "then pip install 'streamtalk[gpu]': the two overwrite each other."
        )
    return onnxruntime
