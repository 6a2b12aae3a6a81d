"""Engines of classic TensorRT and TensorRT-RTX, which share this part of their interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from streamtalk.backends.contract import Tensors, compare, declared
from streamtalk.cache import remember, remembered
from streamtalk.cuda.driver import Driver, Handle
from streamtalk.engine_file import Fit
from streamtalk.errors import BackendError, MissingDependencyError
from streamtalk.manifest import Graph, Tensor

INSTALL = {
    "tensorrt": "pip install 'streamtalk[tensorrt]', or on a Jetson use JetPack's own package",
    "tensorrt_rtx": "pip install 'streamtalk[rtx]'",
}
KIND = "compiled"
DTYPES = {"FLOAT": "float32", "INT64": "int64", "BOOL": "bool"}


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
        self.logger = error_words(self.trt)
        self.runtime: Any = None

    def load(self, fit: Fit, driver: Driver) -> TensorRtEngine:
        """Deserialise an engine whose hash was verified, and compare what it takes and gives with the manifest."""
        self.logger.words.clear()
        plan = fit.path.read_bytes()
        engine: Any = None
        try:
            # In the driver's context, where a capture in another thread does not forbid to allocate.
            with driver.current():
                if self.runtime is None:  # raises where CUDA does not start
                    self.runtime = self.trt.Runtime(self.logger)
                engine = self.runtime.deserialize_cuda_engine(plan)
        except Exception as error:  # the bindings raise several kinds without a common base
            self.logger.words.append(str(error))
        if engine is None:
            words = " ".join(self.logger.words) or "it gives no reason."
            raise BackendError(
                f"{self.name} {self.version} cannot load {fit.path}: {words} Build it again here."
            )
        got_inputs, got_outputs = self._tensors(engine)
        want_inputs, want_outputs = declared(fit.graph)
        compare(f"The inputs of {fit.path}", want_inputs, got_inputs)
        compare(f"The outputs of {fit.path}", want_outputs, got_outputs)
        on_host = [
            name
            for name in (*got_inputs, *got_outputs)
            if engine.get_tensor_location(name) != self.trt.TensorLocation.DEVICE
        ]
        if on_host:
            raise BackendError(f"{fit.path} wants {', '.join(on_host)} in host memory. Build it again here.")
        key = f"{self.name} {self.version}; {driver.description}; {fit.engine.sha256}"
        return TensorRtEngine(self, engine, fit.graph, driver, Compiled(self.trt, engine, key))

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
    """What TensorRT-RTX compiles for this GPU when an engine first runs, kept from one start to the next.

    Only saves time: nothing that fails here fails more. The library refuses what another version, driver or GPU
    wrote. Classic TensorRT compiles when it builds and has no such cache.
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
            # What allocates as it runs cannot be captured: all scratch memory is the lane's.
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
        """Keep what was compiled, if that is more than what was kept; once."""
        if self._kept or self._cache is None:
            return
        self._kept = True
        with suppress(Exception):
            content = bytes(memoryview(self._cache.serialize()))
            if content and content != self._stored:
                remember(KIND, self._key, content)


class TensorRtEngine:
    """See `engine.DeviceEngine`."""

    def __init__(
        self, library: Library, engine: Any, graph: Graph, driver: Driver, compiled: Compiled
    ) -> None:
        self.library, self.engine, self.graph, self.driver = library, engine, graph, driver
        self.compiled = compiled
        self.capturable = True

    def bind(self, addresses: Mapping[str, int], stream: Handle) -> TensorRtRun:
        """A context with its own scratch memory; it runs once, for an engine must have run before a capture."""
        library, words = self.library, self.library.logger.words
        words.clear()
        context: Any = None
        try:
            context = self.engine.create_execution_context(**self.compiled.options)
        except Exception as error:  # the bindings raise several kinds without a common base
            words.append(str(error))
        if context is None:
            said = " ".join(words) or "it gives no reason."
            raise BackendError(f"{library.name} has no room for another stream: {said}")
        run = TensorRtRun(library, context, self.compiled, self.driver)
        try:
            run.take_scratch(self.compiled.scratch_bytes)
            for name, address in addresses.items():
                if not context.set_tensor_address(name, address):
                    raise BackendError(f"{library.name} does not take an address for `{name}`.")
            run.enqueue(stream)
            self.driver.drain(stream)
        except BaseException:
            run.close()
            raise
        self.compiled.keep()
        # TensorRT-RTX alone can tell; an engine that cannot be captured is still right, launch by launch.
        can_capture = getattr(context, "is_stream_capturable", None)
        if can_capture is not None and not can_capture(int(stream)):
            self.capturable = False
        return run


class TensorRtRun:
    """An execution context with its addresses set, and its scratch memory where it does not take its own.

    It outlives its engine where a stream outlives its talker, and then keeps what it was made from.
    """

    def __init__(self, library: Library, context: Any, compiled: Compiled, driver: Driver) -> None:
        self._library, self._context, self._driver = library, context, driver
        self._compiled: Compiled | None = compiled
        self._scratch: list[int] = []

    def take_scratch(self, size: int | None) -> None:
        """Give the context `size` bytes on the device to work in; None where it has its own."""
        if size is not None:
            self._scratch.append(self._driver.device_memory(max(size, 1)))
            self._context.set_device_memory(self._scratch[0], size)

    def enqueue(self, stream: Handle) -> None:
        """Put one run on the stream."""
        if not self._context.execute_async_v3(int(stream)):
            words = " ".join(self._library.logger.words) or "it gives no reason."
            self._library.logger.words.clear()  # told; else they pile up where every frame fails
            raise BackendError(f"{self._library.name} failed: {words}")

    def close(self) -> None:
        """Let the context and its scratch memory go."""
        self._context = None
        self._compiled = None  # after the context that reads it
        scratch, self._scratch = self._scratch, []
        self._driver.release(scratch)


@cache
def error_words(trt: Any) -> Any:
    """The logger for a TensorRT library, which keeps the words of errors in `words` and prints nothing.

    One for the life of the process: the library goes on speaking to the first that it met, also after that is gone.
    """

    class Words(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.words: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.words.append(message.strip())

    return Words()
