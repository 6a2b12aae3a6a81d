"""The driver on cuda-bindings, as far as it can be tried without a GPU: what is missing is a sentence."""

from __future__ import annotations

import gc
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streamtalk import BackendError, MissingDependencyError
from streamtalk.cuda.bindings import CudaDriver
from streamtalk.cuda.driver import open_driver

PRIMARY, OTHER = 11, 22
"""Contexts."""


class Stub(ModuleType):
    """`cuda.bindings.runtime` with one device and scripted errors; records its calls. `stack` are the contexts of the
    calling thread, the current one last; `driver` is `cuda.bindings.driver` of the same machine.
    """

    def __init__(
        self, count: int = 1, errors: dict[str, int] | None = None, stack: tuple[int, ...] = ()
    ) -> None:
        super().__init__("cuda.bindings.runtime")
        self.stack = list(stack)
        self.active = PRIMARY in stack
        self.cudaDeviceAttr = SimpleNamespace(
            cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=6
        )
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        self.contexts_when_told: list[list[int]] = []
        self.cudaStreamNonBlocking, self.cudaEventBlockingSync, self.cudaEventDisableTiming = 1, 1, 2
        self.cudaGraphExec_t, self.cudaEvent_t = str, float
        self.cudaHostAllocDefault, self.host = 0, np.zeros(64, np.uint8)
        self.called: list[str] = []
        self.told: list[Any] = []
        results = {
            "cudaGetDeviceCount": count,
            "cudaGetDevice": 0,
            "cudaDriverGetVersion": 12060,
            "cudaGetDeviceProperties": SimpleNamespace(name=b"NVIDIA Thing\0\0"),
            "cudaMalloc": 4096,
            "cudaHostAlloc": self.host.ctypes.data,
            "cudaStreamCreateWithFlags": 7,
            "cudaEventCreateWithFlags": 0.5,
            "cudaStreamEndCapture": 9,
            "cudaGraphInstantiate": "graph",
        }
        nothing = (
            "cudaStreamBeginCapture cudaGraphDestroy cudaGraphUpload "
            "cudaGraphExecDestroy cudaEventRecord cudaEventSynchronize cudaEventDestroy cudaStreamDestroy cudaFreeHost "
            "cudaGetLastError"
        )
        for name in (*results, *nothing.split()):
            setattr(self, name, self._function(name, results.get(name), (errors or {}).get(name, 0)))
        self.driver: Any = SimpleNamespace(
            CUresult=bool, CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        )
        for function in (
            self.cuThreadExchangeStreamCaptureMode,
            self.cuCtxGetCurrent,
            self.cuCtxPushCurrent,
            self.cuCtxPopCurrent,
            self.cuDeviceGet,
            self.cuDevicePrimaryCtxGetState,
            self.cuDevicePrimaryCtxRetain,
            self.cuDevicePrimaryCtxRelease,
        ):
            setattr(self.driver, function.__name__, function)

    def _function(self, name: str, result: Any, error: int) -> Any:
        def call(*arguments: Any) -> Any:
            self.called.append(name)
            self.told.append((name, *arguments))
            return (error, result)

        call.__name__ = name
        return call

    def cudaDeviceGetAttribute(self, which: int, _: int) -> tuple[int, int]:  # noqa: N802
        return 0, which

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, f"error {error} in CUDA's words".encode()

    def cudaSetDevice(self, device: int) -> tuple[int]:  # noqa: N802
        assert device == 0
        return (0,)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        assert address == 0
        # Any call of the runtime API without a context makes the primary one current.
        self.active = True
        self.stack[-1:] = [self.stack[-1] if self.stack else PRIMARY]
        return (0,)

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[int, int]:  # noqa: N802
        assert mode == 1
        self.contexts_when_told.append(list(self.stack))
        return 0, 0

    def cuCtxGetCurrent(self) -> tuple[int, int]:  # noqa: N802
        return 0, self.stack[-1] if self.stack else 0

    def cuCtxPushCurrent(self, context: int) -> tuple[int]:  # noqa: N802
        self.stack.append(context)
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, int]:  # noqa: N802
        return 0, self.stack.pop()

    def cuDeviceGet(self, number: int) -> tuple[int, int]:  # noqa: N802
        return 0, number

    def cuDevicePrimaryCtxGetState(self, _: int) -> tuple[int, int, bool]:  # noqa: N802
        return 0, 0, self.active

    def cuDevicePrimaryCtxRetain(self, _: int) -> tuple[int, int]:  # noqa: N802
        assert self.active, "a context was made"
        self.called.append("retain")
        return 0, PRIMARY

    def cuDevicePrimaryCtxRelease(self, _: int) -> tuple[int]:  # noqa: N802
        self.called.append("release")
        return (0,)


def driver(monkeypatch: pytest.MonkeyPatch, stub: Stub) -> CudaDriver:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", stub)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", stub.driver)
    return CudaDriver()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'streamtalk\[cuda\]'"):
        open_driver()


