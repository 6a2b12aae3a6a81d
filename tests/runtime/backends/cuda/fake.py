"""CUDA on host memory: `cuda.bindings.runtime` and `.driver` in one object, under the real driver class.

Streams are at the extremes of what CUDA allows. Work waits in its stream until an event or another stream forces it,
or it runs at once. Rows that forget to wait, or write pinned memory that an upload has yet to read, give wrong frames
here as they would on a device. Arguments that CUDA would refuse are refused, and those that make it spin or wait for
other streams fail an assertion.
"""

# ruff: noqa: N802, N815 (the names are CUDA's)

from __future__ import annotations

import ctypes
import functools
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest

from streamtalk.backends.cuda.buffers import ALIGNMENT

Work = Callable[[], Any]
Handle = TypeVar("Handle")
PRIMARY = 11
"""The primary context; other numbers are contexts of somebody's own."""
GARBAGE = 0xA5
"""Content of fresh memory: zeros would hide a missing clear."""
NON_BLOCKING, BLOCKING_SYNC, DISABLE_TIMING, THREAD_LOCAL = 1, 1, 2, 1
INVALID_VALUE, CAPTURE_INVALIDATED = 1, 901
FOREIGN_STREAMS = (1, 2)
"""The default streams, of another library on host memory: to wait on them is to wait at once."""


class Result(int):
    """`CUresult`: an error of the driver API."""


class RefusedError(Exception):
    """Carries the code of an error that a function returns."""


@dataclass(eq=False)
class Stream:
    """Runs its work as late as it may, or at once where it is `eager`."""

    number: int
    eager: bool = False
    queue: deque[Work] = field(default_factory=deque)
    capturing: list[Work] | None = None

    def __int__(self) -> int:
        return self.number

    def put(self, work: Work) -> None:
        """Add work, to the capture that is open if there is one."""
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.queue.append(work)
            if self.eager:
                self.run()

    def run(self) -> None:
        """Run everything."""
        while self.queue:
            self.queue.popleft()()


@dataclass
class Mark:
    """A point in a stream."""

    stream: Stream
    reached: bool = False

    def reach(self) -> None:
        self.reached = True

    def force(self) -> None:
        while not self.reached:
            self.stream.queue.popleft()()


@dataclass(eq=False)
class Event:
    """Its newest mark; a wait is for the mark that is newest when it is asked for, as in CUDA."""

    flags: int
    mark: Mark | None = None


@dataclass(eq=False)
class Graph:
    """Captured work; `ready` to be launched or not."""

    work: list[Work]
    ready: bool = False


class Exec(Graph):
    """An instantiated graph."""


