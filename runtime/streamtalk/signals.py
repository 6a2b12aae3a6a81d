"""Signals that end a program: Ctrl-C as a request, as an exception, or deferred."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ENDS = (*SIGNALS, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
"""Signals that end a program which builds something: those, and a closed terminal."""


class Interrupt:
    """A context in which SIGINT and SIGTERM set `requested`, and raise KeyboardInterrupt only within `waiting()`.

    So no frame is lost between its computation and its outputs. For the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark code that KeyboardInterrupt may leave at any point."""
        self._waiting = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if self._waiting:
            raise KeyboardInterrupt


@contextmanager
def ended_by_signals() -> Iterator[Callable[[], None]]:
    """Let SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that unfinished files are removed.

    Yields a function that raises it again, to be called between steps: Python drops what is raised in a destructor.
    """
    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    with _handled_by(end):
        yield check


@contextmanager
def signals_after() -> Iterator[None]:
    """Defer signals to the end of the block: a library that calls Python may drop what their handlers raise."""
    came: list[int] = []
    try:
        with _handled_by(lambda number, _: came.append(number)):
            yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    """Handle `ENDS` with `handler` in the main thread; other threads receive no signals."""
    numbers = ENDS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)
