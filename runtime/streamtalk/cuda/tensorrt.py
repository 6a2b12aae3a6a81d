"""Engines of classic TensorRT and TensorRT-RTX, which share this part of their interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import suppress
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
        except ImportError as error:
            raise MissingDependencyError(
                f"{name} needs the package of that name: {INSTALL[name]}. ({error})"
            ) from error
        self.name = name
        self.version: str = self.trt.__version__
        self.logger = error_words(self.trt)
        self.runtime: Any = None

    def load(self, fit: Fit, driver: Driver) -> TensorRtEngine:
        """Deserialise an engine whose hash was verified, and compare what it takes and gives with the manifest."""
        if self.runtime is None:
            self.runtime = self.trt.Runtime(self.logger)
        self.logger.words.clear()
        plan = fit.path.read_bytes()
        try:
            engine = self.runtime.deserialize_cuda_engine(plan)
        except Exception as error:  # the bindings raise several kinds without a common base
            self.logger.words.append(str(error))
            engine = None
        if engine is None:
            words = " ".join(self.logger.words) or "it gives no reason."
            raise BackendError(
                f"{self.name} {self.version} cannot load {fit.path}: {words} Build it again here."
            )
        got_inputs, got_outputs = self._tensors(engine)
        want_inputs, want_outputs = declared(fit.graph)
        compare(f"The inputs of {fit.path}", want_inputs, got_inputs)
        compare(f"The outputs of {fit.path}", want_outputs, got_outputs)
        key = f"{self.name} {self.version}; {driver.description}; {fit.engine.sha256}"
        return TensorRtEngine(self, engine, fit.graph, driver, Compiled(engine, key))

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

    def __init__(self, engine: Any, key: str) -> None:
        self._key, self._stored, self._cache = key, b"", None
        self.options: dict[str, Any] = {}
        """For `create_execution_context`."""
        create = getattr(engine, "create_runtime_config", None)
        config: Any = create() if create else None
        if not hasattr(config, "create_runtime_cache"):
            return
        with suppress(Exception):  # the bindings raise several kinds without a common base
            cache = config.create_runtime_cache()
            self._stored = remembered(KIND, key)
            if self._stored and not cache.deserialize(self._stored):
                self._stored = b""
            if config.set_runtime_cache(cache):
                self._cache, self.options = cache, {"runtime_config": config}

    def keep(self) -> None:
        """Keep what was compiled, if that is more than what was kept; once."""
        cache, self._cache = self._cache, None
        if cache is None:
            return
        with suppress(Exception):
            content = bytes(memoryview(cache.serialize()))
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
        self.library.logger.words.clear()
        context = self.engine.create_execution_context(**self.compiled.options)
        if context is None:
            words = " ".join(self.library.logger.words) or "it gives no reason."
            raise BackendError(f"{self.library.name} has no room for another stream: {words}")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(f"{self.library.name} does not take an address for `{name}`.")
        run = TensorRtRun(self.library, context)
        run.enqueue(stream)
        self.driver.drain(stream)
        self.compiled.keep()
        # TensorRT-RTX alone can tell; an engine that cannot be captured is still right, launch by launch.
        can_capture = getattr(context, "is_stream_capturable", None)
        if can_capture is not None and not can_capture(int(stream)):
            self.capturable = False
        return run


class TensorRtRun:
    """An execution context with its addresses set."""

    def __init__(self, library: Library, context: Any) -> None:
        self._library, self._context = library, context

    def enqueue(self, stream: Handle) -> None:
        """Put one run on the stream."""
        if not self._context.execute_async_v3(int(stream)):
            words = " ".join(self._library.logger.words) or "it gives no reason."
            raise BackendError(f"{self._library.name} failed: {words}")

    def close(self) -> None:
        """Let the context and its scratch memory go."""
        self._context = None


def error_words(trt: Any) -> Any:
    """A logger for a TensorRT library that keeps the words of errors in `words`, and prints nothing."""

    class Words(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.words: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.words.append(message.strip())

    return Words()
