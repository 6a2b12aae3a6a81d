"""The CUDA calls that the runtime makes, through NVIDIA's cuda-bindings.

cuda-bindings wraps CUDA graphs, comes as wheels for every platform, and releases the GIL in its calls; PyCUDA does not.
The runtime API is used, which works in the calling thread's current context. The driver API only finds that context
and makes it current in other threads. All waits are for events with blocking synchronisation: the thread sleeps
whatever the context's own scheduling flags are. Those belong to the process and stay as they are.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.errors import BackendError, MissingDependencyError

Bytes = npt.NDArray[np.uint8]
Handle = Any
"""A stream, an event or an instantiated graph."""

BUILD = re.compile(r"\b\d{3,}\.[\d.]+\b")
OUT_OF_DATE = 35
NO_DEVICE = 100
DLPACK_CUDA = 2
NOTHING = nullcontext()


def open_driver() -> Driver:
    """CUDA in the context that is current to the calling thread, such as PyCUDA's, or else in the primary one of the
    thread's device. No context is made where there is one.

    Raises MissingDependencyError without the package, BackendError without a driver or a GPU.
    """
    return Driver()


def driver_build(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of NVIDIA's kernel driver, or "" without one and where the system does not tell (Windows, WSL)."""
    try:
        found = BUILD.search(version.read_text(errors="replace"))
    except OSError:
        return ""
    return found[0] if found else ""


