"""An output in a process of its own: drawing takes longer than talking, and must not make frames late.

A thread will not do. While a software renderer draws, it holds Python's lock for tens of milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from streamtalk.app.output import Output
from streamtalk.errors import OutputError, StreamTalkError
from streamtalk.signals import SIGNALS
from streamtalk.stream import Frame

BACKLOG = 1024
"""Blocks and frames that may wait, some 8 s at 10 ms blocks: memory stays flat, and who draws slower than real
time for longer than that has late frames."""
NICENESS = 10
PATIENCE_S = 1.0

Float32 = npt.NDArray[np.float32]
Item: TypeAlias = "tuple[int, float, Float32, Float32 | None] | Float32 | None"
"""A frame (index, time, vertices, blendshapes), audio, or the end."""


class Background:
    """An `Output` that hands everything to another, which lives in a process from opening to closing.

    `open_output` is picklable. Raises what the other raises: from opening it at construction, later at the next
    `frame` or at `close`.
    """

    def __init__(self, open_output: Callable[[], Output]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy a backend's threads and locks
        self._items: Any = context.Queue(BACKLOG)
        self._news, news = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_work, args=(open_output, self._items, news), name="streamtalk-output", daemon=True
        )
        self._process.start()
        news.close()  # ours; so that the worker's death is the end of the pipe
        self._closed = False
        self._raise_news()

    def audio(self, samples: Float32) -> None:
        """Pass a copy of samples on."""
        self._put(samples.copy())

    def frame(self, frame: Frame) -> None:
        """Pass a copy of a frame on; waits if the backlog is full."""
        if self._news.poll():
            self._raise_news()
        weights = None if frame.blendshapes is None else frame.blendshapes.copy()
        self._put((frame.index, frame.time_s, frame.vertices.copy(), weights))

    def close(self) -> None:
        """Wait for what is under way, then close. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        try:
            self._put(None)
            self._raise_news()
        finally:
            self._items.cancel_join_thread()
            self._process.join()

    def _put(self, item: Item) -> None:
        while True:
            try:
                self._items.put(item, timeout=PATIENCE_S)
            except queue.Full:
                if not self._process.is_alive():
                    self._raise_news()
            else:
                return

    def _raise_news(self) -> None:
        """Wait for the worker's next message, and raise it if it is an error."""
        try:
            failure: StreamTalkError | None = self._news.recv()
        except EOFError as error:
            self._closed = True
            raise OutputError("The process that draws ended unexpectedly; is the memory full?") from error
        if failure is not None:
            raise failure


def _work(open_output: Callable[[], Output], items: Any, news: Connection) -> None:
    """Do the worker's part. It sends None or an error after opening, at its first failure, and after closing."""
    for number in SIGNALS:
        signal.signal(
            number, signal.SIG_IGN
        )  # Ctrl-C reaches the whole group; the parent says when it is over
    with suppress(OSError, AttributeError):
        os.nice(NICENESS)
    try:
        output = open_output()
    except StreamTalkError as error:
        news.send(error)
        return
    news.send(None)
    failure: StreamTalkError | None = None
    while (item := items.get()) is not None:
        if failure is None:
            failure = _attempt(_task(output, item))
            if failure is not None:
                news.send(failure)
    closing = _attempt(output.close)
    news.send(closing if failure is None else None)


def _task(output: Output, item: tuple[int, float, Float32, Float32 | None] | Float32) -> Callable[[], None]:
    if not isinstance(item, tuple):
        return lambda: output.audio(item)
    index, time_s, vertices, weights = item
    return lambda: output.frame(
        Frame(index, time_s, vertices, None if weights is None else lambda _: weights)
    )


def _attempt(task: Callable[[], None]) -> StreamTalkError | None:
    try:
        task()
    except StreamTalkError as error:
        return error
    return None
