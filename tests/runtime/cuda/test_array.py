"""Vertices that stay on the device, on a driver of host memory: numpy and torch take them by DLPack without a copy."""

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

from streamtalk import BackendError, Talker
from streamtalk.cuda.array import DeviceArray, device_vertices
from streamtalk.cuda.driver import Driver
from tests.runtime.cuda.fake import FakeDriver, FakeEvent, FakeStream
from tests.runtime.cuda.test_slots import load, memory
from tests.runtime.test_batch import SLOTS
from tests.runtime.toy import Toy, speech

__all__ = ["load", "memory"]

SHAPE = (3, 4, 3)
USES = 1000  # of a block of more than 64 bytes each
OUTLIVING = """
import builtins, numpy as np, torch.utils.dlpack
from streamtalk.cuda.array import DeviceArray
from tests.runtime.cuda.fake import FakeDriver
driver, values = FakeDriver(), np.ones((2, 3), np.float32)
shared = DeviceArray(driver, values.ctypes.data, (2, 3), driver.stream(), driver.event(), driver.event())
builtins.kept = [torch.utils.dlpack.from_dlpack(shared), np.from_dlpack(shared), shared.__dlpack__()]
print("made")
"""
Load = Callable[..., Talker]


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def values() -> Any:
    return np.arange(36, dtype=np.float32).reshape(SHAPE)


def array(driver: Any, values: Any) -> DeviceArray:
    stream = driver.stream()
    return DeviceArray(driver, values.ctypes.data, values.shape, stream, driver.event(), driver.event())


def by_torch(shared: Any) -> Any:
    """What torch makes of it; skips where there is none."""
    return pytest.importorskip("torch").utils.dlpack.from_dlpack(shared)


def test_numpy_and_torch_see_it_in_place(driver: FakeDriver, values: Any) -> None:
    shared = array(driver, values)
    taken = [np.from_dlpack(shared), by_torch(shared).numpy()]
    values[1, 2, 0] = -1
    for got in taken:
        assert got.dtype == np.float32
        assert np.array_equal(got, values)
    assert np.array_equal(np.from_dlpack(shared.row(2)), values[2])
    assert np.array_equal(shared.on_host(), values)


