"""Memory of the rows of a hop graph: all tensors on the device, and pinned blocks on the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from streamtalk.backends.cuda.driver import Bytes, Driver, Handle
from streamtalk.model import Graph, Tensor
from streamtalk.rows import Array, Float32

UPLOADED = ("pcm", "noise", "position", "valid_frames", "valid_latents", "active")
"""Inputs of the hop graph that change with every hop and come from the host."""
ALIGNMENT = 256
"""TensorRT asks this of every tensor's address."""


@dataclass(frozen=True)
class Plan:
    """Places of tensors in one block of memory, in the order given, each aligned."""

    tensors: Mapping[str, Tensor]
    offsets: Mapping[str, int]
    total: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Plan:
        """Plan tensors of static shape."""
        by_name = {tensor.name: tensor for tensor in tensors}
        offsets, end = {}, 0
        for name, tensor in by_name.items():
            offsets[name] = end
            end += -(-_n_bytes(tensor, _shape(tensor)) // ALIGNMENT) * ALIGNMENT
        return cls(by_name, offsets, end)

    def addresses(self, base: int) -> dict[str, int]:
        """Address of each tensor in a block at `base`."""
        return {name: base + offset for name, offset in self.offsets.items()}

    def views(self, block: Bytes) -> dict[str, Array]:
        """View of each tensor in a block of host memory."""
        return {
            name: np.ndarray(_shape(tensor), tensor.dtype, block, self.offsets[name])
            for name, tensor in self.tensors.items()
        }


class Buffers:
    """Memory of one group of rows, which goes back when `held` closes.

    The uploaded tensors come first on the device and lie in the same order in each host block: one copy serves all.
    """

    def __init__(self, driver: Driver, graph: Graph, download: bool, held: ExitStack) -> None:
        self._driver = driver
        self._tensors = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
        uploaded = {name: self._tensors[name] for name in UPLOADED}
        self._plan = Plan.of({**uploaded, **self._tensors}.values())
        self._base = driver.device_memory(self._plan.total)
        held.callback(driver.free, self._base)
        self.device = self._plan.addresses(self._base)
        """Address of each tensor on the device."""
        packed = Plan.of(uploaded.values())
        self.blocks = [driver.pinned_memory(packed.total) for _ in range(2)]
        """Packed uploads, one for each side of the state: one is read by a launch while the host writes the other."""
        self.uploads = [packed.views(block) for block in self.blocks]
        """The tensors in each block, by name."""
        rows = (_n_bytes(tensor, _shape(tensor)[1:]) for tensor in self._tensors.values())
        self._spare = driver.pinned_memory(max(rows))
        vertices = self._tensors["vertices"]
        B, hop, V, _ = _shape(vertices)
        size = _n_bytes(vertices, [B, hop, V, 3])
        self.downloaded = driver.pinned_memory(size) if download else np.empty(0, np.uint8)
        """Vertices on the host, as bytes; nothing where they stay on the device."""
        self.vertices: Float32 = self.downloaded.view(np.float32).reshape(B, hop, V if download else 0, 3)
        self.vertices.flags.writeable = False

    def clear(self, stream: Handle) -> None:
        """Set everything to zero, and wait for it: in fresh memory a position may be out of range."""
        for block in self.blocks:
            block[:] = 0
        self._driver.clear(self._base, self._plan.total, stream)
        self._driver.drain(stream)

    def put(self, name: str, row: int, values: Array, stream: Handle) -> None:
        """Copy values to a row's part of a tensor, behind what is on the stream, and wait for it."""
        address, part, view = self._part(name, row)
        view[...] = values
        self._driver.upload(address, part, stream)
        self._driver.drain(stream)

    def get(self, name: str, row: int, stream: Handle) -> Float32:
        """Copy a row's part of a float32 tensor to the host, behind what is on the stream."""
        address, part, view = self._part(name, row)
        self._driver.download(part, address, stream)
        self._driver.drain(stream)
        values: Float32 = view.copy()
        return values

    def zeros(self, name: str) -> Array:
        """An array of a row's part of a tensor."""
        return np.zeros_like(self._part(name, 0)[2])

    def _part(self, name: str, row: int) -> tuple[int, Bytes, Array]:
        """Address of a row's part of a tensor, and pinned memory for it, as bytes and as the tensor's values."""
        tensor = self._tensors[name]
        _, *inner = _shape(tensor)
        part = self._spare[: _n_bytes(tensor, inner)]
        return self.device[name] + row * len(part), part, part.view(tensor.dtype).reshape(inner)


def _shape(tensor: Tensor) -> list[int]:
    return [int(n) for n in tensor.shape]


def _n_bytes(tensor: Tensor, shape: list[int]) -> int:
    return int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize
