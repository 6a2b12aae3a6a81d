"""Messages on stderr, and a line there while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import monotonic

EVERY_S = 1.0


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show `text` and the seconds that have passed until the block ends: on a terminal only, and after the first."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    done, began, width = Event(), monotonic(), 0

    def show() -> None:
        nonlocal width
        while not done.wait(EVERY_S):
            line = f"{text}: {monotonic() - began:.0f} s"
            width = len(line)
            say("\r" + line, end="")

    thread = Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if width:
            say("\r" + " " * width + "\r", end="")


def say(text: str, end: str = "\n") -> None:
    """Print to stderr, which may be gone: a status is not worth failing for."""
    if sys.stderr is None:  # `print` would take stdout instead
        return
    with suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)
