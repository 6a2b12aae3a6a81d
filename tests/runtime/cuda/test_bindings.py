"""The driver on cuda-bindings, as far as it can be tried without a GPU: what is missing is a sentence."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from streamtalk import BackendError, MissingDependencyError
from streamtalk.cuda.bindings import CudaDriver
from streamtalk.cuda.driver import open_driver


class Stub(ModuleType):
    """`cuda.bindings.runtime` with one device and scripted errors; records its calls."""

    def __init__(self, count: int = 1, errors: dict[str, int] | None = None) -> None:
        super().__init__("cuda.bindings.runtime")
        self.cudaDeviceAttr = SimpleNamespace(
            cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=6
        )
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        self.cudaStreamNonBlocking, self.cudaEventBlockingSync, self.cudaEventDisableTiming = 1, 1, 2
        self.cudaGraphExec_t, self.cudaEvent_t = str, float
        self.called: list[str] = []
        results = {
            "cudaGetDeviceCount": count,
            "cudaGetDevice": 0,
            "cudaDriverGetVersion": 12060,
            "cudaGetDeviceProperties": SimpleNamespace(name=b"NVIDIA Thing\0\0"),
            "cudaMalloc": 4096,
            "cudaStreamCreateWithFlags": 7,
            "cudaStreamEndCapture": 9,
            "cudaGraphInstantiate": "graph",
        }
        for name in (*results, *"cudaStreamBeginCapture cudaGraphDestroy cudaFree".split()):
            setattr(self, name, self._function(name, results.get(name), (errors or {}).get(name, 0)))

    def _function(self, name: str, result: Any, error: int) -> Any:
        def call(*_: Any) -> Any:
            self.called.append(name)
            return (error, result)

        call.__name__ = name
        return call

    def cudaDeviceGetAttribute(self, which: int, _: int) -> tuple[int, int]:  # noqa: N802
        return 0, which

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, f"error {error} in CUDA's words".encode()


def driver(monkeypatch: pytest.MonkeyPatch, stub: Stub) -> CudaDriver:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", stub)
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
    assert stub.called[-2:] == ["cudaGraphInstantiate", "cudaGraphDestroy"]

    def fails() -> None:
        raise BackendError("no tactic")

    with pytest.raises(BackendError, match="no tactic"):
        gpu.capture(gpu.stream(), fails)
    assert stub.called[-1] == "cudaStreamEndCapture"
