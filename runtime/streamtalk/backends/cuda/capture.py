"""One hop as one CUDA graph: an upload, the hop graph, a download."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from streamtalk.backends.cuda.driver import Bytes, Driver, Handle
from streamtalk.backends.cuda.engine import Run
from streamtalk.errors import BackendError


@dataclass(frozen=True)
class Work:
    """Work of one hop on a stream: `source` to the address `inputs`, the run, and `vertices` to `target`, unless that
    is empty.
    """

    driver: Driver
    stream: Handle
    inputs: int
    source: Bytes
    run: Run
    vertices: int
    target: Bytes

    def enqueue(self) -> None:
        """Put the work on the stream, call by call."""
        self.driver.upload(self.inputs, self.source, self.stream)
        self.run.enqueue(self.stream)
        if len(self.target):
            self.driver.download(self.target, self.vertices, self.stream)


def captured(works: Sequence[Work], held: ExitStack) -> list[Callable[[], None]]:
    """Return what starts each work: one launch of its captured graph, which goes back when `held` closes.

    Where a capture fails, each is started call by call, and a RuntimeWarning says so.
    """
    launches: list[Callable[[], None]] = []
    try:
        for work in works:
            graph = work.driver.capture(work.stream, work.enqueue)
            held.callback(work.driver.discard, graph)
            launches.append(partial(work.driver.launch, graph, work.stream))
    except BackendError as error:
        # Still right, until the next open: it may have been for want of memory. Classic TensorRT does not tell
        # beforehand what it cannot capture.
        warnings.warn(f"No CUDA graph, so frames take longer: {error}", RuntimeWarning, stacklevel=2)
        return [work.enqueue for work in works]
    return launches
