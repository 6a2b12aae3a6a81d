"""Vertices that stay on the device, on a GPU of host memory: numpy and torch take them by DLPack without a copy."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamtalk.backends.cuda.backend import CudaBackend
from streamtalk.backends.cuda.device_array import DeviceArray, Fence
from streamtalk.backends.cuda.driver import Driver, open_driver
from streamtalk.backends.onnxruntime import CpuBackend
from streamtalk.model import read_manifest
from tests.runtime.backends.cuda.fake import FakeCuda
from tests.runtime.backends.cuda.test_rows import hop, opened
from tests.runtime.toy import Toy

SHAPE = (3, 2, 4, 3)
"""B, hop, V, 3."""
HOST = (1, 0)
"""Host memory as a DLPack device, so that numpy and torch can take it."""
USES = 1000  # of a block of more than 64 bytes each
OUTLIVING = """
import builtins, sys, numpy as np, torch.utils.dlpack
from tests.runtime.backends.cuda.fake import FakeCuda
sys.modules["cuda.bindings.runtime"] = sys.modules["cuda.bindings.driver"] = FakeCuda()
from tests.runtime.backends.cuda.test_device_array import array, host_driver
values = np.ones((2, 3), np.float32)
shared = array(host_driver(), values)
builtins.kept = [torch.utils.dlpack.from_dlpack(shared), np.from_dlpack(shared), shared.__dlpack__()]
print("made")
"""


def host_driver() -> Driver:
    """A driver whose device is host memory to those who take arrays."""
    driver = open_driver()
    driver.dlpack_device = HOST
    return driver


@pytest.fixture
def driver(cuda: FakeCuda) -> Driver:
    del cuda
    return host_driver()


@pytest.fixture
def values() -> Any:
    return np.arange(72, dtype=np.float32).reshape(SHAPE)


def array(driver: Driver, values: Any) -> DeviceArray:
    fence = Fence(driver, driver.stream(), driver.event(), driver.event())
    return DeviceArray(fence, values.ctypes.data, values.shape)


def by_torch(shared: Any) -> Any:
    """What torch makes of it; skips where there is none."""
    return pytest.importorskip("torch").utils.dlpack.from_dlpack(shared)


def test_numpy_and_torch_see_it_in_place(driver: Driver, values: Any) -> None:
    shared = array(driver, values)
    taken = [np.from_dlpack(shared), by_torch(shared).numpy()]
    values[1, 1, 2, 0] = -1
    for got in taken:
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, values)


def test_its_parts(driver: Driver, values: Any) -> None:
    shared = array(driver, values)
    np.testing.assert_array_equal(np.from_dlpack(shared.at(2)), values[2])
    np.testing.assert_array_equal(np.from_dlpack(shared.at(2, 1)), values[2, 1])
    np.testing.assert_array_equal(np.from_dlpack(shared.at(2).at(1)), values[2, 1])
    assert shared.at(1, 0).shape == (4, 3)
    with pytest.raises(ValueError, match="invalid entry"):
        shared.at(3)


def test_a_copy_on_the_host(driver: Driver, values: Any) -> None:
    address = driver.device_memory(values.nbytes)
    fence = Fence(driver, driver.stream(), driver.event(), driver.event())
    shared = DeviceArray(fence, address, values.shape)
    driver.upload(address, values.reshape(-1).view(np.uint8), fence.stream)
    np.testing.assert_array_equal(shared.on_host(), values)


def test_readers_of_two_rows_do_not_undo_each_others_wait(
    driver: Driver, values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows mark their reading with one event: a second mark before the first is waited for would lose it."""
    shared = array(driver, values)
    done: list[str] = []
    other = threading.Thread(target=shared.at(1).release_on, args=(driver.stream(),))

    def record(*_: Any) -> None:
        done.append("marked")
        if not other.ident:
            other.start()
            other.join(0.1)  # it would be through by then, if it did not wait its turn

    monkeypatch.setattr(driver, "record", record)
    monkeypatch.setattr(driver, "wait", lambda *_: done.append("waited"))
    shared.at(0).release_on(driver.stream())
    other.join()
    assert done == ["marked", "waited"] * 2


def leaked(cuda: FakeCuda, use: Callable[[], Any]) -> int:
    """Bytes that stay of many uses: capsules lie in memory that tracemalloc sees.

    The least of three rounds: what leaks does so in each, and the interpreter takes memory of its own now and then.
    """
    tracemalloc.start()
    try:
        for _ in range(20):
            use()
        return min(_stays(cuda, use) for _ in range(3))
    finally:
        tracemalloc.stop()


