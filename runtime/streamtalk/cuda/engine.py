"""What a lane needs of whatever runs a graph on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from streamtalk.cuda.driver import Handle
from streamtalk.manifest import Graph, Tensor

ALIGNMENT = 256
"""TensorRT asks this of every tensor's address."""


class Run(Protocol):
    """A graph with its tensors' addresses fixed: its own scratch memory, no allocation when it runs."""

    def enqueue(self, stream: Handle) -> None:
        """Put one run on the stream. Raises BackendError."""

    def close(self) -> None:
        """Give back what it holds. Nothing of it may be in flight."""


class DeviceEngine(Protocol):
    """A loaded graph, shared by lanes."""

    graph: Graph
    capturable: bool
    """Whether `enqueue` may be captured into a CUDA graph; False where the engine captures by itself."""

    def bind(self, addresses: Mapping[str, int], stream: Handle) -> Run:
        """Prepare a run on tensors at these device addresses, by name; it has run once to warm up."""


def size_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor of static shape."""
    return int(np.prod([int(n) for n in tensor.shape])) * np.dtype(tensor.dtype).itemsize


@dataclass(frozen=True)
class Plan:
    """Named blocks in one stretch of memory, each aligned."""

    offsets: Mapping[str, int]
    sizes: Mapping[str, int]
    total: int

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Plan:
        """Blocks in the order given."""
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(offsets, dict(sizes), end)
