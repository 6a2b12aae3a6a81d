"""What is timed on a GPU: single graphs, turns of a batch, whole streams, and what a profiler saw of a frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk import Talker
from streamtalk.backends import onnxruntime_cuda
from streamtalk.backends.slots import Slots
from streamtalk.backends.cuda.backend import CudaBackend
from streamtalk.backends.cuda.driver import Driver, Handle
from streamtalk.backends.cuda.engine import DeviceEngine, Plan, size_bytes
from streamtalk.backends.cuda.tensorrt import Library
from streamtalk.backends.engine_file import find_engines
from streamtalk.errors import BackendError
from streamtalk.model import AUDIO_ENCODER, FRAME, Manifest, graph_key

Seconds = npt.NDArray[np.float64]
SEED = 0
IN_FLIGHT = 16
"""Runs that are queued at once where their mean time on the device is wanted."""


class StageRun:
    """One graph on the device with full windows, its inputs already there: launched, and waited for asleep."""

    def __init__(self, driver: Driver, engine: DeviceEngine, manifest: Manifest) -> None:
        self._driver = driver
        tensors = (*engine.graph.inputs, *engine.graph.outputs)
        plan = Plan.of({tensor.name: size_bytes(tensor) for tensor in tensors})
        rng = np.random.default_rng(SEED)
        full = {"valid_frames": manifest.history, "valid_latents": manifest.decode_window, "position": 0}
        self._graph: Handle = None
        # What was taken goes back, last first, also where the rest cannot be had.
        with driver.current(), ExitStack() as taken:
            memory = driver.device_memory(plan.total)
            taken.callback(driver.release, [memory])
            self._stream, self._done = driver.stream(), driver.event()
            taken.callback(driver.discard, [self._stream, self._done])
            addresses = {name: memory + offset for name, offset in plan.offsets.items()}
            for tensor in engine.graph.inputs:
                shape = [int(n) for n in tensor.shape]
                if tensor.dtype == "float32":
                    values = 0.1 * rng.standard_normal(shape, np.float32)
                else:
                    values = np.full(shape, full.get(tensor.name, True), tensor.dtype)
                driver.upload(addresses[tensor.name], values.reshape(-1).view(np.uint8), self._stream)
                driver.drain(self._stream)
            self._run = engine.bind(addresses, self._stream)
            taken.callback(self._run.close)
            if engine.capturable:
                with suppress(BackendError):  # still right, launch by launch
                    self._graph = driver.capture(self._stream, lambda: self._run.enqueue(self._stream))
                    taken.callback(driver.discard, [self._graph])
            self._taken = taken.pop_all()

    def __call__(self, times: int = 1) -> float:
        """Seconds of one run, of `times` that are queued together."""
        driver = self._driver
        with driver.current():
            began = perf_counter()
            for _ in range(times):
                if self._graph is None:
                    self._run.enqueue(self._stream)
                else:
                    driver.launch(self._graph, self._stream)
            driver.record(self._done, self._stream)
            driver.synchronize(self._done)
            return (perf_counter() - began) / times

    def close(self) -> None:
        """Give everything back."""
        with self._driver.current():
            self._taken.close()


def stage_engine(folder: Path, backend: CudaBackend, name: str) -> DeviceEngine:
    """The graph `name` on the library of `backend`; what that does not run itself comes from the graphs for TensorRT.
    Raises BackendError and ModelError where the export has none.
    """
    manifest, driver = backend.manifest, backend.driver
    if backend.name == onnxruntime_cuda.NAME:
        own = {AUDIO_ENCODER: backend.encoder, FRAME: backend.frame}
        if name in own:
            return own[name]
        session = backend.frame
        assert isinstance(session, onnxruntime_cuda.CudaSession)
        graph = manifest.graphs[graph_key(name, backend.precision)]
        return onnxruntime_cuda.CudaSession(session.runtime, folder, graph, driver)
    library = Library(backend.name)
    there = library.version, driver.compute_capability
    fits = find_engines(folder, manifest, (name,), backend.name, *there, backend.precision)
    return library.load(fits[name], driver)


@contextmanager
def opened(talker: Talker) -> Iterator[Slots]:
    """All slots of a talker's backend with a voice in each, and features to read."""
    backend: Any = talker.choice.backend
    identity = talker.identity
    slots = backend.slots(identity.start_latent)
    try:
        for slot in range(talker.manifest.batch):
            slots.start(slot, identity.styles[0], identity.templates[0])
        slots.pcm[:] = 0.1 * np.random.default_rng(SEED).standard_normal(slots.pcm.shape, np.float32)
        yield slots
    finally:
        slots.close()


def turns(
    slots: Slots, manifest: Manifest, count: int, wait: Callable[[], Any] | None = None
) -> Iterator[float]:
    """Seconds of `count` turns of all slots, from the noise in host memory to the vertices there; a hop's encoder is
    started in between and not timed. `wait` stands in for waiting for the vertices.
    """
    every = np.ones(manifest.batch, np.bool_)
    frames = np.zeros(manifest.batch, np.int64)
    slots.noise[:] = np.random.default_rng(SEED).standard_normal(slots.noise.shape, np.float32)
    wait = wait or slots.vertices
    for turn in range(count):
        if turn % manifest.hop == 0:
            slots.encode(every)
            slots.frame(turn, frames, every)  # the encoder is waited for by a turn that is run again
            wait()
        began = perf_counter()
        slots.frame(turn, frames, every)
        wait()
        yield perf_counter() - began
        frames += 1


def hops(slots: Slots, manifest: Manifest, count: int) -> Iterator[float]:
    """Seconds from a hop's audio in host memory to its first vertices there, `count` times: what a live stream
    waits for most.
    """
    every = np.ones(manifest.batch, np.bool_)
    frames = np.zeros(manifest.batch, np.int64)
    for turn in range(0, count * manifest.hop, manifest.hop):
        frames[:] = turn
        began = perf_counter()
        slots.encode(every)
        slots.frame(turn, frames, every)
        slots.vertices()
        yield perf_counter() - began
        for later in range(turn + 1, turn + manifest.hop):
            frames[:] = later
            slots.frame(later, frames, every)
            slots.vertices()


def steps(talker: Talker, pcm: npt.NDArray[np.float32], staggered: bool) -> Iterator[float]:
    """Seconds of every frame's time of a full batch: audio pushed to each voice, and one step. All voices hear `pcm`:
    at once, or `staggered` by frames, so that in every step some begin a hop. Yields once all have frames.
    """
    hop, chunk = talker.manifest.hop, talker.sample_rate // talker.fps
    with talker.batch() as batch:
        streams = [batch.open(seed=seed) for seed in range(batch.size)]
        for place, stream in enumerate(streams):
            stream.push(pcm[: place % hop * chunk if staggered else 0])
        for start in range(0, len(pcm), chunk):
            began = perf_counter()
            for stream in streams:
                stream.push(pcm[start : start + chunk])
            made = batch.step()
            took = perf_counter() - began
            if len(made) == batch.size:
                yield took


def profiled(run: Callable[[], Any]) -> dict[str, int]:
    """CUDA calls that `run` made and work that the device did for it, by name and number, as CUPTI tells torch; nothing
    where that has no CUDA.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profile.events():
        on_device = event.device_type.name == "CUDA"
        name = event.name.split("<")[0].split("(")[0]
        if on_device:
            found["on the device: " + (name if name.startswith(("Memcpy", "Memset")) else "kernels")] += 1
        elif name.startswith("cu"):
            found[name] += 1
    return dict(sorted(found.items()))
