"""The machine's own speed: the same model in another process, which streams the first minute and the last.

`python -m benchmarks.soak_control ENGINE BACKEND THREADS` is started by the soak and speaks through pipes. It takes
its hops in turns with the stream under test, so that the machine's other work affects both alike. The hours in between
affect the stream under test alone.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import IO, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from streamtalk import Frame, StreamTalkError, Talker

Number = TypeVar("Number", bound=np.generic)

ROOT = Path(__file__).parents[1]
RESET = -1


class Control(Protocol):
    """A second stream beside the one under test."""

    def push(self, pcm: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Stream audio [n]; milliseconds of each hop that it made."""

    def reset(self) -> None:
        """Become as new."""


def timed(frames: Iterator[Frame], now: Callable[[], float] = perf_counter) -> Iterator[tuple[Frame, float]]:
    """Yield each frame with the milliseconds that it took: a hop's first frame takes all of the hop's."""
    while True:
        began = now()
        frame = next(frames, None)
        if frame is None:
            return
        yield frame, (now() - began) * 1e3


def begins_hop(frame: Frame, hop: int) -> bool:
    """Whether a frame is its hop's first."""
    return frame.index % hop == 0


class ControlProcess:
    """A `Control` in a process of its own; a context manager."""

    def __init__(self, engine: Path, backend: str, threads: int | None) -> None:
        arguments = (str(engine.resolve()), backend, str(threads or 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak_control", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._answer()

    def push(self, pcm: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Stream audio [n]; milliseconds of each hop that it made. Raises StreamTalkError if it is gone."""
        return self._ask(len(pcm), pcm)

    def reset(self) -> None:
        """Become as new. Raises StreamTalkError if it is gone."""
        self._ask(RESET)

    def __enter__(self) -> ControlProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, word: int, pcm: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float64]:
        try:
            self._to.write(np.int32(word).tobytes() + (b"" if pcm is None else pcm.tobytes()))
            self._to.flush()
        except OSError:
            pass  # `_answer` finds that nobody is there
        return self._answer()

    def _answer(self) -> npt.NDArray[np.float64]:
        try:
            return _read(self._from, np.float64, int(_read(self._from, np.int32, 1)[0]))
        except EOFError as error:
            raise StreamTalkError("The control process ended; without it: --no-control.") from error


def serve(talker: Talker, source: IO[bytes], target: IO[bytes]) -> None:
    """Answer until `source` ends: an int32 n and n samples with the latencies made, `RESET` with none."""
    none, hop = np.zeros(0), talker.manifest.hop

    def answer(latencies: npt.NDArray[np.float64]) -> None:
        target.write(np.int32(len(latencies)).tobytes() + latencies.tobytes())
        target.flush()

    with talker.open() as stream:
        answer(none)
        while True:
            try:
                word = int(_read(source, np.int32, 1)[0])
                if word == RESET:
                    stream.reset()
                    answer(none)
                    continue
                pcm = _read(source, np.float32, word)
            except EOFError:
                return
            made = timed(stream.push(pcm))
            answer(np.array([milliseconds for frame, milliseconds in made if begins_hop(frame, hop)]))


def _read(source: IO[bytes], dtype: type[Number], n: int) -> npt.NDArray[Number]:
    wanted = n * np.dtype(dtype).itemsize
    data = source.read(wanted)
    if len(data) < wanted:
        raise EOFError
    return np.frombuffer(data, dtype)


if __name__ == "__main__":
    engine, backend, threads = sys.argv[1:]
    serve(Talker.load(engine, backend, threads=int(threads) or None), sys.stdin.buffer, sys.stdout.buffer)
