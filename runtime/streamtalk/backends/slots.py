"""Many voices in one launch: the contract between a batch and a backend that can run one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from streamtalk.backends.protocol import Float32, LaneState

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.intp]


class Slots(Protocol):
    """The B slots of a graph's batch: preallocated host inputs and outputs, and state that stays where the
    backend runs.

    State is double-buffered. Turn `t` reads side `t % 2` and writes ALL slots to the other, those that are not
    active unchanged; so the current side is the same for every slot, and a turn that was interrupted can be run
    again. No slot's output depends on what another holds.
    """

    pcm: Float32
    """[B, window_samples], raw: the input of `encode`. Rows that are not due are whatever they were."""
    noise: Float32
    """[B, C]: the input of `frame`."""

    def start(self, slot: int, style: Float32, template: Float32) -> None:
        """Give a slot to a voice, and `reset` it. `style` [E], `template` [V, 3]."""

    def reset(self, slot: int) -> None:
        """Return one slot to the state before frame 0, on both sides: an empty cache and the start latent."""

    def encode(self, due: Mask) -> None:
        """Run the audio encoder on `pcm` of the slots in `due` [B], as often as their number asks for; the others keep
        their features. May return before it is done.
        """

    def frame(self, turn: int, frames: Counts, active: Mask) -> None:
        """Start turn `turn`: frame `frames[b]` of every slot b in `active`; both [B]. May return before it is
        done.
        """

    def vertices(self) -> Float32:
        """Wait for the newest turn: [B, V, 3], read-only, in a buffer that later turns reuse. Rows of slots that
        were not active mean nothing.
        """

    def state(self, slot: int, turn: int) -> LaneState:
        """A copy of a slot's state before turn `turn`."""

    def restore(self, slot: int, turn: int, state: LaneState) -> None:
        """Take a slot's state before turn `turn` from a copy, of any slot or lane."""

    def close(self) -> None:
        """Give the buffers back."""


@runtime_checkable
class SlotBackend(Protocol):
    """A backend that can give each voice a slot of the batch."""

    def slots(self, start_latent: Float32) -> Slots:
        """Allocate all slots of the graphs' batch, none active. `start_latent` [C]."""


def stretches(slots: Numbers) -> Iterator[tuple[int, int, int]]:
    """Every stretch of consecutive numbers in `slots`, which ascend: its place there, its first number, its length."""
    places = np.flatnonzero(np.diff(slots, prepend=-2) != 1)
    lengths = np.diff(places, append=len(slots))
    return zip(places.tolist(), slots[places].tolist(), lengths.tolist(), strict=True)


def encoder_runs(due: Mask, rows: int) -> Iterator[list[tuple[int, int, int]]]:
    """What goes into each run of an encoder of so many `rows`, so that all slots in `due` [B] are heard: stretches of
    slots as their first slot, its row, and their length.

    In an encoder of B rows every slot has its own, so that no bit of what it gets hangs on who else is due. In a
    smaller one slots close up, and their row may change how sums are rounded.
    """
    slots = np.flatnonzero(due)
    for first in range(0, len(slots), rows):
        portion = slots[first : first + rows]
        own = rows == len(due)
        yield [(slot, slot if own else place, count) for place, slot, count in stretches(portion)]
