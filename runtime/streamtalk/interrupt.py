"""Ctrl-C as a request: what is under way is finished, what waits is woken."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ENDS = (*SIGNALS, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
"""What ends a program that builds something: those, and a terminal that goes away."""


class Interrupt:
    """While entered, SIGINT and SIGTERM set `requested`, and raise KeyboardInterrupt only within `waiting()`.

    So no frame is torn between its computation and its outputs. For the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A stretch of code that may be left at any point."""
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
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that what is half built is cleared away. Gives a function
    to be called now and then, which raises it again: Python drops what is raised within a destructor.
    """
    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    with _ends_to(end):
        yield check


@contextmanager
def signals_after() -> Iterator[None]:
    """Signals wait for the end: what a handler raises is lost where a library calls Python and drops its exceptions."""
    came: list[int] = []
    try:
        with _ends_to(lambda number, _: came.append(number)):
            yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def _ends_to(handler: Any) -> Iterator[None]:
    """Let `handler` have `ENDS`, in the main thread: no other receives any."""
    numbers = ENDS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)
