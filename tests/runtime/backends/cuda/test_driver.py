"""The driver on cuda-bindings, as far as it can be tried without a GPU: a missing part is a sentence."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from streamtalk import BackendError, MissingDependencyError
from streamtalk.backends.cuda.driver import Driver, driver_build, open_driver
from tests.runtime.backends.cuda.fake import BLOCKING_SYNC, DISABLE_TIMING, PRIMARY, FakeCuda

OTHER = 22
"""A context of somebody's own."""


def driver(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Driver:
    cuda.install(monkeypatch)
    return open_driver()


def names(cuda: FakeCuda) -> list[str]:
    return [name for name, *_ in cuda.calls]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'streamtalk\[cuda\]'"):
        open_driver()


@pytest.mark.parametrize(
    ("cuda", "sentence"),
    [
        (FakeCuda(failures={"cudaGetDeviceCount": 35}), "No NVIDIA driver"),
        (FakeCuda(failures={"cudaGetDeviceCount": 100}), "no NVIDIA GPU"),
        (FakeCuda(count=0), "no NVIDIA GPU"),
        (FakeCuda(failures={"cudaGetDeviceCount": 3}), "CUDA does not start: error 3 of the runtime"),
        (FakeCuda(failures={"cudaGetDevice": 4}), "cudaGetDevice failed: error 4 of the runtime"),
        (FakeCuda(failures={"cuCtxGetCurrent": 4}), "cuCtxGetCurrent failed: error 4 of the driver"),
    ],
)
def test_without_a_gpu(cuda: FakeCuda, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=sentence):
        driver(monkeypatch, cuda)


def test_bindings_that_raise_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    cuda = FakeCuda()
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", raises)
    with pytest.raises(BackendError, match=r"No NVIDIA driver.*libcuda\.so\.1"):
        driver(monkeypatch, cuda)


@pytest.mark.usefixtures("cuda")
def test_a_device_describes_itself() -> None:
    gpu = open_driver()
    assert gpu.compute_capability == 87
    assert gpu.description == "NVIDIA Thing, driver for CUDA 12.6"
    assert (gpu.device, gpu.dlpack_device) == (0, (2, 0))


def test_the_build_of_the_kernel_driver(tmp_path: Any) -> None:
    file = tmp_path / "version"
    assert driver_build(file) == ""
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24\nGCC version: 12")
    assert driver_build(file) == "570.86.15"


def test_an_error_has_cudas_message_and_is_forgotten(cuda: FakeCuda) -> None:
    """CUDA keeps it until it is asked, and the next library to ask would take it for its own."""
    gpu = open_driver()
    cuda.failures["cudaMalloc"] = 2
    with pytest.raises(BackendError, match="cudaMalloc failed: error 2 of the runtime"):
        gpu.device_memory(1)
    assert cuda.last_error == 0


def test_a_capture_is_brought_to_the_device(cuda: FakeCuda) -> None:
    gpu = open_driver()
    stream = gpu.stream()
    cuda.calls.clear()
    graph = gpu.capture(stream, lambda: cuda.put(stream, lambda: None))
    assert graph.ready
    assert cuda.handles == [stream, graph]
    gpu.launch(graph, stream)
    assert len(stream.queue) == 1


@pytest.mark.parametrize("function", ["cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphUpload"])
def test_a_capture_that_fails_leaves_nothing(function: str, cuda: FakeCuda) -> None:
    gpu = open_driver()
    stream = gpu.stream()
    cuda.failures[function] = 901
    with pytest.raises(BackendError, match=f"{function} failed"):
        gpu.capture(stream, lambda: None)
    assert (stream.capturing, cuda.last_error, cuda.handles) == (None, 0, [stream])


@pytest.mark.parametrize("spoilt", [False, True])
def test_work_that_fails_ends_its_capture(spoilt: bool, cuda: FakeCuda) -> None:
    gpu = open_driver()
    stream = gpu.stream()

    def fails() -> None:
        cuda.failures.update({"cudaStreamEndCapture": 901} if spoilt else {})
        raise BackendError("no tactic")

    with pytest.raises(BackendError, match="no tactic"):
        gpu.capture(stream, fails)
    assert (stream.capturing, cuda.last_error, cuda.handles) == (None, 0, [stream])


def test_abandoning_where_no_capture_is_open(cuda: FakeCuda) -> None:
    gpu = open_driver()
    gpu.abandon(gpu.stream())
    assert cuda.last_error == 0


def test_pinned_memory_lives_as_long_as_somebody_sees_it(cuda: FakeCuda) -> None:
    gpu = open_driver()
    memory = gpu.pinned_memory(64)
    (block,) = cuda.pinned.values()
    frame = memory[8:24].view(np.float32).reshape(2, 2)
    del memory
    gc.collect()
    assert cuda.pinned
    frame[:] = 1.5
    assert block[8:24].view(np.float32).tolist() == [1.5] * 4
    del frame
    gc.collect()
    assert not cuda.pinned


def test_without_a_context_it_is_the_primary_one(cuda: FakeCuda) -> None:
    gpu = open_driver()
    assert gpu.primary
    assert cuda.stack == [PRIMARY]
    assert (
        names(cuda).count("cuDevicePrimaryCtxRetain") == names(cuda).count("cuDevicePrimaryCtxRelease") == 1
    )
    with gpu.current():
        assert cuda.stack == [PRIMARY]


def test_a_context_that_is_there_is_used_and_no_other_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(stack=(OTHER,))
    assert not driver(monkeypatch, cuda).primary
    assert not cuda.active
    assert cuda.stack == [OTHER]
    assert driver(monkeypatch, FakeCuda(stack=(PRIMARY,))).primary


@pytest.mark.parametrize("elsewhere", [(), (PRIMARY,), (OTHER, PRIMARY)])
def test_another_thread_gets_the_context_for_as_long_as_it_takes(
    elsewhere: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(stack=(OTHER,))
    gpu = driver(monkeypatch, cuda)
    cuda.stack = list(elsewhere)
    with gpu.current():
        assert cuda.stack[-1] == OTHER
        with gpu.current():
            assert len(cuda.stack) == len(elsewhere) + 1
    with pytest.raises(BackendError, match="no tactic"), gpu.current():
        raise BackendError("no tactic")
    assert cuda.stack == list(elsewhere)


def test_captures_of_others_do_not_concern_a_thread_that_works_here(cuda: FakeCuda) -> None:
    gpu = open_driver()

    def work() -> None:
        for _ in range(3):
            with gpu.current():
                pass

    for threads in (1, 2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert names(cuda).count("cuThreadExchangeStreamCaptureMode") == threads


def test_waiting_sleeps(cuda: FakeCuda) -> None:
    """All waits are for events made with blocking synchronisation, the wait for a whole stream too."""
    gpu = open_driver()
    stream = gpu.stream()
    cuda.calls.clear()
    gpu.drain(stream)
    (_, flags), (_, event, on), (_, waited), (_, destroyed) = cuda.calls
    assert names(cuda) == [
        "cudaEventCreateWithFlags",
        "cudaEventRecord",
        "cudaEventSynchronize",
        "cudaEventDestroy",
    ]
    assert flags == BLOCKING_SYNC | DISABLE_TIMING
    assert on is stream
    assert event is waited is destroyed


@pytest.mark.usefixtures("cuda")
def test_copies_are_checked_by_the_fake() -> None:
    """A kind that does not go with its addresses is refused, as CUDA refuses it."""
    gpu = open_driver()
    stream, block = gpu.stream(), gpu.pinned_memory(64)
    address = gpu.device_memory(64)
    gpu.upload(address, block, stream)
    gpu.download(block, address, stream)
    gpu.drain(stream)
    refused: list[Callable[[], None]] = [
        lambda: gpu.upload(block.ctypes.data, block, stream),
        lambda: gpu.download(block, block.ctypes.data, stream),
        lambda: gpu.upload(address + 1, block, stream),
        lambda: gpu.clear(address, 65, stream),
    ]
    for call in refused:
        with pytest.raises(BackendError, match="failed: error 1"):
            call()
