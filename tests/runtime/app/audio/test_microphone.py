"""The microphone against a PortAudio made of Python: formats, unplugging, overflow, what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streamtalk import DeviceError
from streamtalk.app.audio import microphone
from streamtalk.app.audio.devices import find, input_devices, listing
from streamtalk.app.audio.microphone import Microphone
from streamtalk.app.audio.sources import Block

PATIENCE_S = 5.0


class PortAudioError(Exception):
    pass


@dataclass
class FakeStream:
    sd: FakePortAudio
    samplerate: int
    channels: int
    callback: Callable[..., None]
    blocksize: int
    started: bool = False

    def start(self) -> None:
        if self.sd.busy:
            raise PortAudioError("Device unavailable")
        self.started = True
        self.sd.streams.append(self)

    def abort(self) -> None:
        self.started = False

    def close(self) -> None:
        if self in self.sd.streams:
            self.sd.streams.remove(self)

    def record(self, value: float, overflow: bool = False) -> None:
        block = np.full((self.blocksize, self.channels), value, np.float32)
        self.callback(block, self.blocksize, None, SimpleNamespace(input_overflow=overflow))
        block[:] = 99  # PortAudio reuses its buffer


@dataclass
class FakePortAudio:
    """Stands in for the module sounddevice: what it offers and what it was asked."""

    rates: tuple[int, ...] = (16000,)
    names: list[str] = field(default_factory=lambda: ["Speakers", "USB Mic", "Webcam Mic"])
    streams: list[FakeStream] = field(default_factory=list)
    busy: bool = False
    restarts: int = 0
    PortAudioError: type[Exception] = PortAudioError
    default: Any = field(default_factory=lambda: SimpleNamespace(device=[1, 0]))

    def query_hostapis(self) -> list[dict[str, str]]:
        return [{"name": "ALSA"}]

    def query_devices(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "hostapi": 0,
                "max_input_channels": 0 if name == "Speakers" else 2,
                "default_samplerate": float(self.rates[0]),
            }
            for name in self.names
        ]

    def check_input_settings(self, device: int, channels: int, dtype: str, samplerate: int) -> None:
        assert (device, dtype) == (self.names.index("USB Mic"), "float32")
        if samplerate not in self.rates:
            raise PortAudioError("Invalid sample rate")
        if samplerate != 16000 and channels != 2:
            raise PortAudioError("Invalid number of channels")

    def InputStream(self, **options: Any) -> FakeStream:  # noqa: N802 - its name there
        return FakeStream(
            self, options["samplerate"], options["channels"], options["callback"], options["blocksize"]
        )

    def _terminate(self) -> None:
        self.restarts += 1

    def _initialize(self) -> None:
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microphone, "GONE_S", 0.05)
    monkeypatch.setattr(microphone, "RETRY_S", 0.02)


def until(blocks: Iterator[Block], wanted: Callable[[Block], bool]) -> Block:
    end = monotonic() + PATIENCE_S
    for block in blocks:
        if wanted(block):
            return block
        assert monotonic() < end, "the block never came"
    raise AssertionError("the blocks ended")


def test_what_is_recorded_arrives_copied() -> None:
    sd = FakePortAudio()
    mic = Microphone(sd, None, 16000)
    assert mic.label == "USB Mic"
    assert (sd.streams[0].samplerate, sd.streams[0].channels, sd.streams[0].blocksize) == (16000, 1, 160)
    blocks = mic.blocks()
    for value in (0.1, 0.2):
        before = monotonic()
        sd.streams[0].record(value)
        block = next(blocks)
        np.testing.assert_array_equal(block.samples, np.full(160, value, np.float32))
        assert block.arrival_s is not None
        assert before <= block.arrival_s <= monotonic()
    mic.close()
    assert sd.streams == []
    assert list(blocks) == []


def test_a_device_of_another_rate_is_resampled() -> None:
    sd = FakePortAudio(rates=(48000,))
    mic = Microphone(sd, "usb", 16000)
    assert (sd.streams[0].samplerate, sd.streams[0].channels) == (48000, 2)
    blocks = mic.blocks()
    for _ in range(100):
        sd.streams[0].record(0.5)
    heard = np.concatenate([next(blocks).samples for _ in range(100)])
    assert len(heard) == pytest.approx(16000, abs=400)
    assert heard[4000:12000] == pytest.approx(0.5, abs=1e-3)
    mic.close()


@pytest.mark.usefixtures("quick")
def test_unplugged_it_goes_on_in_silence_and_comes_back() -> None:
    sd = FakePortAudio()
    mic = Microphone(sd, "USB Mic", 16000)
    blocks = mic.blocks()
    sd.streams[0].record(0.3)
    assert next(blocks).samples.max() == pytest.approx(0.3)
    sd.names.remove("USB Mic")
    began, silence = monotonic(), 0
    while monotonic() - began < 0.5:
        block = next(blocks)
        assert not block.samples.any()
        silence += block.samples.size
    assert silence / 16000 == pytest.approx(monotonic() - began, abs=0.1)  # at the pace of time
    assert sd.restarts > 2
    assert mic.events().reconnects == 0

    sd.names.append("USB Mic")  # at another index now
    until(blocks, lambda _: bool(sd.streams))
    sd.streams[0].record(0.7)
    assert until(blocks, lambda block: bool(block.samples.any())).samples.max() == pytest.approx(0.7)
    assert mic.events().reconnects == 1
    mic.close()


def test_overflows_are_counted_and_bounded() -> None:
    sd = FakePortAudio()
    mic = Microphone(sd, None, 16000)
    sd.streams[0].record(0.1, overflow=True)
    assert mic.events().overflows == 1
    for _ in range(600):  # 6 s that nobody reads
        sd.streams[0].record(0.1)
    assert mic.events().overflows == 1 + 601 - 500
    mic.close()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (7, "No input device 7"),
        (0, "No input device 0"),
        ("radio", "'radio'"),
        ("mic", "2 input devices match"),
    ],
)
def test_an_unknown_device_is_told_what_there_is(wanted: int | str, message: str) -> None:
    with pytest.raises(DeviceError, match=message) as caught:
        Microphone(FakePortAudio(), wanted, 16000)
    assert "USB Mic (ALSA), 2 in, 16000 Hz" in str(caught.value)


def test_no_device_a_busy_one_and_an_impossible_one() -> None:
    with pytest.raises(DeviceError, match="No sound input device"):
        Microphone(FakePortAudio(names=["Speakers"]), None, 16000)
    with pytest.raises(DeviceError, match="USB Mic cannot be opened: Device unavailable"):
        Microphone(FakePortAudio(busy=True), None, 16000)
    with pytest.raises(DeviceError, match="takes neither"):
        sd = FakePortAudio()
        sd.check_input_settings = refuse  # type: ignore[assignment, method-assign]
        Microphone(sd, None, 16000)


def refuse(**_: Any) -> None:
    raise PortAudioError("Invalid everything")


def test_the_list_stars_the_default() -> None:
    text = listing(input_devices(FakePortAudio()))
    assert text.splitlines()[0].startswith("*   1  USB Mic")
    assert "Speakers" not in text
    assert find(FakePortAudio(), 2).name == "Webcam Mic"
