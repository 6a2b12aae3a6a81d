"""TensorRT and onnxruntime-gpu on the fake CUDA: both run a model's graphs on the CPU, when the stream gets there."""

# ruff: noqa: N802 (the names are onnxruntime's)

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import weakref
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from streamtalk.backends.cuda import classic
from streamtalk.backends.cuda import onnxruntime as gpu_onnxruntime
from streamtalk.backends.cuda.backend import CudaBackend
from streamtalk.backends.cuda.onnxruntime import PROVIDER
from streamtalk.backends.onnxruntime import bind
from streamtalk.model import FILE_NAME, Engine, Graph, Manifest, graph_key, hop_name, read_manifest
from tests.runtime.backends.cuda.fake import FakeCuda
from tests.tensorrt_api import Api

DEVICE, HOST = 0, 1  # as `Api.enumeration` numbers them


class Mode(Enum):
    INPUT = "input"
    OUTPUT = "output"


class Kind(Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 2
    BOOL = 3


KINDS = {"float32": Kind.FLOAT, "int64": Kind.INT64, "bool": Kind.BOOL}


def add_engines(directory: Path, key: str = "tensorrt 10.3.0") -> Manifest:
    """Give a toy model an engine of each hop graph for the stand-in of that library, whose plan is the graph's key."""
    backend, version = key.split()
    manifest = read_manifest(directory)
    engines = []
    for rows in manifest.row_counts:
        name = hop_name(rows)
        plan = json.dumps([str(directory), graph_key(name, "fp32")]).encode()
        (directory / f"{name}.engine").write_bytes(plan)
        engines.append(
            Engine(
                graph=name,
                file=f"{name}.engine",
                sha256=hashlib.sha256(plan).hexdigest(),
                backend=backend,  # type: ignore[arg-type]
                precision="fp32",
                tensorrt_version=version,
                compute_capability="87",
                graph_sha256=manifest.graphs[graph_key(name, "fp32")].sha256,
            )
        )
    manifest = msgspec.structs.replace(manifest, engines=tuple(engines))
    (directory / FILE_NAME).write_bytes(msgspec.json.encode(manifest))
    return manifest


def load_gpu(
    cuda: FakeCuda, directory: Path, monkeypatch: pytest.MonkeyPatch, kind: str = "tensorrt"
) -> CudaBackend:
    """A toy model's backend on the fake CUDA, by its own loader; no context is current afterwards."""
    cuda.install(monkeypatch)
    if kind == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(cuda))
        backend = classic.load(directory, add_engines(directory), "fp32", 1)
    else:
        monkeypatch.setattr(gpu_onnxruntime, "_onnxruntime", lambda: OnnxRuntimeGpu(cuda))
        backend = gpu_onnxruntime.load(directory, read_manifest(directory), "fp32", 1)
    cuda.stack.clear()
    cuda.calls.clear()
    return backend


def at(address: int, n: Any, kind: Any) -> Any:
    """Host memory as an array."""
    return np.ctypeslib.as_array((kind * int(n)).from_address(address))


def require_cleared(position: int, rows: Any) -> None:
    """A graph that runs on memory as it came may read beyond its tables."""
    positions = at(position, rows, ctypes.c_int64)
    assert np.all((positions >= 0) & (positions < 10**6)), "memory was not cleared"