def api(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of CUDA's: it notes the call and returns its error and its result."""
    name = function.__name__

    @functools.wraps(function)
    def call(self: FakeCuda, *arguments: Any) -> tuple[Any, ...]:
        self.calls.append((name, *arguments))
        error, result = self.failures.get(name, 0), None
        if error and name == "cudaStreamEndCapture":
            arguments[0].capturing = None  # which it ends whatever it returns
        if not error:
            try:
                result = function(self, *arguments)
            except RefusedError as refused:
                error = refused.args[0]
        if error and name.startswith("cuda"):
            self.last_error = error
        code = error if name.startswith("cuda") else Result(error)
        return (code,) if result is None and not error else (code, result)

    return call


class FakeCuda:
    """One device. `failures` are errors by function, `stack` the contexts of the calling thread, the current one last,
    and `eager` which streams run at once, in the order of their making.
    """

    CUresult = Result
    cudaGraphExec_t, cudaEvent_t = Exec, Event
    cudaStreamNonBlocking, cudaHostAllocDefault = NON_BLOCKING, 0
    cudaEventBlockingSync, cudaEventDisableTiming = BLOCKING_SYNC, DISABLE_TIMING
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="across"
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=THREAD_LOCAL)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=THREAD_LOCAL)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=7)

    def __init__(
        self, count: int = 1, failures: dict[str, int] | None = None, stack: tuple[int, ...] = ()
    ) -> None:
        self.count, self.failures, self.stack = count, failures or {}, list(stack)
        self.active = PRIMARY in stack
        self.last_error = 0
        self.calls: list[tuple[Any, ...]] = []
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.handles: list[Any] = []
        self.eager: tuple[bool, ...] = ()
        self._numbers = iter(range(100, 10**6))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in for both modules of cuda-bindings."""
        for name in ("cuda.bindings.runtime", "cuda.bindings.driver"):
            monkeypatch.setitem(sys.modules, name, self)

    def count_calls(self, *names: str) -> dict[str, int]:
        """How often each was called since the calls were cleared."""
        called = [call[0] for call in self.calls]
        return {name: called.count(name) for name in names}

    def put(self, stream: Any, work: Work) -> None:
        """Put work of a library on a stream, given as a handle or a number."""
        self._stream(stream).put(work)

    def in_flight(self) -> bool:
        """Whether any stream has work."""
        return any(isinstance(handle, Stream) and handle.queue for handle in self.handles)

    def nothing_left(self) -> bool:
        """Whether everything was given back, pinned memory aside, which goes with its last view."""
        return not self.device and not self.handles

    # The device and its contexts.

    @api
    def cudaGetDeviceCount(self) -> int:
        return self.count

    @api
    def cudaGetDevice(self) -> int:
        return 0

    @api
    def cudaDriverGetVersion(self) -> int:
        return 12060

    @api
    def cudaGetDeviceProperties(self, _: int) -> Any:
        return SimpleNamespace(name=b"NVIDIA Thing\0\0")

    @api
    def cudaDeviceGetAttribute(self, which: int, _: int) -> int:
        return which

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, f"error {error} of the runtime".encode()

    def cuGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, f"error {int(error)} of the driver".encode()

    def cudaGetLastError(self) -> tuple[int]:
        self.calls.append(("cudaGetLastError",))
        error, self.last_error = self.last_error, 0
        return (error,)

    @api
    def cudaSetDevice(self, device: int) -> None:
        assert device == 0

    @api
    def cuCtxGetCurrent(self) -> int:
        return self.stack[-1] if self.stack else 0

    @api
    def cuCtxPushCurrent(self, context: int) -> None:
        self.stack.append(context)

    @api
    def cuCtxPopCurrent(self) -> int:
        return self.stack.pop()

    @api
    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> int:
        assert mode == THREAD_LOCAL
        return 0

    @api
    def cuDeviceGet(self, number: int) -> int:
        return number

    def cuDevicePrimaryCtxGetState(self, _: int) -> tuple[int, int, bool]:
        return 0, 0, self.active

    @api
    def cuDevicePrimaryCtxRetain(self, _: int) -> int:
        assert self.active, "a context was made"
        return PRIMARY

    @api
    def cuDevicePrimaryCtxRelease(self, _: int) -> None:
        return None

    # Memory.

    @api
    def cudaMalloc(self, size: int) -> int:
        self._require_context()
        return self._take(size, self.device)

    @api
    def cudaFree(self, address: int) -> None:
        if address == 0:
            # Any call of the runtime API without a context makes the primary one current.
            self.active = True
            self.stack[-1:] = [self.stack[-1] if self.stack else PRIMARY]
            return
        self._require_context()
        del self.device[address]

    @api
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        assert flags == self.cudaHostAllocDefault
        self._require_context()
        return self._take(size, self.pinned)

    @api
    def cudaFreeHost(self, address: int) -> None:
        del self.pinned[address]

    @api
    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: Any) -> None:
        from_device, to_device = (self._is_in(self.device, at, size) for at in (source, target))
        if (from_device, to_device) != {"up": (False, True), "down": (True, False), "across": (True, True)}[
            kind
        ]:
            raise RefusedError(INVALID_VALUE)
        on = self._stream(stream)
        if on.capturing is not None and kind != "across":
            assert self._is_in(self.pinned, source if kind == "up" else target, size), "pageable memory"

        def move() -> None:
            assert not from_device or self._is_in(self.device, source, size), "memory was freed"
            assert not to_device or self._is_in(self.device, target, size), "memory was freed"
            ctypes.memmove(target, source, size)

        on.put(move)

    @api
    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: Any) -> None:
        if not self._is_in(self.device, target, size):
            raise RefusedError(INVALID_VALUE)
        self._stream(stream).put(lambda: ctypes.memset(target, value, size))

    # Streams, events and graphs.

    @api
    def cudaStreamCreateWithFlags(self, flags: int) -> Stream:
        assert flags == NON_BLOCKING, "the stream waits for the default one"
        eager, self.eager = self.eager[:1], self.eager[1:]
        return self._made(Stream(next(self._numbers), eager=any(eager)))

    @api
    def cudaStreamDestroy(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)
        assert not stream.queue, "discarded with work in flight"
        self.handles.remove(stream)

    @api
    def cudaEventCreateWithFlags(self, flags: int) -> Event:
        return self._made(Event(flags))

    @api
    def cudaEventDestroy(self, event: Event) -> None:
        self.handles.remove(event)

    @api
    def cudaEventRecord(self, event: Event, stream: Any) -> None:
        on = self._stream(stream)
        assert on.capturing is None
        event.mark = Mark(on)
        on.put(event.mark.reach)

    @api
    def cudaEventSynchronize(self, event: Event) -> None:
        self._require_context()
        assert event.flags & BLOCKING_SYNC, "the thread spins"
        if event.mark is not None:
            event.mark.force()

    @api
    def cudaStreamWaitEvent(self, stream: Any, event: Event, flags: int) -> None:
        assert flags == 0
        if event.mark is None:
            return
        if stream in FOREIGN_STREAMS:
            event.mark.force()
        else:
            self._stream(stream).put(event.mark.force)

    @api
    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> None:
        assert mode == THREAD_LOCAL
        assert not stream.queue, "work in flight at a capture"
        stream.capturing = []

    @api
    def cudaStreamEndCapture(self, stream: Stream) -> Graph:
        work, stream.capturing = stream.capturing, None
        if work is None:
            raise RefusedError(CAPTURE_INVALIDATED)
        return self._made(Graph(work))

    @api
    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Exec:
        assert flags == 0
        return self._made(Exec(graph.work))

    @api
    def cudaGraphDestroy(self, graph: Graph) -> None:
        self.handles.remove(graph)

    @api
    def cudaGraphUpload(self, graph: Exec, stream: Any) -> None:
        self._stream(stream).put(lambda: setattr(graph, "ready", True))

    @api
    def cudaGraphLaunch(self, graph: Exec, stream: Any) -> None:
        assert graph.ready, "its first launch is slow"
        for work in graph.work:
            self._stream(stream).put(work)

    @api
    def cudaGraphExecDestroy(self, graph: Exec) -> None:
        self.handles.remove(graph)

    def _stream(self, stream: Any) -> Stream:
        self._require_context()
        (found,) = (s for s in self.handles if isinstance(s, Stream) and s.number == int(stream))
        return found

    def _made(self, handle: Handle) -> Handle:
        self._require_context()
        self.handles.append(handle)
        return handle

    def _require_context(self) -> None:
        assert self.stack, "no context is current"

    def _take(self, size: int, blocks: dict[int, Any]) -> int:
        block = np.full(size + ALIGNMENT, GARBAGE, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        blocks[address] = block[address - block.ctypes.data :][:size]
        return int(address)

    @staticmethod
    def _is_in(blocks: dict[int, Any], address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(b) for start, b in blocks.items())
