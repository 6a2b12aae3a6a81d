"""What is timed of ours: whole frames of a stream, the runtime's own part of them, and single graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from benchmarks.latency_rows import STAGES
from benchmarks.latency_subject import SEED, speech
from streamtalk import Talker
from streamtalk.backends import Lane
from streamtalk.model import Manifest, Precision, graph_key

WARM_UP_FRAMES = 8
Seconds = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


def frame_times(talker: Talker, frames: int) -> Seconds:
    """Seconds of each of `frames` frames after warm-up, whole, in a stream of the runtime; the first is a new stream's
    first. A frame counts from the push of its last audio; the encoder's run is in the first of its hop.
    """
    chunk = talker.sample_rate // talker.fps
    pcm = speech((frames + WARM_UP_FRAMES) / talker.fps + 2)
    took: list[float] = []
    with talker.open() as stream:
        for wanted in (WARM_UP_FRAMES, frames):
            stream.reset()
            took.clear()
            for start in range(0, len(pcm), chunk):
                since = perf_counter()
                for _ in stream.push(pcm[start : start + chunk]):
                    now = perf_counter()
                    took.append(now - since)
                    since = now
                if len(took) >= wanted:
                    break
    return np.array(took[:frames])


def streamed(talker: Talker, frames: int) -> Seconds:
    """`frame_times` with the encoder's run spread over its hop."""
    return amortised(frame_times(talker, frames), talker.manifest.hop)


def amortised(seconds: Seconds, hop: int) -> Seconds:
    """The encoder's run, which falls on a hop's first frame, spread over the hop: each frame its hop's mean."""
    if hop == 1:
        return seconds
    whole = len(seconds) // hop * hop
    means = seconds[:whole].reshape(-1, hop).mean(1)
    return np.repeat(means, hop) if whole else seconds


def overhead(talker: Talker, frames: int) -> Seconds:
    """Seconds of each of `frames` frames that the runtime took beside its backend, as `streamed` times them."""
    backend = _TimedBackend(talker.choice.backend)
    observed = replace(talker, choice=replace(talker.choice, backend=backend))
    whole = streamed(observed, frames)
    (lane,) = backend.lanes
    # A hop's frames come together, so that there may be more of them than were asked for.
    return whole - amortised(np.array(lane.frames[:frames]), talker.manifest.hop)


class _TimedLane:
    """A lane that keeps the seconds spent in it since its last reset, frame by frame."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._since = 0.0
        self.frames: list[float] = []

    def reset(self) -> None:
        self._lane.reset()
        self.frames.clear()
        self._since = 0.0

    def encode(self) -> None:
        began = perf_counter()
        self._lane.encode()
        self._since += perf_counter() - began

    def frame(self, index: int) -> None:
        began = perf_counter()
        self._lane.frame(index)
        self._since += perf_counter() - began

    def vertices(self) -> npt.NDArray[np.float32]:
        began = perf_counter()
        made = self._lane.vertices()
        self.frames.append(self._since + perf_counter() - began)
        self._since = 0.0
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lane, name)


class _TimedBackend:
    """A backend whose lanes are timed."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.lanes: list[_TimedLane] = []

    def lane(self, *given: Any) -> _TimedLane:
        self.lanes.append(_TimedLane(self._backend.lane(*given)))
        return self.lanes[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class GraphRun:
    """One graph in onnxruntime as the runtime's CPU backend has it: bound to its memory, threads that do not spin."""

    def __init__(self, path: Path, inputs: Mapping[str, Array], threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
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
        """What the last run gave."""
        return [np.asarray(value) for value in self._binding.copy_outputs_to_cpu()]


def stage_runs(
    folder: Path,
    m: Manifest,
    threads: int,
    precision: Precision = "fp32",
    names: Sequence[str] = STAGES[:-1],
) -> dict[str, GraphRun]:
    """Streaming graphs of an engine at a precision, by name, with all windows full."""
    rng = np.random.default_rng(SEED)
    full = {"valid_frames": m.history, "valid_latents": m.decode_window, "position": 0, "active": True}
    runs: dict[str, GraphRun] = {}
    for name in names:
        inputs: dict[str, Array] = {}
        graph = m.graphs[graph_key(name, precision)]
        for tensor in graph.inputs:
            shape = [int(n) for n in tensor.shape]
            if tensor.name in full:
                inputs[tensor.name] = np.full(shape, full[tensor.name], tensor.dtype)
            else:
                inputs[tensor.name] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        runs[name] = GraphRun(folder / graph.file, inputs, threads)
    return runs
