"""Signals that end what is under way: at once, or when a library has returned."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from streamtalk.signals import ended_by_signals, signals_after

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_signal_ends_as_ctrl_c_does(number: int) -> None:
    before = [signal.getsignal(n) for n in NUMBERS]
    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")
    assert [signal.getsignal(n) for n in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_waits_for_a_library_to_return(number: int) -> None:
    ended = []
    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        with signals_after():
            os.kill(os.getpid(), number)
            ended.append("the library")
        ended.append("what follows it")
    assert ended == ["the library"]


def test_what_a_destructor_swallowed_is_raised_at_the_next_check(monkeypatch: pytest.MonkeyPatch) -> None:
    swallowed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)

    class Deaf:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    ended = []
    with pytest.raises(KeyboardInterrupt), ended_by_signals() as check:
        check()
        Deaf()
        ended.append("the destructor")
        check()
        ended.append("the next step")
    assert ended == ["the destructor"]
    assert len(swallowed) == 1


def test_without_a_signal_nothing_is_raised() -> None:
    with ended_by_signals(), signals_after():
        pass


def test_another_thread_receives_none() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with ended_by_signals(), signals_after():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
