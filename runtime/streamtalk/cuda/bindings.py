"""The driver protocol on NVIDIA's cuda-bindings.

Chosen over PyCUDA because it wraps CUDA graphs, comes as wheels for every platform, and lets go of the GIL in calls.
The runtime API is used, which works in the calling thread's current context; the driver API only to find that
context and to make it current in other threads. Waits are for events with blocking synchronisation: the thread
sleeps whatever the context's own scheduling flags, which belong to the process and are left alone.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np

from streamtalk.cuda.driver import Bytes, Handle, driver_build
from streamtalk.errors import BackendError, MissingDependencyError

OUT_OF_DATE = 35
NO_DEVICE = 100
DLPACK_CUDA = 2
NOTHING = nullcontext()


class CudaDriver:
    """See `driver.Driver`."""

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
            self._api: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise MissingDependencyError(
                f"CUDA backends need the package cuda-bindings: pip install 'streamtalk[cuda]'. ({error})"
            ) from error
        cuda = self._cuda
        self._thread = threading.local()
        self._require_gpu()
        self._context = self._call(self._api.cuCtxGetCurrent)
        device = self._call(cuda.cudaGetDevice)
        if not int(self._context):
            # The thread has none: this makes the primary one current, as any call of the runtime API would.
            self._call(cuda.cudaSetDevice, device)
            self._call(cuda.cudaFree, 0)
            self._context = self._call(self._api.cuCtxGetCurrent)
        self.device = int(device)
        self.build = driver_build()
        self.dlpack_device = (DLPACK_CUDA, self.device)
        self.primary = self._is_primary()
        attribute = cuda.cudaDeviceAttr
        major = self._call(cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMajor, device)
        minor = self._call(cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMinor, device)
        self.compute_capability = 10 * int(major) + int(minor)
        version = int(self._call(cuda.cudaDriverGetVersion))
        name = self._call(cuda.cudaGetDeviceProperties, device).name
        text = name.decode() if isinstance(name, bytes) else str(name)
        text = text.rstrip("\0")
        self.description = f"{text}, driver for CUDA {version // 1000}.{version % 1000 // 10}"

    def current(self) -> AbstractContextManager[None]:
        if not getattr(self._thread, "told", False):
            # By default a capture in another thread, such as onnxruntime's or torch's, forbids this one to wait or
            # to allocate.
            # The driver's call: the runtime's might make the primary context this thread's, which nobody asked for.
            mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            self._call(self._api.cuThreadExchangeStreamCaptureMode, mode)
            self._thread.told = True
        if int(self._call(self._api.cuCtxGetCurrent)) == int(self._context):
            return NOTHING
        return self._pushed()

    @contextmanager
    def _pushed(self) -> Iterator[None]:
        self._call(self._api.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            self._call(self._api.cuCtxPopCurrent)

    def device_memory(self, size: int) -> int:
        return int(self._call(self._cuda.cudaMalloc, size))

    def pinned_memory(self, size: int) -> Bytes:
        address = int(self._call(self._cuda.cudaHostAlloc, size, self._cuda.cudaHostAllocDefault))
        block = (ctypes.c_uint8 * size).from_address(address)
        # Every view of the array keeps `block`: a frame that is read after `close` is old, and not unmapped.
        weakref.finalize(block, self._free_pinned, address)
        return np.ctypeslib.as_array(block)

    def _free_pinned(self, address: int) -> None:
        with suppress(BackendError), self.current():  # at the end of a process CUDA may be gone already
            self._call(self._cuda.cudaFreeHost, address)

    def release(self, device: list[int]) -> None:
        for address in device:
            self._call(self._cuda.cudaFree, address)

    def stream(self) -> Handle:
        return self._call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)

    def event(self) -> Handle:
        flags = int(self._cuda.cudaEventBlockingSync) | int(self._cuda.cudaEventDisableTiming)
        return self._call(self._cuda.cudaEventCreateWithFlags, flags)

    def upload(self, target: int, source: Bytes, stream: Handle) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, target, source.ctypes.data, source.nbytes, kind, stream)

    def download(self, target: Bytes, source: int, stream: Handle) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, target.ctypes.data, source, target.nbytes, kind, stream)

    def copy(self, target: int, source: int, size: int, stream: Handle) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(self._cuda.cudaMemcpyAsync, target, source, size, kind, stream)

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: Handle,
    ) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(
            self._cuda.cudaMemcpy2DAsync,
            target,
            target_pitch,
            source,
            source_pitch,
            width,
            rows,
            kind,
            stream,
        )

    def clear(self, target: int, size: int, stream: Handle) -> None:
        self._call(self._cuda.cudaMemsetAsync, target, 0, size, stream)

    def record(self, event: Handle, stream: Handle) -> None:
        self._call(self._cuda.cudaEventRecord, event, stream)

    def wait(self, stream: Handle, event: Handle) -> None:
        self._call(self._cuda.cudaStreamWaitEvent, stream, event, 0)

    def synchronize(self, event: Handle) -> None:
        self._call(self._cuda.cudaEventSynchronize, event)

    def drain(self, stream: Handle) -> None:
        # Synchronising with the stream itself would spin, by the context's default.
        event = self.event()
        try:
            self.record(event, stream)
            self.synchronize(event)
        finally:
            self.discard([event])

    def capture(self, stream: Handle, enqueue: Callable[[], None]) -> Handle:
        cuda = self._cuda
        # Thread-local: other threads may allocate meanwhile.
        self._call(
            cuda.cudaStreamBeginCapture, stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        try:
            enqueue()
        except BaseException:
            self.abandon(stream)
            raise
        graph = self._call(cuda.cudaStreamEndCapture, stream)
        try:
            ready = self._call(cuda.cudaGraphInstantiate, graph, 0)
        finally:
            self._call(cuda.cudaGraphDestroy, graph)
        try:
            # Else its first launch would, in the middle of a stream.
            self._call(cuda.cudaGraphUpload, ready, stream)
            self.drain(stream)
        except BaseException:
            cuda.cudaGraphExecDestroy(ready)
            raise
        return ready

    def abandon(self, stream: Handle) -> None:
        cuda = self._cuda
        error, graph = cuda.cudaStreamEndCapture(stream)
        if not int(error):
            cuda.cudaGraphDestroy(graph)
        cuda.cudaGetLastError()  # which also forgets it

    def launch(self, graph: Handle, stream: Handle) -> None:
        self._call(self._cuda.cudaGraphLaunch, graph, stream)

    def discard(self, handles: list[Handle]) -> None:
        cuda = self._cuda
        for handle in handles:
            if isinstance(handle, cuda.cudaGraphExec_t):
                self._call(cuda.cudaGraphExecDestroy, handle)
            elif isinstance(handle, cuda.cudaEvent_t):
                self._call(cuda.cudaEventDestroy, handle)
            else:
                self._call(cuda.cudaStreamDestroy, handle)

    def _require_gpu(self) -> None:
        no_driver = (
            "No NVIDIA driver that this cuda-bindings can use: install one (`nvidia-smi` shows it), or the "
            "cuda-bindings of the driver's CUDA version (12.8 on JetPack 6)."
        )
        try:
            error, count = self._cuda.cudaGetDeviceCount()
        except RuntimeError as words:  # cuda-bindings 12.8 without a driver; later ones return a code
            raise BackendError(f"{no_driver} ({words})") from words
        if int(error) == OUT_OF_DATE:
            raise BackendError(no_driver)
        if int(error) == NO_DEVICE or (int(error) == 0 and not count):
            raise BackendError("This machine has no NVIDIA GPU that CUDA can see.")
        if int(error):
            raise BackendError(f"CUDA does not start: {self._words(error)}.")

    def _is_primary(self) -> bool:
        """Whether the context is its device's primary one; asking makes none."""
        api = self._api
        device = self._call(api.cuDeviceGet, self.device)
        error, _, active = api.cuDevicePrimaryCtxGetState(device)
        if int(error) or not active:
            return False
        primary = self._call(api.cuDevicePrimaryCtxRetain, device)
        self._call(api.cuDevicePrimaryCtxRelease, device)
        return int(primary) == int(self._context)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call CUDA; returns its one result, or None. Raises BackendError."""
        error, *results = function(*arguments)
        if int(error):
            raise BackendError(f"{getattr(function, '__name__', 'CUDA')} failed: {self._words(error)}.")
        return results[0] if results else None

    def _words(self, error: Any) -> str:
        if isinstance(error, self._api.CUresult):
            _, text = self._api.cuGetErrorString(error)
        else:
            _, text = self._cuda.cudaGetErrorString(error)
        return text.decode() if isinstance(text, bytes) else str(text)
