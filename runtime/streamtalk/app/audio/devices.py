"""Sound devices by PortAudio: listing them, and finding a format that one of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from streamtalk.errors import DeviceError, MissingDependencyError


@dataclass(frozen=True)
class InputDevice:
    """A device with at least one input channel."""

    index: int
    name: str
    host: str
    channels: int
    rate: int
    is_default: bool


@dataclass(frozen=True)
class InputFormat:
    """Rate and channel count that a device accepts."""

    rate: int
    channels: int


def portaudio() -> ModuleType:
    """The package sounddevice. Raises MissingDependencyError, which says what to install."""
    try:
        import sounddevice
    except ImportError as error:
        raise MissingDependencyError(
            "Sound devices need the package sounddevice: pip install sounddevice."
        ) from error
    except OSError as error:  # its C library
        raise MissingDependencyError(
            "Sound devices need the PortAudio library, which is not installed: "
            "sudo apt install libportaudio2 (Debian, Ubuntu, Jetson). "
            "Without a microphone use --wav FILE or --stdin."
        ) from error
    module: ModuleType = sounddevice
    return module


def input_devices(sd: Any) -> list[InputDevice]:
    """All inputs, in PortAudio's order."""
    hosts = sd.query_hostapis()
    default = sd.default.device[0]
    return [
        InputDevice(
            index=index,
            name=str(device["name"]),
            host=str(hosts[device["hostapi"]]["name"]),
            channels=int(device["max_input_channels"]),
            rate=int(device["default_samplerate"]),
            is_default=index == default,
        )
        for index, device in enumerate(sd.query_devices())
        if device["max_input_channels"] > 0
    ]


def listing(devices: list[InputDevice]) -> str:
    """A table for people; the default is starred."""
    if not devices:
        return "No sound input device. Plug a microphone in, or use --wav FILE or --stdin."
    return "\n".join(
        f"{'*' if device.is_default else ' '} {device.index:3d}  {device.name} ({device.host}), "
        f"{device.channels} in, {device.rate} Hz"
        for device in devices
    )


def find(sd: Any, wanted: int | str | None) -> InputDevice:
    """The input with that index, or that (part of a) name; None is the default. Raises DeviceError listing
    them.
    """
    devices = input_devices(sd)
    if not devices:
        raise DeviceError(listing(devices))
    if wanted is None:
        return next((device for device in devices if device.is_default), devices[0])
    if isinstance(wanted, int):
        found = [device for device in devices if device.index == wanted]
    else:
        exact = [device for device in devices if device.name == wanted]
        found = exact or [device for device in devices if wanted.lower() in device.name.lower()]
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} input devices match {wanted!r}" if found else f"No input device {wanted!r}"
    raise DeviceError(f"{problem}. There are:\n{listing(devices)}")


def input_format(sd: Any, device: InputDevice, rate: int) -> InputFormat:
    """The simplest format that the device takes: the model's own, else its own rate, else all its channels.

    Raises DeviceError, which quotes PortAudio.
    """
    wishes = [
        InputFormat(rate, 1),
        InputFormat(device.rate, 1),
        InputFormat(device.rate, min(2, device.channels)),
    ]
    wishes.append(InputFormat(device.rate, device.channels))
    for wish in wishes:
        try:
            sd.check_input_settings(
                device=device.index, channels=wish.channels, dtype="float32", samplerate=wish.rate
            )
        except (sd.PortAudioError, ValueError) as error:
            failure = error
        else:
            return wish
    raise DeviceError(
        f"{device.name} takes neither {rate} nor {device.rate} Hz: {failure}. Choose another device."
    )
