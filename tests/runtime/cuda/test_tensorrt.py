"""Loading engines, with a TensorRT that stands in for both: what it is asked, and what it is refused for."""

from __future__ import annotations

import gc
import sys
import weakref
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from streamtalk import BackendError, MissingDependencyError, ModelError
from streamtalk.cuda.tensorrt import Library, TensorRtEngine
from streamtalk.engine_file import Fit
from streamtalk.manifest import FRAME, Engine, read_manifest
from tests.runtime.cuda.fake import FakeDriver
from tests.tensorrt_api import RECORDED, RTX, Api, plain


class Mode(Enum):
    INPUT = "input"
    OUTPUT = "output"


class Kind(Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 2
    BOOL = 3


DEVICE, HOST = 0, 1  # as `Api.enumeration` numbers them
KINDS = {"float32": Kind.FLOAT, "int64": Kind.INT64, "bool": Kind.BOOL}


class StubEngine:
    """The frame graph's tensors; contexts that count their runs; what TensorRT-RTX compiles and keeps. It is all of a
    library's objects at once: which of its methods they have is the version's to say.
    """

    def __init__(self, tensors: dict[str, tuple[Mode, Kind, tuple[Any, ...]]]) -> None:
        self.tensors, self.runs, self.addresses = tensors, 0, {}  # type: ignore[var-annotated]
        self.room, self.capturable, self.location, self.fails = True, True, DEVICE, False
        self.num_io_tensors = len(tensors)
        self.known, self.serialized = b"", 0
        self.strategy: int | None = None
        self.contexts: list[Any] = []
        self.scratch: list[tuple[int, int]] = []
        self.device_memory_size_v2 = 1000

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
        self.contexts.append(runtime_config)
        return self if self.room else None

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        return stream == 7

    def is_stream_capturable(self, _: int) -> bool:
        return self.capturable

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch.append((memory, size))

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


@pytest.fixture
def fit(engine: Path) -> Fit:
    graph = read_manifest(engine).graphs[FRAME]
    entry = Engine(
        graph=FRAME,
        file=graph.file,
        sha256=graph.files[graph.file],
        backend="tensorrt",
        precision="fp32",
        tensorrt_version="10.3.0",
        compute_capability="87",
        graph_sha256=graph.sha256,
    )
    return Fit(entry, graph, engine / graph.file)


@pytest.fixture
def stub(fit: Fit) -> StubEngine:
    tensors = {t.name: (Mode.INPUT, KINDS[t.dtype], t.shape) for t in fit.graph.inputs}
    return StubEngine(tensors | {t.name: (Mode.OUTPUT, KINDS[t.dtype], t.shape) for t in fit.graph.outputs})


def library(
    monkeypatch: pytest.MonkeyPatch, engine: StubEngine | None, key: str = "tensorrt 10.3.0"
) -> Library:
    api = Api(key)

    class Logger:
        Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING")

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> StubEngine | None:
            assert plan
            self.logger.log(Logger.Severity.WARNING, "hm")
            if engine is None:
                self.logger.log(Logger.Severity.ERROR, "The engine plan file is not compatible. ")
            return engine

    module: Any = ModuleType(api.name)
    module.__version__ = api.version
    assert {mode.name for mode in Mode} <= set(api.recorded["TensorIOMode"].split())
    assert {kind.name for kind in Kind} <= set(api.recorded["DataType"].split())
    module.ILogger, module.TensorIOMode = Logger, Mode
    module.Runtime = lambda logger: api.speak("Runtime", Runtime(logger))
    module.TensorLocation = api.enumeration("TensorLocation")
    module.ExecutionContextAllocationStrategy = api.enumeration("ExecutionContextAllocationStrategy")
    monkeypatch.setitem(sys.modules, api.name, module)
    return Library(api.name)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("key", RECORDED)
def test_an_engine_is_compared_and_bound(
    key: str, fit: Fit, stub: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = library(monkeypatch, stub, key).load(fit, FakeDriver())
    assert isinstance(loaded, TensorRtEngine)
    run = loaded.bind({name: 256 * i for i, name in enumerate(stub.tensors)}, 7)
    # One run before any capture.
    assert stub.runs == 1
    assert set(stub.addresses) == set(stub.tensors)
    assert loaded.capturable
    loaded.library.logger.words.append("the device is lost")
    with pytest.raises(BackendError, match=f"{loaded.library.name} failed: the device is lost"):
        run.enqueue(8)
    assert loaded.library.logger.words == []  # told: the next failure has words of its own
    stub.capturable = False
    loaded.bind({}, 7)
    assert loaded.capturable == (key not in RTX)  # which alone can tell


def test_the_librarys_own_words(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"cannot load .*not compatible\. Build it again here"):
        library(monkeypatch, None).load(fit, FakeDriver())


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("kv_cache", (Mode.INPUT, Kind.FLOAT, (1, 2))),
        ("noise", (Mode.INPUT, Kind.HALF, (1, 3))),
        ("mood", (Mode.INPUT, Kind.FLOAT, (1, 1))),
    ],
)
def test_a_foreign_engine_is_refused(
    name: str, tensor: Any, fit: Fit, stub: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = StubEngine({**stub.tensors, name: tensor})
    with pytest.raises(ModelError, match=name):
        library(monkeypatch, foreign).load(fit, FakeDriver())


def test_a_library_that_does_not_start_is_a_sentence(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classic TensorRT raises a TypeError where CUDA does not start: `auto` passes over it."""
    loaded = library(monkeypatch, None)

    def fails(_: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(loaded.trt, "Runtime", fails)
    with pytest.raises(BackendError, match=r"cannot load .*returned nullptr"):
        loaded.load(fit, FakeDriver())


def test_a_tensor_in_host_memory_is_refused(
    fit: Fit, stub: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.location = HOST
    with pytest.raises(BackendError, match="wants position in host memory"):
        library(monkeypatch, stub).load(fit, FakeDriver())


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("key", RECORDED)
def test_scratch_memory_is_the_lanes_and_goes_back(
    key: str, fit: Fit, stub: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a context can be told so: 10.3's takes its own, and gives it back itself."""
    driver, can_be_told = FakeDriver(), key != "tensorrt 10.3.0"
    loaded = library(monkeypatch, stub, key).load(fit, driver)
    run = loaded.bind({}, 7)
    assert stub.strategy == (2 if can_be_told else None)
    assert stub.scratch == [(address, 1000) for address in driver.memory]
    assert len(stub.scratch) == can_be_told
    run.close()
    assert driver.memory == {}
    with pytest.raises(BackendError, match=f"{loaded.library.name} failed"):
        loaded.bind({}, 8)
    assert driver.memory == {}


def test_no_room_for_another_stream(fit: Fit, stub: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.room = False
    loaded = library(monkeypatch, stub).load(fit, FakeDriver())
    with pytest.raises(BackendError, match="no room for another stream"):
        loaded.bind({}, 7)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            MissingDependencyError, match=f"{name} needs the package of that name: pip install"
        ):
            Library(name)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMTALK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FakeDriver, "drain", lambda *_: None)
    return tmp_path / "cache" / "compiled"


@pytest.mark.parametrize("key", RTX)
def test_what_an_engine_compiles_is_kept(
    key: str, fit: Fit, stub: StubEngine, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = StubEngine(stub.tensors), StubEngine(stub.tensors)
    loaded = library(monkeypatch, first, key).load(fit, FakeDriver())
    for _ in range(3):
        loaded.bind({}, 7)
    assert first.contexts == [first] * 3
    assert first.serialized == 1
    # Contexts that are made later read the cache too, and the engine goes after its configuration and the cache.
    assert plain(loaded.compiled._cache) is first
    order = [name for name in vars(loaded.compiled) if name in ("options", "_cache", "_engine")]
    assert order == ["options", "_cache", "_engine"]
    (file,) = kept.iterdir()
    assert file.read_bytes() == b"kernels"
    library(monkeypatch, second, key).load(fit, FakeDriver()).bind({}, 7)
    assert second.known == b"kernels"
    library(monkeypatch, StubEngine(stub.tensors), key).load(fit, FakeDriver("another GPU")).bind({}, 7)
    assert len(list(kept.iterdir())) == 2


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("key", RTX)
def test_a_context_keeps_what_it_was_made_from(
    key: str, fit: Fit, stub: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream may outlive its talker, and with it the engine."""
    loaded = library(monkeypatch, StubEngine(stub.tensors), key).load(fit, FakeDriver())
    run, compiled = loaded.bind({}, 7), weakref.ref(loaded.compiled)
    del loaded
    gc.collect()
    assert compiled() is not None
    run.close()
    gc.collect()
    assert compiled() is None


@pytest.mark.parametrize("key", RTX)
def test_what_another_version_compiled_is_replaced(
    key: str, fit: Fit, stub: StubEngine, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, StubEngine(stub.tensors), key).load(fit, FakeDriver()).bind({}, 7)
    (file,) = kept.iterdir()
    file.write_bytes(b"cut off")
    library(monkeypatch, StubEngine(stub.tensors), key).load(fit, FakeDriver()).bind({}, 7)
    assert file.read_bytes() == b"kernels"


@pytest.mark.parametrize("key", RTX)
def test_a_cache_that_fails_costs_nothing_else(
    key: str, fit: Fit, stub: StubEngine, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.parent.touch()
    failing = StubEngine(stub.tensors)
    failing.fails = True
    for engine in (stub, failing):
        library(monkeypatch, engine, key).load(fit, FakeDriver()).bind({}, 7)
        assert engine.runs == 1