def _stays(cuda: FakeCuda, use: Callable[[], Any]) -> int:
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(USES):
        use()
        cuda.calls.clear()
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 3)])
def test_a_capsule_that_nobody_reads_is_given_back(
    version: tuple[int, int] | None, driver: Driver, values: Any, cuda: FakeCuda
) -> None:
    shared = array(driver, values)
    name = "dltensor_versioned" if version and version[0] else "dltensor"
    assert f'"{name}"' in repr(shared.__dlpack__(max_version=version))
    assert leaked(cuda, lambda: shared.__dlpack__(max_version=version)) < USES


@pytest.mark.parametrize("take", [np.from_dlpack, by_torch])
def test_a_capsule_that_was_read_is_given_back_by_its_reader(
    take: Any, driver: Driver, values: Any, cuda: FakeCuda
) -> None:
    shared = array(driver, values)
    taken = [take(shared) for _ in range(3)]
    gc.collect()
    assert all(np.array_equal(np.asarray(one), values) for one in taken)
    assert leaked(cuda, lambda: take(shared)) < USES


def test_a_reader_that_outlives_the_interpreter() -> None:
    """Torch deletes after the end of Python; a deleter written in Python would end in a crash."""
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVING],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[4],
    )
    assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr


def test_the_array_interface(driver: Driver, values: Any) -> None:
    shared = array(driver, values)
    assert shared.__cuda_array_interface__ == {
        "shape": SHAPE,
        "typestr": "<f4",
        "data": (values.ctypes.data, False),
        "strides": None,
        "stream": shared.stream,
        "version": 3,
    }
    assert shared.stream > 2  # 0 to 2 have meanings of their own
    assert np.dtype(shared.dtype).str == "<f4"


def test_what_dlpack_may_not_ask(driver: Driver, values: Any) -> None:
    shared = array(driver, values)
    assert shared.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match="never copied"):
        shared.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"not on \(2, 1\)"):
        shared.__dlpack__(dl_device=(2, 1))
    with pytest.raises(BufferError, match="Stream 0"):
        shared.__dlpack__(stream=0)


@pytest.mark.parametrize(("stream", "waiting"), [(None, [1]), (1, [1]), (2, [2]), (77, [77]), (-1, [])])
def test_the_consumers_stream_waits_for_the_hop(
    stream: int | None, waiting: list[int], driver: Driver, values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = array(driver, values)
    waits: list[Any] = []
    monkeypatch.setattr(driver, "wait", lambda *arguments: waits.append(arguments))
    shared.__dlpack__(stream=stream)
    assert waits == [(one, shared._fence.ready) for one in waiting]


def rows_on_host(backend: CudaBackend, toy: Toy, count: int) -> Any:
    backend.driver.dlpack_device = HOST
    return opened(backend, toy, count)


def test_rows_have_them(directory: Path, load: Callable[..., CudaBackend]) -> None:
    toy, one = Toy(rows=(1, 3)), np.ones(3, np.bool_)
    gpu = rows_on_host(load(directory).on_device(), toy, 3)
    cpu = opened(CpuBackend(directory, read_manifest(directory), 1), toy, 3)
    for number in range(3):
        for rows in (gpu, cpu):
            hop(rows, number, one)
            rows.advance(one)
        # Nobody waited: the consumer does.
        every = np.from_dlpack(gpu.device_vertices)
        np.testing.assert_array_equal(every, cpu.vertices())
        gpu.device_vertices.wait()
        np.testing.assert_array_equal(np.from_dlpack(gpu.device_vertices.at(2, 1)), cpu.vertices()[2, 1])


def test_the_next_launch_waits_for_who_said_so(directory: Path, load: Callable[..., CudaBackend]) -> None:
    gpu, one = rows_on_host(load(directory).on_device(), Toy(), 1), np.ones(1, np.bool_)
    hop(gpu, 0, one)
    gpu.advance(one)
    shared, seen = gpu.device_vertices, []
    first = shared.on_host()
    with gpu._driver.current():
        consumer = gpu._driver.stream()
    # A consumer that is late: its copy of the first hop runs when the second launch lets it.
    consumer.put(lambda: seen.append(still(shared)))
    shared.release_on(consumer)
    hop(gpu, 1, one)
    assert not np.array_equal(shared.on_host(), first)
    np.testing.assert_array_equal(seen[0], first)


def still(shared: DeviceArray) -> Any:
    """The memory as it is, without a wait."""

    class Now:
        def __dlpack_device__(self) -> tuple[int, int]:
            return shared.__dlpack_device__()

        def __dlpack__(self, **options: Any) -> Any:
            return shared.__dlpack__(**{**options, "stream": -1})

    return np.from_dlpack(Now()).copy()