def on_the_cpu(path: Path) -> Any:
    """A real session, of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class StubEngine:
    """An engine of TensorRT, and with it everything that TensorRT-RTX compiles and keeps. It is all of a library's
    objects but the context: which of its methods they have is the version's to say.
    """

    def __init__(self, cuda: FakeCuda, graph: Graph, session: Any) -> None:
        self.cuda, self.graph, self.session = cuda, graph, session
        self.tensors = {t.name: (Mode.INPUT, KINDS[t.dtype], t.shape) for t in graph.inputs}
        self.tensors |= {t.name: (Mode.OUTPUT, KINDS[t.dtype], t.shape) for t in graph.outputs}
        self.room, self.capturable, self.location, self.fails, self.refuses = True, True, DEVICE, False, False
        self.wrong = 0.0
        """Added to the vertices of the last row."""
        self.known, self.serialized = b"", 0
        self.runs, self.ran = 0, 0
        """Runs that were put on a stream, and runs that the stream came to."""
        self.strategy: int | None = None
        self.configs: list[Any] = []
        self.contexts: list[Context] = []
        self.device_memory_size_v2 = 1000

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[i]

    def get_tensor_mode(self, name: str) -> Mode:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> Kind:
        return self.tensors[name][1]

    def get_tensor_shape(self, name: str) -> tuple[Any, ...]:
        return self.tensors[name][2]

    def get_tensor_location(self, name: str) -> int:
        return self.location if name == "position" else DEVICE

    def create_execution_context(self, runtime_config: Any = None) -> Any:
        self.configs.append(runtime_config)
        self.contexts.append(Context(self))
        return self.contexts[-1] if self.room else None

    def create_runtime_config(self) -> Any:
        return self

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        if self.fails:
            raise RuntimeError("no cache today")
        return self

    def set_runtime_cache(self, cache: Any) -> bool:
        return cache is self

    def deserialize(self, content: bytes) -> bool:
        fits = content.startswith(b"kernels")
        self.known = content if fits else b""
        return fits

    def serialize(self) -> bytes:
        self.serialized += 1
        return self.known or b"kernels"


class Context:
    """Addresses of one run, and its scratch memory."""

    def __init__(self, engine: StubEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.scratch: list[tuple[int, int]] = []

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch.append((memory, size))

    def is_stream_capturable(self, _: int) -> bool:
        return self.engine.capturable

    def rows_of(self, name: str) -> tuple[int, int]:
        """Number of rows of a tensor, and values of each."""
        rows, *inner = map(int, self.engine.tensors[name][2])
        return rows, int(np.prod(inner))

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        engine.runs += 1
        if engine.refuses:
            return False
        binding = bind(engine.session, engine.graph, self.addresses)

        def run() -> None:
            require_cleared(self.addresses["position"], engine.graph.inputs[0].shape[0])
            engine.session.run_with_iobinding(binding)
            engine.ran += 1
            if engine.wrong:
                rows, size = self.rows_of("vertices")
                at(self.addresses["vertices"], rows * size, ctypes.c_float)[-size:] += engine.wrong

        engine.cuda.put(stream, run)
        return True


def tensorrt_module(cuda: FakeCuda, key: str = "tensorrt 10.3.0") -> Any:
    """A library of this name and version; `module.change` may change an engine when it is deserialised."""
    api = Api(key)

    class Logger:
        Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING")

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> StubEngine | None:
            self.logger.log(Logger.Severity.WARNING, "hm")
            try:
                directory, key = json.loads(plan)
            except ValueError:
                self.logger.log(Logger.Severity.ERROR, "The engine plan file is not compatible. ")
                return None
            graph = read_manifest(Path(directory)).graphs[key]
            engine = StubEngine(cuda, graph, on_the_cpu(Path(directory, graph.file)))
            module.change(engine)
            return engine

    module: Any = ModuleType(api.name)
    module.__version__ = api.version
    module.change = lambda _: None
    assert {mode.name for mode in Mode} <= set(api.recorded["TensorIOMode"].split())
    assert {kind.name for kind in Kind} <= set(api.recorded["DataType"].split())
    module.ILogger, module.TensorIOMode = Logger, Mode
    module.Runtime = lambda logger: api.speak("Runtime", Runtime(logger))
    module.TensorLocation = api.enumeration("TensorLocation")
    module.ExecutionContextAllocationStrategy = api.enumeration("ExecutionContextAllocationStrategy")
    return module


class OnnxRuntimeGpu:
    """onnxruntime-gpu. Runs fail where the search is one of `lacking`, all captured ones without `graphs`, and the next
    `spoilt` captured ones.
    """

    __version__ = "1.31.1"

    def __init__(
        self, cuda: FakeCuda, lacking: tuple[str, ...] = (), graphs: bool = True, spoilt: int = 0
    ) -> None:
        self.cuda, self.lacking, self.graphs, self.spoilt = cuda, lacking, graphs, spoilt
        self.settings: list[Mapping[str, str]] = []
        self.levels: list[int] = []
        self.made: list[weakref.ref[Any]] = []
        self.alive_before: list[int] = []
        """How many of the sessions before each one were still there when it was loaded."""

    @property
    def searched(self) -> list[str]:
        """The searches that were tried."""
        return [settings["cudnn_conv_algo_search"] for settings in self.settings]

    @property
    def captured(self) -> list[bool]:
        """Which of the sessions were to capture."""
        return [settings["enable_cuda_graph"] == "1" for settings in self.settings]

    def get_available_providers(self) -> list[str]:
        return [PROVIDER]

    def set_default_logger_severity(self, level: int) -> None:
        self.levels.append(level)

    def SessionOptions(self) -> Any:
        return SimpleNamespace()

    def RunOptions(self) -> Any:
        entries: dict[str, str] = {}
        return SimpleNamespace(add_run_config_entry=entries.__setitem__, entries=entries)

    def InferenceSession(self, path: str, _: Any, *, providers: Any, enable_fallback: int) -> Any:
        ((provider, settings),) = providers
        assert (provider, enable_fallback) == (PROVIDER, 0)
        self.settings.append(settings)
        self.alive_before.append(sum(session() is not None for session in self.made))
        session = GpuSession(self, settings, on_the_cpu(Path(path)))
        self.made.append(weakref.ref(session))
        return session


class GpuSession:
    """A session whose runs go to the stream that it was given."""

    def __init__(self, runtime: OnnxRuntimeGpu, settings: Mapping[str, str], session: Any) -> None:
        self.runtime, self.settings, self.session = runtime, settings, session
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs
        self.graphs: set[str] = set()
        """Numbers of the captured graphs that it holds."""

    def get_providers(self) -> list[str]:
        return [PROVIDER]

    def io_binding(self) -> Any:
        io, addresses = self.session.io_binding(), dict[str, int]()

        def on_device(bind_one: Any) -> Any:
            def bound(name: str, device: str, number: int, *rest: Any) -> None:
                assert (device, number) == ("cuda", 0)
                addresses[name] = rest[-1]
                bind_one(name, "cpu", 0, *rest)

            return bound

        bind_input, bind_output = on_device(io.bind_input), on_device(io.bind_output)
        return SimpleNamespace(real=io, addresses=addresses, bind_input=bind_input, bind_output=bind_output)

    def release_captured_graph(self, number: int) -> None:
        self.graphs.remove(str(number))

    def run_with_iobinding(self, io: Any, options: Any) -> None:
        runtime, captured = self.runtime, self.settings["enable_cuda_graph"] == "1"
        assert options.entries["disable_synchronize_execution_providers"] == "1", "the thread spins"
        if self.settings["cudnn_conv_algo_search"] in runtime.lacking or (captured and not runtime.graphs):
            raise RuntimeError(f"no valid engine configs of {self.settings['cudnn_conv_algo_search']}")
        if captured and runtime.spoilt:
            runtime.spoilt -= 1
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        self.graphs.add(options.entries["gpu_graph_id"])
        rows = self.get_inputs()[0].shape[0]

        def run() -> None:
            require_cleared(io.addresses["position"], rows)
            self.session.run_with_iobinding(io.real)

        runtime.cuda.put(self.settings["user_compute_stream"], run)
