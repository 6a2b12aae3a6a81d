"""A GPU of host memory: the driver's protocol with streams at the extremes of what CUDA allows.

Work waits in its stream until something forces it, a wait for an event or a drain; or it runs at once. A lane that
forgets to wait, or writes pinned memory that an upload has yet to read, gives wrong frames here as it would on a
device.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from streamtalk.backends.onnxruntime_cuda import CudaSessionRun
from streamtalk.cuda.backend import CudaBackend
from streamtalk.cuda.driver import Bytes
from streamtalk.cuda.engine import ALIGNMENT
from streamtalk.manifest import AUDIO_ENCODER, FRAME, Graph, Manifest

FIRST_STREAM = 100
Work = Callable[[], None]
GARBAGE = 0xA5
"""What fresh memory holds: zeros would hide a missing clear."""


@dataclass(eq=False)
class FakeStream:
    """Runs its work as late as it may, or at once where it is `eager`."""

    number: int = 0
    queue: deque[Work] = field(default_factory=deque)
    capturing: list[Work] | None = None
    eager: bool = False

    def __int__(self) -> int:
        return self.number

    def put(self, work: Work) -> None:
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.queue.append(work)
            if self.eager:
                self.run()

    def run(self) -> None:
        while self.queue:
            self.queue.popleft()()


@dataclass
class Mark:
    """A point in a stream."""

    stream: FakeStream
    reached: bool = False

    def reach(self) -> None:
        self.reached = True

    def force(self) -> None:
        while not self.reached:
            self.stream.queue.popleft()()


@dataclass(eq=False)
class FakeEvent:
    """Its newest mark; a wait is for the mark that is newest when it is asked for, as in CUDA."""

    mark: Mark | None = None


@dataclass
class FakeDriver:
    """Counts what it was asked for; `calls` is cleared by tests."""

    description: str = "a fake GPU"
    build: str = "570.86.15"
    compute_capability: int = 86
    device: int = 0
    primary: bool = True
    dlpack_device: tuple[int, int] = (1, 0)
    """Host memory, so that numpy and torch can take what DLPack hands out."""
    depth: int = 0
    """How many times the context is current; work is refused where it is not."""
    calls: list[str] = field(default_factory=list)
    memory: dict[int, Any] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    eager: tuple[bool, ...] = ()
    """Which of the streams run at once, in the order of their making."""

    @contextmanager
    def current(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def _put(self, stream: FakeStream, work: Work) -> None:
        assert self.depth, "no context is current"
        stream.put(work)

    def _take(self, size: int) -> tuple[int, Any]:
        block = np.full(size + ALIGNMENT, GARBAGE, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.memory[address] = block
        return address, block[address - block.ctypes.data :][:size]

    def device_memory(self, size: int) -> int:
        self.calls.append("device_memory")
        return self._take(size)[0]

    def pinned_memory(self, size: int) -> Bytes:
        self.calls.append("pinned_memory")
        pinned: Bytes
        address, pinned = self._take(size)
        del self.memory[address]  # its views alone keep it
        return pinned

    def release(self, device: list[int]) -> None:
        for address in device:
            del self.memory[address]

    def stream(self) -> FakeStream:
        made = FakeStream(FIRST_STREAM + len(self.handles), eager=bool(self.eager) and self.eager[0])
        self.eager = self.eager[1:]
        self.handles.append(made)
        return made

    def event(self) -> FakeEvent:
        self.handles.append(made := FakeEvent())
        return made

    def upload(self, target: int, source: Bytes, stream: FakeStream) -> None:
        self.calls.append("upload")
        self._put(stream, lambda: _move(target, source.ctypes.data, source.nbytes))

    def download(self, target: Bytes, source: int, stream: FakeStream) -> None:
        self.calls.append("download")
        self._put(stream, lambda: _move(target.ctypes.data, source, target.nbytes))

    def copy(self, target: int, source: int, size: int, stream: FakeStream) -> None:
        self.calls.append("copy")
        self._put(stream, lambda: _move(target, source, size))

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: FakeStream,
    ) -> None:
        self.calls.append("copy_rows")
        assert width <= min(target_pitch, source_pitch)
        for i in range(rows):
            self._put(stream, partial(_move, target + i * target_pitch, source + i * source_pitch, width))

    def clear(self, target: int, size: int, stream: FakeStream) -> None:
        self._put(stream, lambda: (ctypes.memset(target, 0, size), None)[1])

    def record(self, event: FakeEvent, stream: FakeStream) -> None:
        assert stream.capturing is None
        event.mark = Mark(stream)
        self._put(stream, event.mark.reach)

    def wait(self, stream: FakeStream | int, event: FakeEvent) -> None:
        if isinstance(stream, int):
            # The default stream of another library, on host memory: to wait on it is to wait at once.
            self.synchronize(event)
            return
        assert stream.capturing is None
        if event.mark is not None:
            self._put(stream, event.mark.force)

    def synchronize(self, event: FakeEvent) -> None:
        if event.mark is not None:
            event.mark.force()

    def drain(self, stream: FakeStream) -> None:
        stream.run()

    def capture(self, stream: FakeStream, enqueue: Work) -> list[Work]:
        assert not stream.queue, "work in flight at a capture"
        graph: list[Work] = []
        stream.capturing = graph
        enqueue()
        stream.capturing = None
        self.handles.append(graph)
        return graph

    def abandon(self, stream: FakeStream) -> None:
        self.calls.append("abandon")
        stream.capturing = None

    def launch(self, graph: list[Work], stream: FakeStream) -> None:
        self.calls.append("launch")
        for work in graph:
            self._put(stream, work)

    def discard(self, handles: list[Any]) -> None:
        for handle in handles:
            assert not isinstance(handle, FakeStream) or not handle.queue, "discarded with work in flight"
            self.handles = [kept for kept in self.handles if kept is not handle]


class FakeEngine:
    """A graph that onnxruntime runs on the host addresses that it is given."""

    def __init__(self, directory: Path, graph: Graph, driver: FakeDriver, capturable: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(directory / graph.file), options, providers=["CPUExecutionProvider"]
        )
        self.graph, self.driver, self.capturable = graph, driver, capturable
        self.open_runs = 0
        self.own = FakeStream()
        self.ran: Callable[[], Any] = lambda: None

    def bind(self, addresses: Mapping[str, int], stream: FakeStream) -> FakeRun | SessionRun:
        assert stream.capturing is None
        assert all(address % ALIGNMENT == 0 for address in addresses.values())
        binding = self.session.io_binding()
        for t in self.graph.inputs:
            binding.bind_input(t.name, "cpu", 0, np.dtype(t.dtype).type, list(t.shape), addresses[t.name])
        for t in self.graph.outputs:
            binding.bind_output(t.name, "cpu", 0, np.dtype(t.dtype).type, list(t.shape), addresses[t.name])
        self.open_runs += 1
        return FakeRun(self, binding) if self.capturable else SessionRun(self, binding)


class SessionRun:
    """As `backends.onnxruntime_cuda` runs a session: on a stream that is the session's."""

    def __init__(self, engine: FakeEngine, binding: Any) -> None:
        self.engine, self.run = engine, FakeRun(engine, binding)
        options = SimpleNamespace(add_run_config_entry=lambda *_: None)
        session: Any = SimpleNamespace(
            driver=engine.driver,
            stream=engine.own,
            lock=nullcontext(),
            runtime=SimpleNamespace(RunOptions=lambda: options),
            session=SimpleNamespace(run_with_iobinding=lambda *_: self.run.enqueue(engine.own)),
        )
        self.asked = CudaSessionRun(session, binding, 1)

    def enqueue(self, stream: FakeStream) -> None:
        self.asked.enqueue(stream)

    def close(self) -> None:
        self.run.close()
        self.asked.close()


class FakeRun:
    def __init__(self, engine: FakeEngine, binding: Any) -> None:
        self.engine, self.binding = engine, binding

    def enqueue(self, stream: FakeStream) -> None:
        self.engine.driver.calls.append("enqueue")

        def run() -> None:
            self.engine.session.run_with_iobinding(self.binding)
            self.engine.ran()

        stream.put(run)

    def close(self) -> None:
        self.engine.open_runs -= 1


def fake_gpu(directory: Path, manifest: Manifest, capturable: bool = True) -> Any:
    """A backend on the fake driver: a `CudaBackend`, untyped because tests look into the driver."""
    driver = FakeDriver()
    encoder, frame = (
        FakeEngine(directory, manifest.graphs[name], driver, capturable) for name in (AUDIO_ENCODER, FRAME)
    )
    return CudaBackend("fake", "a fake GPU", "fake 1", "fp32", driver, encoder, frame, manifest)


def _move(target: int, source: int, size: int) -> None:
    ctypes.memmove(target, source, size)
