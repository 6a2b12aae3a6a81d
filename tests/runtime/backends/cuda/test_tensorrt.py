"""Loading engines, with a TensorRT that stands in for both: what it is asked, and what it is refused for."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from streamtalk import BackendError, MissingDependencyError, ModelError
from streamtalk.backends.cuda import classic, rtx
from streamtalk.backends.cuda.driver import Driver, open_driver
from streamtalk.backends.cuda.tensorrt import Library, TensorRtEngine
from streamtalk.backends.engine_file import Fit, find_engine
from streamtalk.model import read_manifest
from tests.runtime.backends.cuda.fake import FakeCuda
from tests.runtime.backends.cuda.libraries import HOST, Kind, Mode, StubEngine, add_engines, tensorrt_module
from tests.tensorrt_api import RECORDED, RTX, plain


@pytest.fixture
def driver(cuda: FakeCuda) -> Driver:
    del cuda
    return open_driver()


@pytest.fixture
def loaded(
    directory: Path, cuda: FakeCuda, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[TensorRtEngine, StubEngine]]:
    """`loaded(key, change)`: the engine of one row by a library of that name and version, and the stand-in behind it,
    which `change` may change first.
    """

    def load(key: str = "tensorrt 10.3.0", change: Any = lambda _: None, gpu: Driver = driver) -> Any:
        name, version = key.split()
        module = tensorrt_module(cuda, key)
        module.change = change
        monkeypatch.setitem(sys.modules, name, module)
        fit = find_engine(directory, add_engines(directory, key), 1, name, version, 87, "fp32")
        engine = Library(name).load(fit, gpu)
        return engine, plain(engine.engine)

    return load


def memory(driver: Driver, engine: TensorRtEngine) -> dict[str, int]:
    """Addresses for all tensors of an engine, cleared."""
    names = [t.name for t in (*engine.graph.inputs, *engine.graph.outputs)]
    base, stream = driver.device_memory(4096 * len(names) + 2**16), driver.stream()
    driver.clear(base, 4096 * len(names) + 2**16, stream)
    driver.drain(stream)
    driver.discard(stream)
    return {name: base + 4096 * i for i, name in enumerate(n for n in names if n != "pcm")} | {
        "pcm": base + 4096 * len(names)
    }


@pytest.mark.parametrize("key", RECORDED)
def test_an_engine_is_compared_and_bound(key: str, loaded: Any, driver: Driver) -> None:
    engine, stub = loaded(key)
    stream, addresses = driver.stream(), memory(driver, engine)
    run = engine.bind(addresses, stream)
    assert stub.ran == 1  # before any capture
    assert stub.contexts[0].addresses == addresses
    assert engine.capturable
    stub.refuses = True
    engine.library.logger.messages.append("the device is lost")
    with pytest.raises(BackendError, match=f"{engine.library.name} failed: the device is lost"):
        run.enqueue(stream)
    assert engine.library.logger.messages == []  # the next failure has messages of its own
    stub.capturable = stub.refuses = False
    engine.bind(addresses, stream)
    assert engine.capturable == (key not in RTX)  # which alone can tell


def test_the_librarys_own_message(
    directory: Path, cuda: FakeCuda, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(cuda))
    manifest = add_engines(directory)
    fit = find_engine(directory, manifest, 1, "tensorrt", "10.3.0", 87, "fp32")
    with pytest.raises(BackendError, match=r"cannot load .*not compatible\. Build it again here"):
        Library("tensorrt").load(Unreadable(fit.engine, fit.graph, fit.path), driver)


class Unreadable(Fit):
    """An engine of another version, whose hash is right."""

    def read(self) -> bytes:
        return b"\x00"


def test_the_bytes_that_were_compared_are_loaded(loaded: Any, directory: Path, driver: Driver) -> None:
    engine, _ = loaded()
    fit = find_engine(directory, read_manifest(directory), 1, "tensorrt", "10.3.0", 87, "fp32")
    fit.path.write_bytes(fit.path.read_bytes() + b" ")
    with pytest.raises(ModelError, match=r"is not the engine that was built.*Build it again"):
        engine.library.load(fit, driver)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("kv_cache", (Mode.INPUT, Kind.FLOAT, (1, 2))),
        ("noise", (Mode.INPUT, Kind.HALF, (1, 2, 3))),
        ("mood", (Mode.INPUT, Kind.FLOAT, (1, 1))),
        ("vertices", (Mode.INPUT, Kind.FLOAT, (1, 2, 4, 3))),
    ],
)
def test_a_foreign_engine_is_refused(name: str, tensor: Any, loaded: Any) -> None:
    with pytest.raises(ModelError, match=name):
        loaded(change=lambda stub: stub.tensors.__setitem__(name, tensor))


def test_a_library_that_does_not_start_is_a_sentence(
    directory: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classic TensorRT raises a TypeError where CUDA does not start: `auto` passes over it."""

    def fails(_: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module = tensorrt_module(cuda)
    module.Runtime = fails
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(BackendError, match=r"cannot load .*returned nullptr"):
        classic.load(directory, add_engines(directory), "fp32", 1)


def test_a_tensor_in_host_memory_is_refused(loaded: Any) -> None:
    with pytest.raises(BackendError, match="wants position in host memory"):
        loaded(change=lambda stub: setattr(stub, "location", HOST))


@pytest.mark.parametrize("key", RECORDED)
def test_scratch_memory_is_the_runs_and_goes_back(
    key: str, loaded: Any, driver: Driver, cuda: FakeCuda
) -> None:
    """Where a context can be given it: that of 10.3 takes its own, and gives it back itself."""
    engine, stub = loaded(key)
    stream, addresses = driver.stream(), memory(driver, engine)
    before = set(cuda.device)
    run = engine.bind(addresses, stream)
    can_be_given = key != "tensorrt 10.3.0"
    assert stub.strategy == (2 if can_be_given else None)
    assert stub.contexts[0].scratch == [(address, 1000) for address in set(cuda.device) - before]
    assert len(stub.contexts[0].scratch) == can_be_given
    run.close()
    assert set(cuda.device) == before
    stub.refuses = True
    with pytest.raises(BackendError, match=f"{engine.library.name} failed"):
        engine.bind(addresses, stream)
    assert set(cuda.device) == before


def test_no_room_for_another_stream(loaded: Any, driver: Driver) -> None:
    engine, stub = loaded()
    stub.room = False
    with pytest.raises(BackendError, match="no room for another stream"):
        engine.bind({}, driver.stream())


def test_an_address_that_is_not_aligned_is_refused(loaded: Any, driver: Driver) -> None:
    engine, _ = loaded()
    with pytest.raises(BackendError, match="does not take an address for `pcm`"):
        engine.bind({"pcm": 1}, driver.stream())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            MissingDependencyError, match=f"{name} needs the package of that name: pip install"
        ):
            Library(name)


