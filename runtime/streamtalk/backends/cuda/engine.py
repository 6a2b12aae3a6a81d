"""The contract between rows on a GPU and a library that runs a hop graph there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from streamtalk.backends.cuda.driver import Handle
from streamtalk.model import Graph


class Run(Protocol):
    """A graph with its tensors' addresses fixed: its own scratch memory, no allocation when it runs."""

    def enqueue(self, stream: Handle) -> None:
        """Put one run on the stream. Raises BackendError."""

    def close(self) -> None:
        """Give back what it holds. Nothing of it may be in flight."""


class DeviceEngine(Protocol):
    """A loaded hop graph, shared by all rows objects of its number of rows."""

    @property
    def graph(self) -> Graph:
        """The graph that it computes."""

    @property
    def capturable(self) -> bool:
        """Whether `Run.enqueue` may be captured into a CUDA graph; False where the library captures by itself."""

    @property
    def fingerprint(self) -> str:
        """Everything that its results depend on besides the device and the library: files, settings."""

    def bind(self, addresses: Mapping[str, int], stream: Handle) -> Run:
        """Prepare a run on tensors at these device addresses, by name; it has run once to warm up."""
