"""Engines of classic TensorRT and TensorRT-RTX, which share this part of their interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from streamtalk.backends.cuda.backend import CudaBackend
from streamtalk.backends.cuda.driver import Driver, Handle, open_driver
from streamtalk.backends.disk_cache import remember, remembered
from streamtalk.backends.engine_file import Fit, find_engine, require_engines
from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.model import Manifest, Precision, Tensor
from streamtalk.rows import Tensors, compare, declared

INSTALL = {
    "tensorrt": "pip install 'streamtalk[tensorrt]', or on a Jetson use JetPack's own package",
    "tensorrt_rtx": "pip install 'streamtalk[rtx]'",
}
KIND = "compiled"
DTYPES = {"FLOAT": "float32", "INT64": "int64", "BOOL": "bool"}
NO_REASON = "it gives no reason."


def load_engines(
    name: str, directory: Path, manifest: Manifest, precision: Precision, threads: int
) -> CudaBackend:
    """Load the engine of one row of library `name`, `tensorrt` or `tensorrt_rtx`, on one GPU.

    Raises BackendError, MissingDependencyError and, for an engine that is not what the manifest says, ModelError.
    """
    del threads
    require_engines(directory, manifest, name, precision)
    library, driver = Library(name), open_driver()
    load = partial(_load, library, driver, directory, manifest, precision)
    engine = load(1)
    description = f"{name} {library.version}, {precision}, {driver.description}"
    device = f"{driver.build}; compute capability {driver.compute_capability}"
    return CudaBackend(
        name=name,
        description=description,
        fingerprint=f"{description}; {device}; {engine.fingerprint}",
        precision=precision,
        driver=driver,
        directory=directory,
        manifest=manifest,
        load=load,
        engines={1: engine},
    )


def _load(
    library: Library, driver: Driver, directory: Path, manifest: Manifest, precision: Precision, rows: int
) -> TensorRtEngine:
    version, capability = library.version, driver.compute_capability
    return library.load(
        find_engine(directory, manifest, rows, library.name, version, capability, precision), driver
    )


class Library:
    """An imported TensorRT, its logger and runtime. Raises MissingDependencyError, BackendError."""

    def __init__(self, name: str) -> None:
        try:
            self.trt: Any = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: one of its own libraries is missing
            raise MissingDependencyError(
                f"{name} needs the package of that name: {INSTALL[name]}. ({error})"
            ) from error
        self.name = name
        self.version: str = self.trt.__version__
        self.logger = error_log(self.trt)
        self.runtime: Any = None

    def load(self, fit: Fit, driver: Driver) -> TensorRtEngine:
        """Deserialise an engine after its hash was compared, and compare its tensors with the manifest's."""
        plan = fit.read()
        self.logger.messages.clear()
        engine: Any = None
        try:
            # In the driver's context, where a capture in another thread does not forbid to allocate.
            with driver.current():
                if self.runtime is None:  # raises where CUDA does not start
                    self.runtime = self.trt.Runtime(self.logger)
                engine = self.runtime.deserialize_cuda_engine(plan)
        except Exception as error:  # the bindings raise several kinds without a common base
            self.logger.messages.append(str(error))
        if engine is None:
            reason = " ".join(self.logger.messages) or NO_REASON
            raise BackendError(
                f"{self.name} {self.version} cannot load {fit.path}: {reason} Build it again here."
            )
        found = self._tensors(engine)
        compare(str(fit.path), declared(fit.graph), found)
        on_host = [
            name
            for side in found
            for name in side
            if engine.get_tensor_location(name) != self.trt.TensorLocation.DEVICE
        ]
        if on_host:
            raise BackendError(f"{fit.path} wants {', '.join(on_host)} in host memory. Build it again here.")
        key = f"{self.name} {self.version}; {driver.description}; {fit.engine.sha256}"
        return TensorRtEngine(self, engine, fit, driver, Compiled(self.trt, engine, key))

    def _tensors(self, engine: Any) -> tuple[Tensors, Tensors]:
        sides: tuple[Tensors, Tensors] = {}, {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            kind = engine.get_tensor_dtype(name).name
            shape = tuple(engine.get_tensor_shape(name))
            is_output = engine.get_tensor_mode(name) == self.trt.TensorIOMode.OUTPUT
            sides[is_output][name] = Tensor(name, DTYPES.get(kind, kind), shape)
        return sides


class Compiled:
    """Kernels that TensorRT-RTX compiles for this GPU when an engine first runs, kept from one start to the next.

    They only save time: a failure here is no failure of the engine. The library refuses what another version, driver
    or GPU wrote. Classic TensorRT compiles when it builds and has no such cache.
    """

    def __init__(self, trt: Any, engine: Any, key: str) -> None:
        self._key, self._stored, self._kept = key, b"", False
        # The bindings do not tell that one of these holds the next, so that they live together, and go in this order.
        self.options: dict[str, Any] = {}
        """For `create_execution_context`."""
        self._cache: Any = None
        self._engine = engine
        self.scratch_bytes: int | None = None
        """Scratch memory that a context wants to be given; None where it takes its own."""
        create = getattr(engine, "create_runtime_config", None)
        if create is None:
            return
        with suppress(Exception):  # the bindings raise several kinds without a common base
            config = create()
            # A run that allocates cannot be captured: each run is given its scratch memory.
            config.set_execution_context_allocation_strategy(
                trt.ExecutionContextAllocationStrategy.USER_MANAGED
            )
            self.options, self.scratch_bytes = {"runtime_config": config}, int(engine.device_memory_size_v2)
            cache = config.create_runtime_cache()
            self._stored = remembered(KIND, key)
            if self._stored and not cache.deserialize(self._stored):
                self._stored = b""
            if config.set_runtime_cache(cache):
                self._cache = cache

    def keep(self) -> None:
        """Keep what was compiled, once, unless it was stored before."""
        if self._kept or self._cache is None:
            return
        self._kept = True
        with suppress(Exception):
            content = bytes(memoryview(self._cache.serialize()))
            if content and content != self._stored:
                remember(KIND, self._key, content)


class TensorRtEngine:
    """See `engine.DeviceEngine`."""

    def __init__(self, library: Library, engine: Any, fit: Fit, driver: Driver, compiled: Compiled) -> None:
        self.library, self.engine, self.graph, self.driver = library, engine, fit.graph, driver
        self.compiled = compiled
        self.capturable = True
        self.fingerprint = f"{fit.engine.sha256} {' '.join(fit.engine.flags)}"
        self._binding = Lock()

    def bind(self, addresses: Mapping[str, int], stream: Handle) -> TensorRtRun:
        """A context with its own scratch memory; it runs once, for an engine must have run before a capture."""
        with self._binding:  # contexts share one configuration and one cache of kernels
            run = TensorRtRun(self.library, self._context(), self.compiled, self.driver)
            try:
                run.prepare(addresses)
                run.enqueue(stream)
                self.driver.drain(stream)
            except BaseException:
                run.close()
                raise
            self.compiled.keep()
            # TensorRT-RTX alone can tell; an engine that cannot be captured is still right, launch by launch.
            self.capturable = self.capturable and run.capturable(stream)
            return run

    def _context(self) -> Any:
        messages = self.library.logger.messages
        messages.clear()
        context: Any = None
        try:
            context = self.engine.create_execution_context(**self.compiled.options)
        except Exception as error:  # the bindings raise several kinds without a common base
            messages.append(str(error))
        if context is None:
            reason = " ".join(messages) or NO_REASON
            raise BackendError(f"{self.library.name} has no room for another stream: {reason}")
        return context


class TensorRtRun:
    """An execution context with its addresses set, and its scratch memory where it does not take its own.

    It outlives its engine where a stream outlives its talker, and then keeps what it was made from.
    """

    def __init__(self, library: Library, context: Any, compiled: Compiled, driver: Driver) -> None:
        self._library, self._context, self._driver = library, context, driver
        self._compiled: Compiled | None = compiled
        self._scratch: list[int] = []

    def prepare(self, addresses: Mapping[str, int]) -> None:
        """Give the context its scratch memory, where it does not take its own, and the tensors' addresses."""
        size = self._compiled.scratch_bytes if self._compiled else None
        if size is not None:
            self._scratch.append(self._driver.device_memory(max(size, 1)))
            self._context.set_device_memory(self._scratch[0], size)
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise BackendError(f"{self._library.name} does not take an address for `{name}`.")

    def capturable(self, stream: Handle) -> bool:
        """Whether the library does not refuse a capture."""
        can_capture = getattr(self._context, "is_stream_capturable", None)
        return can_capture is None or bool(can_capture(int(stream)))

    def enqueue(self, stream: Handle) -> None:
        """Put one run on the stream."""
        if not self._context.execute_async_v3(int(stream)):
            messages = self._library.logger.messages
            reason = " ".join(messages) or NO_REASON
            messages.clear()  # else they pile up where every hop fails
            raise BackendError(f"{self._library.name} failed: {reason}")

    def close(self) -> None:
        """Let the context and its scratch memory go."""
        self._context = None
        self._compiled = None  # after the context that reads it
        while self._scratch:
            self._driver.free(self._scratch.pop())


@cache
def error_log(trt: Any) -> Any:
    """The logger for a TensorRT library, which keeps the messages of errors in `messages` and prints nothing.

    One for the life of the process: the library goes on calling the first that it met, also after that is gone.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.messages.append(message.strip())

    return Log()
