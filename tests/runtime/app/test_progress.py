"""The line while something takes long."""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import pytest

from streamtalk.app import progress as module
from streamtalk.app.progress import progress


class Terminal(io.StringIO):
    """Says when something was written to it."""

    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live, self.written = live, threading.Event()

    def isatty(self) -> bool:
        return self.live

    def write(self, text: str) -> int:
        done = super().write(text)
        if "Loading" in text:
            self.written.set()
        return done


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.001)


def test_a_line_that_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(live=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(KeyError), progress("Loading"):
        assert terminal.written.wait(30)
        raise KeyError
    text = terminal.getvalue()
    assert text.startswith("\rLoading: 0 s")
    assert "\n" not in text
    assert text.endswith("\r            \r")


@pytest.mark.parametrize("stderr", [Terminal(live=False), None])
def test_nothing_where_nobody_looks(stderr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    before = threading.active_count()
    with progress("Loading"):
        assert threading.active_count() == before
    assert stderr is None or stderr.getvalue() == ""


def test_nothing_for_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 600.0)
    terminal = Terminal(live=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("Loading"):
        pass
    assert terminal.getvalue() == ""