@pytest.mark.parametrize(
    ("stub", "sentence"),
    [
        (Stub(errors={"cudaGetDeviceCount": 35}), "No NVIDIA driver"),
        (Stub(errors={"cudaGetDeviceCount": 100}), "no NVIDIA GPU"),
        (Stub(count=0), "no NVIDIA GPU"),
        (Stub(errors={"cudaGetDeviceCount": 3}), "CUDA does not start: error 3 in CUDA's words"),
        (Stub(errors={"cudaGetDevice": 4}), "cudaGetDevice failed: error 4"),
    ],
)
def test_without_a_gpu(stub: Stub, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=sentence):
        driver(monkeypatch, stub)


def test_a_device_describes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = driver(monkeypatch, Stub())
    assert gpu.compute_capability == 86
    assert gpu.description == "NVIDIA Thing, driver for CUDA 12.6"


def test_errors_carry_cudas_words(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = driver(monkeypatch, Stub(errors={"cudaMalloc": 2}))
    with pytest.raises(BackendError, match="cudaMalloc failed: error 2 in CUDA's words"):
        gpu.device_memory(1)


def test_a_capture_that_fails_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub()
    gpu = driver(monkeypatch, stub)
    assert gpu.capture(gpu.stream(), lambda: None) == "graph"
    made = stub.called[stub.called.index("cudaGraphInstantiate") :]
    # Brought to the device now, and waited for: its first launch is like any other.
    assert made[:3] == ["cudaGraphInstantiate", "cudaGraphDestroy", "cudaGraphUpload"]
    assert "cudaEventSynchronize" in made

    def fails() -> None:
        raise BackendError("no tactic")

    with pytest.raises(BackendError, match="no tactic"):
        gpu.capture(gpu.stream(), fails)
    assert stub.called[-3:] == ["cudaStreamEndCapture", "cudaGraphDestroy", "cudaGetLastError"]


def test_a_capture_that_another_left_open_is_ended_and_its_error_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub = Stub(errors={"cudaStreamEndCapture": 901})
    gpu = driver(monkeypatch, stub)
    gpu.abandon(gpu.stream())
    assert stub.called[-2:] == ["cudaStreamEndCapture", "cudaGetLastError"]


def test_a_graph_that_does_not_reach_the_device_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(errors={"cudaGraphUpload": 2})
    gpu = driver(monkeypatch, stub)
    with pytest.raises(BackendError, match="cudaGraphUpload failed"):
        gpu.capture(gpu.stream(), lambda: None)
    assert stub.told[-1] == ("cudaGraphExecDestroy", "graph")


def test_pinned_memory_lives_as_long_as_somebody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub()
    gpu = driver(monkeypatch, stub)
    memory = gpu.pinned_memory(64)
    frame = memory[8:24].view(np.float32).reshape(2, 2)
    del memory
    gc.collect()
    assert "cudaFreeHost" not in stub.called
    frame[:] = 1.5
    assert stub.host[8:24].view(np.float32).tolist() == [1.5] * 4
    del frame
    gc.collect()
    assert stub.told[-1] == ("cudaFreeHost", stub.host.ctypes.data)


def test_bindings_that_raise_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    stub = Stub()
    monkeypatch.setattr(stub, "cudaGetDeviceCount", raises)
    with pytest.raises(BackendError, match=r"No NVIDIA driver.*libcuda\.so\.1"):
        driver(monkeypatch, stub)


def test_without_a_context_it_is_the_primary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub()
    gpu = driver(monkeypatch, stub)
    assert gpu.primary
    assert stub.stack == [PRIMARY]
    assert stub.called.count("retain") == stub.called.count("release") == 1
    with gpu.current():
        assert stub.stack == [PRIMARY]


def test_a_context_that_is_there_is_used_and_no_other_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(stack=(OTHER,))
    gpu = driver(monkeypatch, stub)
    assert not gpu.primary
    assert not stub.active
    assert stub.stack == [OTHER]
    assert driver(monkeypatch, Stub(stack=(PRIMARY,))).primary


@pytest.mark.parametrize("elsewhere", [(), (PRIMARY,), (OTHER, PRIMARY)])
def test_another_thread_gets_the_context_for_as_long_as_it_takes(
    elsewhere: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub(stack=(OTHER,))
    gpu = driver(monkeypatch, stub)
    stub.stack = list(elsewhere)
    with gpu.current():
        assert stub.stack[-1] == OTHER
        with gpu.current():
            assert len(stub.stack) == len(elsewhere) + 1
    with pytest.raises(BackendError, match="no tactic"), gpu.current():
        raise BackendError("no tactic")
    assert stub.stack == list(elsewhere)


def test_captures_of_others_do_not_concern_a_thread_that_works_here(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub()
    gpu = driver(monkeypatch, stub)

    def work() -> None:
        for _ in range(3):
            with gpu.current():
                pass

    for threads in (1, 2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(stub.contexts_when_told) == threads


def test_waiting_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """All waits are for events made with blocking synchronisation, the wait for a whole stream too."""
    stub = Stub()
    gpu = driver(monkeypatch, stub)
    stub.told.clear()
    gpu.drain(7)
    assert stub.told == [
        ("cudaEventCreateWithFlags", stub.cudaEventBlockingSync | stub.cudaEventDisableTiming),
        ("cudaEventRecord", 0.5, 7),
        ("cudaEventSynchronize", 0.5),
        ("cudaEventDestroy", 0.5),
    ]
