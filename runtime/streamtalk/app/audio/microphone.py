"""A microphone that may be unplugged: the face goes on in silence until it is back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk.app.audio.devices import find, input_format
from streamtalk.app.audio.resample import Resampler
from streamtalk.app.audio.sources import PACED_BLOCK_S, Block, SourceEvents
from streamtalk.errors import DeviceError

QUEUE_S = 5.0
"""What may wait while frames are late; beyond it the newest audio is dropped and counted."""
GONE_S = 1.0
"""A device that is silent for this long in blocks, not in sound, is gone. Far above any driver's jitter."""
SILENT_BLOCK_S = 0.020
RETRY_S = 2.0


@dataclass(frozen=True)
class _Recorded:
    """[n, channels] and what makes the model's rate of it: after a reconnect the device's may be another."""

    samples: npt.NDArray[np.float32]
    arrival_s: float
    resampler: Resampler


class Microphone:
    """A `Source` that reads a device by index or (part of) name; None is the default.

    Opened at construction. `portaudio` is the module sounddevice. Raises DeviceError, AudioError.
    """

    live = True

    def __init__(self, portaudio: Any, device: int | str | None, rate: int) -> None:
        self._sd = portaudio
        self._wanted = device
        self._rate = rate
        self._queue: queue.Queue[_Recorded] = queue.Queue(maxsize=round(QUEUE_S / PACED_BLOCK_S))
        self._overflows = 0
        self._reconnects = 0
        self._closing = threading.Event()
        self._mender: threading.Thread | None = None
        self._alive_s = monotonic()
        self.label = find(portaudio, device).name
        self._stream = self._open()

    def blocks(self) -> Iterator[Block]:
        """What the device records; while it is gone, silence at the same pace."""
        heard_until = monotonic()
        patience = GONE_S
        while not self._closing.is_set():
            try:
                recorded = self._queue.get(timeout=patience)
            except queue.Empty:
                self._mend()
                patience = SILENT_BLOCK_S
                n = round((monotonic() - heard_until) * self._rate)
                heard_until += n / self._rate
                yield Block(np.zeros(n, np.float32), heard_until)
            else:
                patience = GONE_S
                self._alive_s = recorded.arrival_s
                heard_until = recorded.arrival_s
                yield Block(recorded.resampler.push(recorded.samples), recorded.arrival_s)

    def events(self) -> SourceEvents:
        """Overflows of the driver or of our queue, and devices found again."""
        return SourceEvents(self._overflows, self._reconnects)

    def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        if self._mender is not None:
            self._mender.join(2 * RETRY_S)
        self._stop()

    def _open(self) -> Any:
        device = find(self._sd, self._wanted)
        chosen = input_format(self._sd, device, self._rate)
        resampler = Resampler(chosen.rate, self._rate)

        def record(samples: Any, _n: int, _time: Any, status: Any) -> None:
            # PortAudio's thread, and its buffer: copy, count, leave.
            self._overflows += bool(status.input_overflow)
            try:
                self._queue.put_nowait(_Recorded(samples.copy(), monotonic(), resampler))
            except queue.Full:
                self._overflows += 1

        try:
            stream = self._sd.InputStream(
                device=device.index,
                samplerate=chosen.rate,
                channels=chosen.channels,
                dtype="float32",
                blocksize=round(chosen.rate * PACED_BLOCK_S),
                latency="low",
                callback=record,
            )
            stream.start()
        except self._sd.PortAudioError as error:
            raise DeviceError(
                f"{device.name} cannot be opened: {error}. Is another program using it?"
            ) from error
        self._alive_s = monotonic()
        return stream

    def _stop(self) -> None:
        with suppress(self._sd.PortAudioError):
            self._stream.abort()
            self._stream.close()

    def _mend(self) -> None:
        """Look for the device again in a thread of its own: PortAudio may block for as long as it likes."""
        if monotonic() - self._alive_s < GONE_S:
            return  # opened just now: it may take its time to begin
        if self._mender is None or not self._mender.is_alive():
            self._mender = threading.Thread(target=self._reopen, name="streamtalk-microphone", daemon=True)
            self._mender.start()

    def _reopen(self) -> None:
        self._stop()
        while not self._closing.is_set():
            try:
                # PortAudio lists devices when it starts and never again; sounddevice has no public restart.
                self._sd._terminate()
                self._sd._initialize()
                self._stream = self._open()
            except (DeviceError, self._sd.PortAudioError):
                self._closing.wait(RETRY_S)
            else:
                self._reconnects += 1
                return
