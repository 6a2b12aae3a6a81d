"""Runs of ours that are timed: hops of a stream, the runtime's own part of them, and single graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from benchmarks.latency_rows import PARTS
from benchmarks.latency_subject import SEED, speech
from streamtalk import Talker
from streamtalk.model import Manifest
from streamtalk.rows import Float32, Mask, Rows

WARM_UP_HOPS = 8
Seconds = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


def hop_times(talker: Talker, frames: int) -> Seconds:
    """Seconds of each hop of a stream of so many `frames` after warm-up, from the push of its last audio to its
    vertices; the first is a new stream's first.
    """
    m = talker.manifest
    hops = -(-frames // m.hop)
    chunk = m.sample_rate // m.fps
    pcm = speech((max(hops, WARM_UP_HOPS) * m.hop + 1) / m.fps + talker.delay_s)
    took: list[float] = []
    with talker.open() as stream:
        for wanted in (WARM_UP_HOPS, hops):
            stream.reset()
            took.clear()
            for start in range(0, len(pcm), chunk):
                began = perf_counter()
                if list(stream.push(pcm[start : start + chunk])):
                    took.append(perf_counter() - began)
                if len(took) >= wanted:
                    break
    return np.array(took)


def overhead(talker: Talker, frames: int) -> Seconds:
    """Seconds of each hop that the runtime took beside its backend, as `hop_times` times them."""
    backend = _TimedBackend(talker.choice.backend)
    observed = replace(talker, choice=replace(talker.choice, backend=backend))
    whole = hop_times(observed, frames)
    (rows,) = backend.opened
    beside: Seconds = whole - np.array(rows.hops)
    return beside


class _TimedRows:
    """Rows that keep the seconds spent in their launches since the last reset, hop by hop."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._launched = 0.0
        self.hops: list[float] = []

    def reset(self, row: int) -> None:
        self._rows.reset(row)
        self.hops.clear()

    def launch(self, active: Mask) -> None:
        began = perf_counter()
        self._rows.launch(active)
        self._launched = perf_counter() - began

    def vertices(self) -> Float32:
        began = perf_counter()
        made = self._rows.vertices()
        self.hops.append(self._launched + perf_counter() - began)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)


class _TimedBackend:
    """A backend whose rows are timed."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.opened: list[_TimedRows] = []

    def rows(self, *given: Any) -> _TimedRows:
        self.opened.append(_TimedRows(self._backend.rows(*given)))
        return self.opened[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class GraphRun:
    """A graph in onnxruntime as the runtime's CPU backend runs it: bound to its memory, threads that do not spin."""

    def __init__(self, model: Path | bytes, inputs: Mapping[str, Array], threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        source = str(model) if isinstance(model, Path) else model
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._inputs = [
            (name, onnxruntime.OrtValue.ortvalue_from_numpy(value)) for name, value in inputs.items()
        ]
        for name, value in self._inputs:
            self._binding.bind_ortvalue_input(name, value)
        for output in self._session.get_outputs():
            self._binding.bind_output(output.name)

    def __call__(self) -> float:
        """Run once; returns the seconds it took."""
        began = perf_counter()
        self._session.run_with_iobinding(self._binding)
        return perf_counter() - began

    def outputs(self) -> list[Array]:
        """Outputs of the last run."""
        return [np.asarray(value) for value in self._binding.copy_outputs_to_cpu()]


def stage_runs(folder: Path, m: Manifest, threads: int) -> dict[str, GraphRun]:
    """The hop graph and the graphs of its stages, by name, with all windows full."""
    rng = np.random.default_rng(SEED)
    full = {"valid_frames": m.history, "valid_latents": m.decode_window, "position": 0, "active": True}
    runs: dict[str, GraphRun] = {}
    for name in (*PARTS, "hop"):
        inputs: dict[str, Array] = {}
        graph = m.graphs[name]
        for tensor in graph.inputs:
            shape = [int(n) for n in tensor.shape]
            if tensor.name in full:
                inputs[tensor.name] = np.full(shape, full[tensor.name], tensor.dtype)
            else:
                inputs[tensor.name] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        runs[name] = GraphRun(folder / graph.file, inputs, threads)
    return runs
