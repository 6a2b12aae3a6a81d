"""Vertices where the GPU made them, for renderers: the CUDA array interface and DLPack, without a copy."""

from __future__ import annotations

from threading import Lock
from typing import Any, Protocol, runtime_checkable

import numpy as np

from streamtalk.backends.protocol import Float32
from streamtalk.cuda.dlpack import float32_capsule
from streamtalk.cuda.driver import Driver, Handle
from streamtalk.errors import BackendError

LEGACY_STREAM = 1
"""The default stream, as both protocols number it; 2 is the thread's own default stream."""
NO_WAIT = -1


class DeviceArray:
    """Float32 memory on the GPU that a stream fills anew with every frame, or a batch with every step.

    `torch.from_dlpack(x)`, `cupy.asarray(x)`, `numba.cuda.as_cuda_array(x)` and PyCUDA's `GPUArray(x.shape, x.dtype,
    gpudata=x.address)` see it in place, and PyCUDA's kernels take `x` itself.

    It is the newest frame's until the next one is asked for, and nobody's after `close`. A consumer that works on a
    stream of its own puts what it does between `acquire_on`, which makes that stream wait for the frame, and
    `release_on`, which makes the next frame wait for that stream; the host waits for neither. DLPack does the first by
    itself. The array interface only names our stream: CuPy and Numba then make the host wait, and torch
    (`torch.as_tensor(x, device="cuda")`) does not look at it, so that `acquire_on` comes first.
    """

    def __init__(
        self,
        driver: Driver,
        address: int,
        shape: tuple[int, ...],
        stream: Handle,
        ready: Handle,
        read: Handle,
        reading: Lock | None = None,
    ) -> None:
        self.address = address
        """On the device."""
        self.shape = shape
        self.dtype = np.dtype(np.float32)
        self.stream = int(stream)
        """The CUDA stream (`cudaStream_t`) that fills it."""
        self._driver, self._stream, self._ready, self._read = driver, stream, ready, read
        self._reading = reading or Lock()
        """Rows of a batch share the event: what one thread marks with it no other may mark again before it is waited
        for."""

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
        """A capsule, after `stream` was told to wait for the newest frame: None or 1 is the legacy default stream,
        -1 waits for nothing. Raises BufferError for another device or a copy.
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
        """Let `stream`, a `cudaStream_t` as a number, wait for the newest frame."""
        with self._driver.current():
            self._driver.wait(stream, self._ready)

    def release_on(self, stream: int) -> None:
        """Let the next frame wait for all that `stream` holds now."""
        driver = self._driver
        with driver.current(), self._reading:
            driver.record(self._read, stream)
            driver.wait(self._stream, self._read)

    def wait(self) -> None:
        """Put the calling thread to sleep until the newest frame is there."""
        with self._driver.current():
            self._driver.synchronize(self._ready)

    def row(self, index: int) -> DeviceArray:
        """The part of one slot, `x[index]`."""
        inner = self.shape[1:]
        address = self.address + 4 * index * int(np.prod(inner))
        return DeviceArray(self._driver, address, inner, self._stream, self._ready, self._read, self._reading)

    def on_host(self) -> Float32:
        """A copy on the host. Waits and allocates: for tests and pictures, not for the steady loop."""
        values = np.empty(self.shape, np.float32)
        with self._driver.current():
            self._driver.download(values.reshape(-1).view(np.uint8), self.address, self._stream)
            self._driver.drain(self._stream)
        return values


@runtime_checkable
class OnDevice(Protocol):
    """A lane, or slots, whose vertices a GPU makes."""

    @property
    def device_vertices(self) -> DeviceArray:
        """The newest ones."""


def device_vertices(of: object) -> DeviceArray:
    """The vertices of a lane, or of slots, on the device. Raises BackendError where they are in host memory."""
    if not isinstance(of, OnDevice):
        raise BackendError(
            "Vertices are on a device only where a GPU makes them, and this backend computes on the CPU: read "
            "`frame.vertices`, or load with tensorrt, tensorrt_rtx or onnxruntime-cuda."
        )
    return of.device_vertices
