"""What a backend is: the contract between a stream and whatever runs the graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from streamtalk.manifest import Manifest, Precision

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LaneState:
    """A lane's model state on the host, in the graphs' own shapes without the batch axis.

    `features` [hop, A] of the hop in progress, `kv_cache` [layers, 2, H, W, E/H] as a shift register with
    the newest slot last, `latents` [D, C] right-aligned.
    """

    features: Float32
    kv_cache: Float32
    latents: Float32


class Lane(Protocol):
    """One voice in a backend: preallocated host inputs and outputs, and state that stays where the backend
    runs.

    The caller writes `pcm` and calls `encode` once a hop, then for each frame writes `noise`, calls
    `frame`, and reads `vertices()`. State is double-buffered; which side is current follows from the
    frame's parity alone, so a frame that was interrupted can be run again.
    """

    pcm: Float32
    """[window_samples], raw: the input of `encode`."""
    noise: Float32
    """[C]: the input of `frame`."""

    def reset(self) -> None:
        """Return to the state before frame 0: an empty cache and the start latent."""

    def encode(self) -> None:
        """Run the audio encoder on `pcm`; its features serve the frames of one hop. May return before it is
        done.
        """

    def frame(self, index: int) -> None:
        """Start frame `index`, which follows the last one. May return before it is done."""

    def vertices(self) -> Float32:
        """Wait for the newest frame: [V, 3], read-only, in a buffer that later frames reuse."""

    def state(self, index: int) -> LaneState:
        """A copy of the state before frame `index`, the next one."""

    def restore(self, index: int, state: LaneState) -> None:
        """Take the state before frame `index` from a copy."""

    def close(self) -> None:
        """Give the buffers back."""


class Backend(Protocol):
    """Loaded graphs, shared by any number of lanes and never changed."""

    @property
    def name(self) -> str:
        """The name it is asked for by, such as `onnxruntime-cpu`."""

    @property
    def description(self) -> str:
        """What actually runs, for people: library version, device, threads."""

    @property
    def fingerprint(self) -> str | None:
        """All that a result depends on: device, driver, library, files, flags. A backend that has one must first
        reproduce the model's probe; the reference on the CPU has none.
        """

    @property
    def precision(self) -> Precision:
        """Of the graphs that run."""

    def lane(self, style: Float32, template: Float32, start_latent: Float32) -> Lane:
        """Allocate everything that one voice needs. `style` [E], `template` [V, 3], `start_latent` [C]."""


@dataclass(frozen=True)
class Counters:
    """The frame graph's integer inputs, counted before the frame."""

    position: int
    valid_frames: int
    valid_latents: int


def counters(index: int, manifest: Manifest) -> Counters:
    """The counters of frame `index`: the start latent counts as a latent, not as a cached frame."""
    return Counters(
        position=index % manifest.period,
        valid_frames=min(index, manifest.history),
        valid_latents=min(index + 1, manifest.decode_window),
    )
