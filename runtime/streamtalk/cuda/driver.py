"""The few CUDA calls that the runtime makes, as a protocol: tests put one on host memory behind it.

Pointers, streams, events and graphs are integers or opaque values that only the driver that gave them reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
BUILD = re.compile(r"\b\d{3,}\.[\d.]+\b")
Handle = Any
"""A stream, an event or an instantiated graph."""


class Driver(Protocol):
    """One context on one GPU. Every call may raise BackendError with CUDA's own words; copies are asynchronous on
    a stream. Calls are made where the context is current: see `current`.
    """

    description: str
    """The device, for people, such as `NVIDIA GeForce RTX 4090, driver 12.6`."""
    build: str
    """The version of the kernel driver, such as `570.86.15`; empty where it does not tell."""
    compute_capability: int
    """86 for 8.6."""
    device: int
    """Number of the GPU in this process."""
    primary: bool
    """Whether the context is the GPU's primary one, which all users of the runtime API share."""
    dlpack_device: tuple[int, int]
    """The device as DLPack names it: kind and number."""

    def current(self) -> AbstractContextManager[None]:
        """Make the context the calling thread's, where it is not, and undo that at the end. Cheap; may be nested."""

    def device_memory(self, size: int) -> int:
        """Address of `size` bytes on the device, aligned to 256."""

    def pinned_memory(self, size: int) -> Bytes:
        """`size` bytes of page-locked host memory, which go back when the last view of them is gone."""

    def release(self, device: list[int]) -> None:
        """Give device memory back. Nothing that uses it may be in flight."""

    def stream(self) -> Handle:
        """A stream that does not wait for the default one."""

    def event(self) -> Handle:
        """An event; a thread that waits for it sleeps rather than spins."""

    def upload(self, target: int, source: Bytes, stream: Handle) -> None:
        """Copy host to device."""

    def download(self, target: Bytes, source: int, stream: Handle) -> None:
        """Copy device to host, `len(target)` bytes."""

    def copy(self, target: int, source: int, size: int, stream: Handle) -> None:
        """Copy device to device."""

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
        """Copy device to device: `rows` rows of `width` bytes, whose starts are the pitches apart."""

    def clear(self, target: int, size: int, stream: Handle) -> None:
        """Set bytes to zero."""

    def record(self, event: Handle, stream: Handle) -> None:
        """Mark this point of the stream."""

    def wait(self, stream: Handle, event: Handle) -> None:
        """Let the stream wait for the event's newest mark; the host goes on."""

    def synchronize(self, event: Handle) -> None:
        """Wait for the event's newest mark. An event never recorded counts as past."""

    def drain(self, stream: Handle) -> None:
        """Wait until the stream is empty; the thread sleeps."""

    def capture(self, stream: Handle, enqueue: Callable[[], None]) -> Handle:
        """Record what `enqueue` puts on the stream as a graph, without running it, and bring that to the device."""

    def abandon(self, stream: Handle) -> None:
        """End a capture that someone else's error left open on the stream, and forget the error: both would fail
        later calls with words about something else. Nothing where there is none.
        """

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Run a captured graph: one launch, whatever it holds."""

    def discard(self, handles: list[Handle]) -> None:
        """Destroy streams, events and graphs that this driver made."""


def driver_build(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's kernel driver; empty without one, and where the system does not tell (Windows, WSL)."""
    try:
        found = BUILD.search(version.read_text(errors="replace"))
    except OSError:
        return ""
    return found[0] if found else ""


def open_driver() -> Driver:
    """CUDA through cuda-bindings, in the context that is current to the calling thread, such as PyCUDA's, or else
    the primary one of the thread's device. No context is made where there is one.

    Raises MissingDependencyError without the package, BackendError without a driver or a GPU.
    """
    from streamtalk.cuda.bindings import CudaDriver

    return CudaDriver()
