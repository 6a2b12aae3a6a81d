"""The process that draws: order, errors from anywhere in it, and its death."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import sleep

import numpy as np
import numpy.typing as npt
import pytest

from streamtalk import Frame, OutputError
from streamtalk.app.output.background import Background


class Diary:
    """Writes down what it is given; fails where it is told to."""

    def __init__(self, path: Path, fails: str = "") -> None:
        self._path = path
        self._fails = fails
        self._note("open")

    def audio(self, samples: npt.NDArray[np.float32]) -> None:
        self._note(f"audio {samples[0]:.0f}")

    def frame(self, frame: Frame) -> None:
        assert frame.blendshapes is not None
        assert frame.blendshapes[0] == frame.vertices[0, 0]
        self._note(f"frame {frame.index} {frame.vertices[0, 0]:.0f}")

    def close(self) -> None:
        self._note("close")

    def _note(self, what: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{what}\n")
        if what == "frame 2 2" and self._fails == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == self._fails:
            raise OutputError(f"failed at {what}")


def play(background: Background) -> None:
    buffer = np.zeros((1, 3), np.float32)
    for i in range(4):
        buffer[:] = i  # reused, as a stream's is
        background.audio(buffer[0])
        background.frame(Frame(i, i / 30, buffer, lambda vertices: vertices[0]))
        buffer[:] = 99


EVERYTHING = ["open", *(line for i in range(4) for line in (f"audio {i}", f"frame {i} {i}")), "close"]


def test_it_passes_everything_on_in_order(tmp_path: Path) -> None:
    background = Background(partial(Diary, tmp_path / "diary"))
    play(background)
    background.close()
    background.close()
    assert (tmp_path / "diary").read_text().splitlines() == EVERYTHING


def test_an_error_at_opening_is_raised_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="failed at open"):
        Background(partial(Diary, tmp_path / "diary", "open"))


@pytest.mark.parametrize("wait_s", [0, 0.5])  # raised at close, or before
@pytest.mark.parametrize("fails", ["audio 0", "frame 2 2", "close"])
def test_an_error_comes_once_and_the_rest_is_closed(tmp_path: Path, fails: str, wait_s: float) -> None:
    background = Background(partial(Diary, tmp_path / "diary", fails))
    errors = []
    calls: list[Callable[[], None]] = [
        partial(play, background),
        partial(sleep, wait_s),
        partial(play, background),
    ]
    for call in (*calls, background.close, background.close):
        try:
            call()
        except OutputError as error:
            errors.append(str(error))
    assert errors == [f"failed at {fails}"]
    lines = (tmp_path / "diary").read_text().splitlines()
    assert lines.count("close") == 1
    assert lines[-1] == "close"
    assert fails == "close" or lines[-2] == fails  # nothing more was asked of it


def test_its_death_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    background = Background(partial(Diary, tmp_path / "diary", "killed"))
    with pytest.raises(OutputError, match="ended unexpectedly"):
        for _ in range(100):
            play(background)
            sleep(0.05)
        background.close()
    background.close()