class Driver:
    """One context on one GPU. Every call may raise BackendError with CUDA's own message.

    Copies are asynchronous on a stream. Calls are made where the context is current: see `current`.
    """

    description: str
    """The device, for people, such as `NVIDIA GeForce RTX 4090, driver for CUDA 12.6`."""
    build: str
    """Version of the kernel driver, such as `570.86.15`, or ""."""
    compute_capability: int
    """86 for 8.6."""
    device: int
    """Number of the GPU in this process."""
    primary: bool
    """Whether the context is the GPU's primary one, which all users of the runtime API share."""
    dlpack_device: tuple[int, int]
    """The device as DLPack names it: kind and number."""

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
            self._api: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise MissingDependencyError(
                f"CUDA backends need the package cuda-bindings: pip install 'streamtalk[cuda]'. ({error})"
            ) from error
        self._thread = threading.local()
        self._require_gpu()
        device = self._call(self._cuda.cudaGetDevice)
        self._context = self._call(self._api.cuCtxGetCurrent)
        if not int(self._context):
            # The thread has none: this makes the primary one current, as any call of the runtime API would.
            self._call(self._cuda.cudaSetDevice, device)
            self._call(self._cuda.cudaFree, 0)
            self._context = self._call(self._api.cuCtxGetCurrent)
        self.device = int(device)
        self.build = driver_build()
        self.dlpack_device = (DLPACK_CUDA, self.device)
        self.primary = self._is_primary()
        self.compute_capability = self._compute_capability()
        self.description = self._describe()

    def current(self) -> AbstractContextManager[None]:
        """Make the context the calling thread's, where it is not, and undo that at the end. Cheap; may be nested."""
        if not getattr(self._thread, "prepared", False):
            # By default a capture in another thread, such as onnxruntime's or torch's, forbids this one to wait or
            # to allocate.
            # The driver's call: the runtime's might make the primary context this thread's, which nobody asked for.
            mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            self._call(self._api.cuThreadExchangeStreamCaptureMode, mode)
            self._thread.prepared = True
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
        """Address of `size` bytes on the device, aligned to 256."""
        return int(self._call(self._cuda.cudaMalloc, size))

    def free(self, address: int) -> None:
        """Give device memory back. Nothing that uses it may be in flight."""
        self._call(self._cuda.cudaFree, address)

    def pinned_memory(self, size: int) -> Bytes:
        """`size` bytes of page-locked host memory, which go back when the last view of them is gone."""
        address = int(self._call(self._cuda.cudaHostAlloc, size, self._cuda.cudaHostAllocDefault))
        block = (ctypes.c_uint8 * size).from_address(address)
        # Every view of the array keeps `block`: a frame that is read after `close` is old, and not unmapped.
        weakref.finalize(block, self._free_pinned, address)
        return np.ctypeslib.as_array(block)

    def _free_pinned(self, address: int) -> None:
        with suppress(BackendError), self.current():  # at the end of a process CUDA may be gone already
            self._call(self._cuda.cudaFreeHost, address)

    def stream(self) -> Handle:
        """A stream that does not wait for the default one."""
        return self._call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)

    def event(self) -> Handle:
        """An event; a thread that waits for it sleeps rather than spins."""
        flags = int(self._cuda.cudaEventBlockingSync) | int(self._cuda.cudaEventDisableTiming)
        return self._call(self._cuda.cudaEventCreateWithFlags, flags)

    def discard(self, handle: Handle) -> None:
        """Destroy a stream, an event or a graph that this driver made."""
        cuda = self._cuda
        if isinstance(handle, cuda.cudaGraphExec_t):
            self._call(cuda.cudaGraphExecDestroy, handle)
        elif isinstance(handle, cuda.cudaEvent_t):
            self._call(cuda.cudaEventDestroy, handle)
        else:
            self._call(cuda.cudaStreamDestroy, handle)

    def upload(self, target: int, source: Bytes, stream: Handle) -> None:
        """Copy host to device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, target, source.ctypes.data, source.nbytes, kind, stream)

    def download(self, target: Bytes, source: int, stream: Handle) -> None:
        """Copy device to host, `len(target)` bytes."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, target.ctypes.data, source, target.nbytes, kind, stream)

    def clear(self, target: int, size: int, stream: Handle) -> None:
        """Set bytes on the device to zero."""
        self._call(self._cuda.cudaMemsetAsync, target, 0, size, stream)

    def record(self, event: Handle, stream: Handle) -> None:
        """Mark this point of the stream."""
        self._call(self._cuda.cudaEventRecord, event, stream)

    def wait(self, stream: Handle, event: Handle) -> None:
        """Let the stream wait for the event's newest mark; the host goes on."""
        self._call(self._cuda.cudaStreamWaitEvent, stream, event, 0)

    def synchronize(self, event: Handle) -> None:
        """Wait for the event's newest mark. An event never recorded counts as past."""
        self._call(self._cuda.cudaEventSynchronize, event)

    def drain(self, stream: Handle) -> None:
        """Wait until the stream is empty; the thread sleeps."""
        # Synchronising with the stream itself would spin, by the context's default.
        event = self.event()
        try:
            self.record(event, stream)
            self.synchronize(event)
        finally:
            self.discard(event)

    def capture(self, stream: Handle, enqueue: Callable[[], None]) -> Handle:
        """Record the work that `enqueue` puts on the stream as a graph, without running it, and bring that to the
        device.
        """
        cuda = self._cuda
        # Thread-local: other threads may allocate meanwhile.
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(cuda.cudaStreamBeginCapture, stream, mode)
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
        """End a capture that another error left open on the stream, and forget that error. Either would make later
        calls fail with a message about something else. Nothing happens where no capture is open.
        """
        cuda = self._cuda
        error, graph = cuda.cudaStreamEndCapture(stream)
        if not int(error):
            cuda.cudaGraphDestroy(graph)
        cuda.cudaGetLastError()  # which also forgets it

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Run a captured graph: one launch, whatever it holds."""
        self._call(self._cuda.cudaGraphLaunch, graph, stream)

    def _require_gpu(self) -> None:
        no_driver = (
            "No NVIDIA driver that this cuda-bindings can use: install one (`nvidia-smi` shows it), or the "
            "cuda-bindings of the driver's CUDA version (12.8 on JetPack 6)."
        )
        try:
            error, count = self._cuda.cudaGetDeviceCount()
        except RuntimeError as reason:  # cuda-bindings 12.8 without a driver; later ones return a code
            raise BackendError(f"{no_driver} ({reason})") from reason
        if int(error) == OUT_OF_DATE:
            raise BackendError(no_driver)
        if int(error) == NO_DEVICE or (int(error) == 0 and not count):
            raise BackendError("This machine has no NVIDIA GPU that CUDA can see.")
        if int(error):
            raise BackendError(f"CUDA does not start: {self._message(error)}.")

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

    def _compute_capability(self) -> int:
        of = self._cuda.cudaDeviceAttr
        parts = (of.cudaDevAttrComputeCapabilityMajor, of.cudaDevAttrComputeCapabilityMinor)
        major, minor = (self._call(self._cuda.cudaDeviceGetAttribute, part, self.device) for part in parts)
        return 10 * int(major) + int(minor)

    def _describe(self) -> str:
        version = int(self._call(self._cuda.cudaDriverGetVersion))
        name = _text(self._call(self._cuda.cudaGetDeviceProperties, self.device).name).rstrip("\0")
        return f"{name}, driver for CUDA {version // 1000}.{version % 1000 // 10}"

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call CUDA; returns its one result, or None. Raises BackendError."""
        error, *results = function(*arguments)
        if int(error):
            message = self._message(error)
            # CUDA keeps a thread's last error until it is asked: other libraries would report it as their own.
            self._cuda.cudaGetLastError()
            raise BackendError(f"{getattr(function, '__name__', 'CUDA')} failed: {message}.")
        return results[0] if results else None

    def _message(self, error: Any) -> str:
        driver_api = isinstance(error, self._api.CUresult)
        describe = self._api.cuGetErrorString if driver_api else self._cuda.cudaGetErrorString
        return _text(describe(error)[1])


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
