"""Runs that are timed on a GPU: launches of full rows, steps of a batch, and what a profiler saw of a launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from streamtalk import Talker
from streamtalk.rows import Mask, Rows

SEED = 0
IN_FLIGHT = 16
"""Launches that are queued at once where their mean time on the device is wanted."""


@contextmanager
def opened(talker: Talker, count: int) -> Iterator[tuple[Rows, Mask]]:
    """Rows of a talker's backend with a stream in each and audio to encode, and the mask of all of them."""
    identity = talker.identity
    rows = talker.choice.backend.rows(count, identity.start_latent)
    try:
        for row in range(count):
            rows.start(row, identity.styles[0], identity.templates[0])
        rng = np.random.default_rng(SEED)
        rows.inputs["pcm"][:] = 0.1 * rng.standard_normal(rows.inputs["pcm"].shape, np.float32)
        rows.inputs["noise"][:] = rng.standard_normal(rows.inputs["noise"].shape, np.float32)
        yield rows, np.ones(count, np.bool_)
    finally:
        rows.close()


def hops(rows: Rows, every: Mask, count: int, wait: Callable[[], Any] | None = None) -> Iterator[float]:
    """Seconds of `count` hops of all rows, from audio and noise in host memory to the vertices there. `wait` stands in
    for waiting for the vertices.
    """
    wait = wait or rows.vertices
    for _ in range(count):
        began = perf_counter()
        rows.launch(every)
        wait()
        yield perf_counter() - began
        rows.advance(every)


def queued(rows: Rows, every: Mask, count: int) -> Iterator[float]:
    """Mean seconds of hops that are queued together, `count` times."""
    for _ in range(count):
        began = perf_counter()
        for _ in range(IN_FLIGHT):
            rows.launch(every)
            rows.advance(every)
        rows.vertices()
        yield (perf_counter() - began) / IN_FLIGHT


def steps(talker: Talker, streams: int, pcm: npt.NDArray[np.float32]) -> Iterator[float]:
    """Seconds of every tick of a full batch that launches a group: audio pushed to each stream, and its steps. All
    streams have the audio `pcm` and begin on one tick; groups take turns where there are several.
    """
    chunk = talker.sample_rate // talker.fps
    with talker.batch(streams) as batch:
        opened = [batch.open(seed=seed) for seed in range(streams)]
        for tick, start in enumerate(range(0, len(pcm), chunk)):
            began = perf_counter()
            for stream in opened:
                stream.push(pcm[start : start + chunk])
            made = False
            while batch.step(tick):
                made = True
            took = perf_counter() - began
            if made:
                yield took


def profiled(run: Callable[[], Any]) -> dict[str, int]:
    """CUDA calls that `run` made and work that the device did for it, by name and number, as CUPTI reports to torch;
    nothing where that has no CUDA.
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