def test_a_model_without_engines_says_how_to_build_them(directory: Path) -> None:
    """Before the library or the GPU is asked for."""
    for load, name in ((classic.load, "tensorrt"), (rtx.load, "tensorrt_rtx")):
        with pytest.raises(BackendError, match=f"streamtalk build .*model --backend {name}`"):
            load(directory, read_manifest(directory), "fp16", 1)


def test_rtx_is_loaded_as_classic_is(
    directory: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = RTX[-1]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", tensorrt_module(cuda, key))
    backend = rtx.load(directory, add_engines(directory, key), "fp32", 1)
    assert (backend.name, backend.precision) == ("tensorrt_rtx", "fp32")
    assert key in backend.description
    rows = backend.rows(1, np.zeros(3, np.float32))
    rows.launch(np.ones(1, np.bool_))
    assert rows.vertices().shape == (1, 2, 4, 3)
    assert backend.fingerprint.endswith(f"{read_manifest(directory).engines[0].sha256} ")


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "compiled").iterdir())


@pytest.mark.parametrize("key", RTX)
def test_the_kernels_that_an_engine_compiles_are_kept(
    key: str, loaded: Any, driver: Driver, cache: Path
) -> None:
    engine, first = loaded(key)
    stream, addresses = driver.stream(), memory(driver, engine)
    for _ in range(3):
        engine.bind(addresses, stream)
    assert list(map(plain, first.configs)) == [first] * 3
    assert first.serialized == 1
    # Contexts that are made later read the cache too, and the engine goes after its configuration and the cache.
    assert plain(engine.compiled._cache) is first
    order = [name for name in vars(engine.compiled) if name in ("options", "_cache", "_engine")]
    assert order == ["options", "_cache", "_engine"]
    (file,) = kept(cache)
    assert file.read_bytes() == b"kernels"
    engine, second = loaded(key)
    engine.bind(addresses, stream)
    assert second.known == b"kernels"
    driver.description = "another GPU"
    loaded(key)[0].bind(addresses, stream)
    assert len(kept(cache)) == 2


@pytest.mark.parametrize("key", RTX)
def test_a_context_keeps_what_it_was_made_from(key: str, loaded: Any, driver: Driver) -> None:
    """A stream may outlive its talker, and with it the engine."""
    engine, _ = loaded(key)
    run, compiled = engine.bind(memory(driver, engine), driver.stream()), weakref.ref(engine.compiled)
    del engine, _
    gc.collect()
    assert compiled() is not None
    run.close()
    gc.collect()
    assert compiled() is None


@pytest.mark.parametrize("key", RTX)
def test_kernels_of_another_version_are_replaced(key: str, loaded: Any, driver: Driver, cache: Path) -> None:
    engine, _ = loaded(key)
    stream, addresses = driver.stream(), memory(driver, engine)
    engine.bind(addresses, stream)
    (file,) = kept(cache)
    file.write_bytes(b"cut off")
    loaded(key)[0].bind(addresses, stream)
    assert file.read_bytes() == b"kernels"


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("key", RTX)
def test_a_cache_that_fails_costs_nothing_else(
    key: str, fails: bool, loaded: Any, driver: Driver, cache: Path
) -> None:
    cache.touch()  # no folder
    engine, stub = loaded(key, lambda stub: setattr(stub, "fails", fails))
    engine.bind(memory(driver, engine), driver.stream())
    assert stub.ran == 1


def test_one_thread_at_a_time_makes_a_context(loaded: Any, driver: Driver) -> None:
    """Contexts share one configuration and one cache of kernels."""
    engine, stub = loaded(RTX[-1])
    addresses, streams = memory(driver, engine), [driver.stream() for _ in range(2)]
    inside, seen = [0], list[int]()
    run = stub.session.run_with_iobinding

    def slow(binding: Any) -> None:
        inside[0] += 1
        other = threads[1]
        if not other.ident:
            other.start()
            other.join(0.1)  # it would be through by then, if it did not wait its turn
        seen.append(inside[0])
        run(binding)
        inside[0] -= 1

    stub.session = type(
        "Session", (), {"run_with_iobinding": staticmethod(slow), "io_binding": stub.session.io_binding}
    )()
    threads = [Thread(target=engine.bind, args=(addresses, stream)) for stream in streams]
    threads[0].start()
    threads[0].join()
    threads[1].join()
    assert seen == [1, 1]