def test_readers_of_two_rows_do_not_undo_each_others_wait(
    driver: FakeDriver, values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows mark their reading with one event: a second mark before the first is waited for would lose it."""
    shared = array(driver, values)
    done: list[str] = []
    other = threading.Thread(target=shared.row(1).release_on, args=(driver.stream(),))

    def record(*_: Any) -> None:
        done.append("marked")
        if not other.ident:
            other.start()
            other.join(0.1)  # it would be through by then, if it did not wait its turn

    monkeypatch.setattr(driver, "record", record)
    monkeypatch.setattr(driver, "wait", lambda *_: done.append("waited"))
    shared.row(0).release_on(driver.stream())  # type: ignore[arg-type]
    other.join()
    assert done == ["marked", "waited"] * 2


def leaked(use: Callable[[], Any]) -> int:
    """Bytes that stay of many uses: capsules lie in memory that tracemalloc sees.

    The least of three rounds: what leaks does so in each, and the interpreter takes memory of its own now and then.
    """
    tracemalloc.start()
    try:
        for _ in range(20):
            use()
        return min(_stays(use) for _ in range(3))
    finally:
        tracemalloc.stop()


def _stays(use: Callable[[], Any]) -> int:
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(USES):
        use()
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 3)])
def test_a_capsule_that_nobody_reads_is_given_back(
    version: tuple[int, int] | None, driver: FakeDriver, values: Any
) -> None:
    shared = array(driver, values)
    name = "dltensor_versioned" if version and version[0] else "dltensor"
    assert f'"{name}"' in repr(shared.__dlpack__(max_version=version))
    assert leaked(lambda: shared.__dlpack__(max_version=version)) < USES


@pytest.mark.parametrize("take", [np.from_dlpack, by_torch])
def test_a_capsule_that_was_read_is_given_back_by_its_reader(
    take: Any, driver: FakeDriver, values: Any
) -> None:
    shared = array(driver, values)
    taken = [take(shared) for _ in range(3)]
    gc.collect()
    assert all(np.array_equal(np.asarray(one), values) for one in taken)
    assert leaked(lambda: take(shared)) < USES


def test_a_reader_that_outlives_the_interpreter() -> None:
    """Torch deletes after the end of Python; a deleter written in Python would end in a crash."""
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVING],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert (done.returncode, done.stdout) == (0, "made\n"), done.stderr


def test_the_array_interface(driver: FakeDriver, values: Any) -> None:
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


def test_what_dlpack_may_not_ask(driver: FakeDriver, values: Any) -> None:
    shared = array(driver, values)
    assert shared.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match="never copied"):
        shared.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"not on \(2, 1\)"):
        shared.__dlpack__(dl_device=(2, 1))
    with pytest.raises(BufferError, match="Stream 0"):
        shared.__dlpack__(stream=0)


class Waits(FakeDriver):
    """Notes who waits for what."""

    def wait(self, stream: FakeStream | int, event: FakeEvent) -> None:
        self.calls.append(f"{int(stream)} waits")
        super().wait(stream, event)


@pytest.mark.parametrize(
    ("stream", "calls"),
    [(None, ["1 waits"]), (1, ["1 waits"]), (2, ["2 waits"]), (77, ["77 waits"]), (-1, [])],
)
def test_the_consumers_stream_waits_for_the_frame(stream: int | None, calls: list[str], values: Any) -> None:
    driver = Waits()
    shared = array(driver, values)
    driver.calls.clear()
    shared.__dlpack__(stream=stream)
    assert driver.calls == calls


def test_the_next_frame_waits_for_who_said_so(load: Load) -> None:
    talker: Any = load(Toy(), download=False)
    driver: Any = talker.choice.backend.driver
    seen = []
    with talker.batch() as batch:
        stream = batch.open()
        stream.push(speech(8000))
        batch.step()
        shared = stream.device_vertices
        first = shared.on_host()
        consumer: Any = driver.stream()
        # A consumer that is late: the copy of the first frame runs when the second one lets it.
        consumer.put(lambda: seen.append(np.from_dlpack(Still(driver, shared)).copy()))
        shared.release_on(consumer)
        batch.step()
        assert not np.array_equal(shared.on_host(), first)
    assert np.array_equal(seen[0], first)


class Still:
    """The memory as it is, without a wait."""

    def __init__(self, driver: Driver, shared: DeviceArray) -> None:
        self.driver, self.shared = driver, shared

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.shared.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.shared.__dlpack__(**{**options, "stream": -1})


def test_a_batch_that_downloads_nothing(load: Load) -> None:
    toy = Toy(batch=SLOTS)
    gpu: Any = load(toy, download=False)
    cpu = load(toy, "onnxruntime-cpu")
    assert gpu.blendshape_names == ()
    calls = gpu.choice.backend.driver.calls
    with gpu.batch() as resident, cpu.batch() as host:
        for batch in (resident, host):
            for slot in range(SLOTS):
                batch.open(slot, seed=slot).push(speech(8000 + 1000 * slot))
        calls.clear()
        while made := host.step():
            got = {stream.slot: frame for stream, frame in resident.step()}
            assert got.keys() == {stream.slot for stream, _ in made}
            # Nobody waited: the consumer does.
            every = np.from_dlpack(resident.device_vertices)
            for stream, frame in made:
                mine = resident.streams[stream.slot].device_vertices
                assert mine is resident.streams[stream.slot].device_vertices
                assert np.array_equal(np.from_dlpack(mine), frame.vertices)
                assert np.array_equal(every[stream.slot], frame.vertices)
                assert got[stream.slot].vertices.shape == (0, 3)
                assert got[stream.slot].blendshapes is None
        assert "download" not in calls


def test_a_lane_has_them_too(load: Load) -> None:
    talker: Any = load(Toy())
    identity = talker.identity
    lane = talker.choice.backend.lane(identity.styles[0], identity.templates[0], identity.start_latent)
    lane.pcm[:] = 0.5
    lane.encode()
    lane.frame(0)
    assert device_vertices(lane).shape == (4, 3)
    assert np.array_equal(np.from_dlpack(device_vertices(lane)), lane.vertices())
    lane.close()


def test_on_the_cpu_it_is_a_sentence(load: Load) -> None:
    with pytest.raises(BackendError, match="download=False needs a GPU backend"):
        load(Toy(), "onnxruntime-cpu", download=False)
    with load(Toy(), "onnxruntime-cpu").batch() as batch:
        stream = batch.open()
        for voices in (batch, stream):
            with pytest.raises(BackendError, match=r"only where a GPU makes them.*tensorrt_rtx"):
                _ = voices.device_vertices


@pytest.mark.parametrize("download", [True, False])
def test_a_stream_has_them_too(download: bool, load: Load) -> None:
    gpu, cpu = load(Toy(), download=download), load(Toy(), "onnxruntime-cpu")
    with gpu.open() as stream, cpu.open() as host:
        for mine, theirs in zip(stream.push(speech(8000)), host.push(speech(8000)), strict=True):
            assert np.array_equal(np.from_dlpack(stream.device_vertices), theirs.vertices)
            assert mine.vertices.shape == ((4, 3) if download else (0, 3))
        with pytest.raises(BackendError, match="only where a GPU makes them"):
            _ = host.device_vertices
