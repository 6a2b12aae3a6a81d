"""From counts to milliseconds: a roofline for each kernel, on devices that are known by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.budget_count import Count

DEVICES = Path(__file__).with_name("devices.json")
MEMORY_SHARE = 0.75
"""Of the published bandwidth that a kernel gets. An assumption."""
COMPUTE_SHARE = 0.4
"""Of the published peak that products of these sizes get: few rows, one wave of blocks. An assumption."""
RATES = (25, 30, 60)
SAFE = 2.0
"""Headroom below which a prediction of this kind is no promise."""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Peaks as published. `launch_us` is the cost of a kernel of a captured CUDA graph beside its work (start,
    drain, dependency), `host_us` that of a launch for the caller (Python, copies to and from the device, waiting);
    both are assumptions.
    """

    name: str
    source: str
    sms: int
    clock_ghz: float
    fp16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    launch_us: float
    host_us: float
    fp32_clock_ghz: float | None = None

    @property
    def roof(self) -> Roof:
        """The expected share of the published peaks."""
        return Roof(
            COMPUTE_SHARE * 1e12 * self.fp16_tflops,
            COMPUTE_SHARE * 1e12 * self.fp32_tflops,
            COMPUTE_SHARE * 1e12 * self.fp32_tflops,
            MEMORY_SHARE * 1e9 * self.memory_gb_s,
            1e-6 * self.launch_us,
        )


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of `devices.json`."""

    note: str
    sources: dict[str, str]
    devices: tuple[Device, ...]


def catalogue() -> Catalogue:
    """The devices that predictions are made for."""
    return msgspec.json.decode(DEVICES.read_bytes(), type=Catalogue)


@dataclass(frozen=True)
class Roof:
    """Speed of a machine: operations a second in float16 and float32 products and in all else, bytes a second,
    and seconds that a kernel costs beside them.
    """

    half_flops: float
    flops: float
    ops: float
    bytes: float
    launch_s: float

    def milliseconds(self, count: Count) -> float:
        """The time of one run of a graph: kernels one after another, each as long as the longer of its arithmetic
        and its memory traffic.
        """
        seconds = 0.0
        for k in count.kernels:
            arithmetic = 2 * k.macs / (self.half_flops if k.half else self.flops) + k.ops / self.ops
            traffic = (k.weight_bytes + k.read_bytes + k.write_bytes) / self.bytes
            seconds += max(arithmetic, traffic) + self.launch_s
        return 1e3 * seconds


@dataclass(frozen=True)
class Setup:
    """Settings of an export that the cost depends on; `batch` is its number of rows."""

    hop: int
    history: int
    decode_window: int
    batch: int

    @property
    def label(self) -> str:
        """For people."""
        return (
            f"hop {self.hop}, history {self.history}, decode window {self.decode_window}, batch {self.batch}"
        )


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of a hop of all rows on one device in one setup."""

    device: str
    setup: Setup
    hop_ms: float

    @property
    def frame_ms(self) -> float:
        """A frame's share of a hop."""
        return self.hop_ms / self.setup.hop

    def headroom(self, fps: int) -> float:
        """How many times a hop fits into the time that its frames last."""
        return 1e3 / fps / self.frame_ms


def predict(device: Device, setup: Setup, hop: Count) -> Prediction:
    """Predict what `device` needs for the hop graph that was counted in this setup."""
    return Prediction(device.name, setup, device.roof.milliseconds(hop) + device.host_us / 1e3)
