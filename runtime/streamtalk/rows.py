"""Rows: streams that one launch of the hop graph serves, and the contract between them and a backend.

A hop graph has B rows. Each holds one stream's state: its cache of keys and values, and its last latents. A stream by
itself is one row, by a graph of one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streamtalk.errors import ModelError
from streamtalk.model import Graph, Manifest, Precision, Tensor, graph_key, hop_name

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Tensors = dict[str, Tensor]

STATE = {"kv_cache": "kv_cache_out", "latents": "latents_out"}
"""Inputs of the hop graph that are a row's state, and the outputs that are its next state."""


@dataclass(frozen=True)
class RowState:
    """State of one row before a hop, on the host.

    `kv_cache` [layers, 2, H, W, E/H] float32 is a shift register with the newest frame last; `latents` [D, C] float32
    are right-aligned.
    """

    kv_cache: Float32
    latents: Float32


class Rows(Protocol):
    """B rows of a loaded hop graph: preallocated inputs, and state that stays where the backend runs.

    The caller writes `pcm` and `noise` of the rows that take part, calls `launch`, reads `vertices`, and then
    `advance`s the rows whose frames it has used. State is double-buffered: until `advance` the state before the hop is
    the current one, so a launch that was interrupted can be made again. No row's output depends on another row.
    """

    inputs: Mapping[str, Array]
    """`pcm` [B, window_samples] and `noise` [B, hop, C], float32, in host memory."""
    frames: npt.NDArray[np.int64]
    """First frame of each row's next hop, [B]. Read-only to the caller."""

    def start(self, row: int, style: Float32, template: Float32) -> None:
        """Give a row to a stream and `reset` it. `style` [E], `template` [V, 3]."""

    def reset(self, row: int) -> None:
        """Put a row into the state before frame 0: an empty cache and the start latent."""

    def launch(self, active: Mask) -> None:
        """Start a hop of the rows in `active` [B]. May return before it is done."""

    def vertices(self) -> Float32:
        """Wait for the newest launch: [B, hop, V, 3], read-only, in a buffer that later launches reuse.

        Rows that were not active mean nothing.
        """

    def advance(self, active: Mask) -> None:
        """Make the state that the newest launch left the current one; `active` as it was given to `launch`."""

    def state(self, row: int) -> RowState:
        """Copy the current state of a row."""

    def restore(self, row: int, frame: int, state: RowState) -> None:
        """Set the current state of a row, and the first frame of its next hop."""

    def close(self) -> None:
        """Give all memory back."""


class Backend(Protocol):
    """Loaded hop graphs, shared by any number of rows and never changed."""

    @property
    def name(self) -> str:
        """Name that it is asked for by, such as `onnxruntime-cpu`."""

    @property
    def description(self) -> str:
        """What runs, for people: library version, precision, device or threads."""

    @property
    def fingerprint(self) -> str | None:
        """Everything that a result on this device depends on: device, driver, library, files, flags.

        A backend that has one must reproduce the model's probe first. The reference on the CPU has none.
        """

    @property
    def precision(self) -> Precision:
        """Precision of the graphs that run."""

    def rows(self, count: int, start_latent: Float32) -> Rows:
        """Allocate rows of the hop graph of `count` rows, none active. `start_latent` [C].

        Raises BackendError where that graph cannot be loaded.
        """

    def on_device(self) -> Backend:
        """The same backend with vertices left where they are made: rows download nothing, and `Rows.vertices` is
        [B, hop, 0, 3] at once. Raises BackendError on a CPU.
        """


class Counts:
    """Where each row is in its stream, and how many launches were made.

    All numbers lie in one array that one addition advances: no interrupt can part a row's frame from its state.
    """

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self._manifest = manifest
        self._numbers = np.zeros(rows + 1, np.int64)
        self._step = np.zeros(rows + 1, np.int64)
        self._step[-1] = 1
        self.frames: npt.NDArray[np.int64] = self._numbers[:-1]

    @property
    def side(self) -> int:
        """Side of the double-buffered state that is current: 0 or 1."""
        return int(self._numbers[-1]) % 2

    def write(self, position: Array, valid_frames: Array, valid_latents: Array) -> None:
        """Write the hop graph's counters [B] for the rows' next hops."""
        self._manifest.write_counters(self.frames, position, valid_frames, valid_latents)

    def advance(self, active: Mask) -> None:
        """Count a launch, and a hop of each row in `active` [B]."""
        np.multiply(active, self._manifest.hop, out=self._step[:-1])
        np.add(self._numbers, self._step, out=self._numbers)


def hop_tensors(manifest: Manifest, rows: int) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of the hop graph of so many rows, by name, from the manifest's sizes."""
    m, B = manifest, rows
    C, E = m.latent_width, m.condition_width
    state = (
        ("kv_cache", "float32", (B, m.layers, 2, m.heads, m.history, E // m.heads)),
        ("latents", "float32", (B, m.decode_window, C)),
    )
    inputs = _tensors(
        ("pcm", "float32", (B, m.window_samples)),
        ("noise", "float32", (B, m.hop, C)),
        ("style", "float32", (B, E)),
        ("template", "float32", (B, 3 * m.n_vertices)),
        ("position", "int64", (B,)),
        ("valid_frames", "int64", (B,)),
        ("valid_latents", "int64", (B,)),
        *state,
        ("active", "bool", (B,)),
    )
    outputs = _tensors(
        ("vertices", "float32", (B, m.hop, m.n_vertices, 3)),
        *((STATE[name], dtype, shape) for name, dtype, shape in state),
    )
    return inputs, outputs


def check_hop_graphs(manifest: Manifest) -> None:
    """Compare the hop graphs that the manifest declares with its own sizes. Raises ModelError."""
    if 1 not in manifest.row_counts:
        raise ModelError(
            f"The manifest has no graph `{hop_name(1)}`; it lists {sorted(manifest.graphs)}. Export again."
        )
    for rows in manifest.row_counts:
        key = graph_key(hop_name(rows), "fp32")
        if key in manifest.graphs:
            compare(f"The manifest's `{key}`", hop_tensors(manifest, rows), declared(manifest.graphs[key]))


def declared(graph: Graph) -> tuple[Tensors, Tensors]:
    """Inputs and outputs that the manifest declares for a graph, by name."""
    return {t.name: t for t in graph.inputs}, {t.name: t for t in graph.outputs}


def compare(subject: str, wanted: tuple[Tensors, Tensors], found: tuple[Tensors, Tensors]) -> None:
    """Raise ModelError unless names, dtypes and shapes of all inputs and outputs agree."""
    for side, want, got in zip(("inputs", "outputs"), wanted, found, strict=True):
        if want.keys() != got.keys():
            raise ModelError(
                f"{subject}: expected the {side} {sorted(want)}, got {sorted(got)}. "
                "Export again with this version."
            )
        for name, tensor in want.items():
            if tensor != got[name]:
                raise ModelError(
                    f"{subject}: expected `{name}` as {_text(tensor)}, got {_text(got[name])}. "
                    "Export again with this version."
                )


def _tensors(*rows: tuple[str, str, tuple[int, ...]]) -> Tensors:
    return {name: Tensor(name, dtype, shape) for name, dtype, shape in rows}  # type: ignore[arg-type]


def _text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
