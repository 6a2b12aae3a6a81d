"""A line on stderr while something takes long: on a terminal only, after a second, and gone when it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic

from streamtalk.status import say

EVERY_S = 1.0


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show `text` and the seconds that have passed, from the first on, until the block ends."""
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
