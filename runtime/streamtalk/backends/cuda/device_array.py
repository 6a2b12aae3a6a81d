"""Vertices where the GPU made them, for renderers: the CUDA array interface and DLPack, without a copy."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from streamtalk.backends.cuda.dlpack import float32_capsule
from streamtalk.backends.cuda.driver import Driver, Handle
from streamtalk.rows import Float32

LEGACY_STREAM = 1
"""The default stream, as both protocols number it; 2 is the thread's own default stream."""
NO_WAIT = -1


@dataclass(frozen=True)
class Fence:
    """Order between the stream that writes an array, and the streams of those who read it.

    `ready` marks the newest write, `read` the end of a reading. All parts of an array share the event `read`: under
    `reading` no thread marks it again before the stream waits for the mark of another.
    """

    driver: Driver
    stream: Handle
    ready: Handle
    read: Handle
    reading: Lock = field(default_factory=Lock)


class DeviceArray:
    """Float32 memory on the GPU that every launch fills anew.

    `torch.from_dlpack(x)`, `cupy.asarray(x)`, `numba.cuda.as_cuda_array(x)` and PyCUDA's `GPUArray(x.shape, x.dtype,
    gpudata=x.address)` see it in place, and PyCUDA's kernels take `x` itself.

    It holds the newest hop until the next launch, and nothing after `close`. A consumer that works on a stream of its
    own puts its work between `acquire_on`, which makes that stream wait for the hop, and `release_on`, which makes
    the next launch wait for that stream; the host waits for neither. DLPack does the first by itself. The array
    interface only names our stream: CuPy and Numba then make the host wait, and torch
    (`torch.as_tensor(x, device="cuda")`) does not look at it, so that `acquire_on` comes first.
    """

    def __init__(self, fence: Fence, address: int, shape: tuple[int, ...]) -> None:
        self.address = address
        """On the device."""
        self.shape = shape
        self.dtype = np.dtype(np.float32)
        self.stream = int(fence.stream)
        """The CUDA stream (`cudaStream_t`) that fills it."""
        self._fence, self._driver = fence, fence.driver

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""
        return {
            "shape": self.shape,
            "typestr": "<f4",
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Kind and number of the device: `(2, 0)` for the first GPU."""
        return self._driver.dlpack_device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule; `stream` waits for the newest hop. None or 1 is the legacy default stream, -1 waits for nothing.

        Raises BufferError for another device or a copy.
        """
        if copy:
            raise BufferError("Vertices on the device are shared and never copied: copy what you get.")
        if dl_device is not None and tuple(dl_device) != self._driver.dlpack_device:
            raise BufferError(
                f"These vertices are on device {self._driver.dlpack_device}, not on {tuple(dl_device)}."
            )
        if stream == 0:
            raise BufferError("Stream 0 is ambiguous in DLPack: pass 1 for the legacy default stream.")
        if stream != NO_WAIT:
            self.acquire_on(LEGACY_STREAM if stream is None else stream)
        versioned = max_version is not None and max_version[0] >= 1
        return float32_capsule(self.address, self.shape, self._driver.dlpack_device, versioned)

    def acquire_on(self, stream: int) -> None:
        """Let `stream`, a `cudaStream_t` as a number, wait for the newest hop."""
        with self._driver.current():
            self._driver.wait(stream, self._fence.ready)

    def release_on(self, stream: int) -> None:
        """Let the next launch wait for everything that `stream` holds now."""
        fence = self._fence
        with self._driver.current(), fence.reading:
            self._driver.record(fence.read, stream)
            self._driver.wait(fence.stream, fence.read)

    def wait(self) -> None:
        """Put the calling thread to sleep until the newest hop is there."""
        with self._driver.current():
            self._driver.synchronize(self._fence.ready)

    def at(self, *index: int) -> DeviceArray:
        """The part `x[index]`: `at(row)` is a row's hop [hop, V, 3], `at(row, place)` one of its frames [V, 3]."""
        outer, inner = self.shape[: len(index)], self.shape[len(index) :]
        offset = int(np.ravel_multi_index(index, outer) * np.prod(inner)) * self.dtype.itemsize
        return DeviceArray(self._fence, self.address + offset, inner)

    def on_host(self) -> Float32:
        """A copy on the host. Waits and allocates: for tests and pictures, not for the steady loop."""
        values = np.empty(self.shape, np.float32)
        with self._driver.current():
            self._driver.download(values.reshape(-1).view(np.uint8), self.address, self._fence.stream)
            self._driver.drain(self._fence.stream)
        return values
