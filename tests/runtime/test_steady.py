"""What streams cost after a long time: memory that does not grow, time that does not either."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamtalk import Stream, Talker
from streamtalk.batch import Batch
from tests.runtime.drive import kept
from tests.runtime.toy import Toy, speech

ROWS, SIZE = 3, 7
WARM, LONG = (
    600,
    10_000,
)  # frames of a stream, launches of a batch; Python's free lists fill up during the first
WARM_VISITS, VISITS = 150, 500
GROWTH_BYTES = 4096
"""Tracemalloc's own rounding and Python's small-object caches; a leak of 1 byte a frame shows."""
PEAK_BYTES = 256 * 1024  # the largest passing array, not a pile of them
CYCLES = 5  # objects that only the collector can free, of interpreter bookkeeping
VISIT_OBJECTS = 300
"""What may be left: less than one object of every stream. Python's and pybind's own caches fill up for some hundred
visits, by 20 to 140 over these. Bytes tell less: tracemalloc goes on counting what libraries free behind its back,
until the address is used again.
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    toy = Toy(hop=4, window_samples=4000, rows=(ROWS,))
    return Talker.load(toy.write(tmp_path_factory.mktemp("many")), threads=1)


def play(stream: Stream, n_frames: int, block: int = 160) -> None:
    """The loop and nothing else: `stats`, asked for every block, leaves a few kB behind that numpy keeps."""
    pcm = speech(block)
    made = 0
    while made < n_frames:
        for _ in stream.push(pcm):
            made += 1


def steps(batch: Batch, n: int, ticks: bool) -> None:
    """That many launches of streams of which every third pauses now and then, and then moves to another group."""
    pcm, streams = speech(534), batch.streams
    made = tick = 0
    while made < n:
        tick += 1
        for i, stream in enumerate(streams):
            if i % 3 or (tick + 5 * i) % 50 < 25:
                stream.push(pcm)
        while batch.step(tick if ticks else None):
            made += 1


def require_steady(loop: Callable[[int], None], n: int) -> None:
    """Run the loop for so many frames or launches and measure what it leaves."""
    loop(WARM)
    gc.collect()
    tracemalloc.start()
    try:
        loop(WARM)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        loop(n)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < GROWTH_BYTES
    assert peak - before < PEAK_BYTES


def test_a_stream_allocates_nothing_that_stays(talker: Talker) -> None:
    with talker.open() as stream:
        require_steady(lambda n: play(stream, n), LONG)


@pytest.mark.parametrize("ticks", [False, True])
def test_a_batch_allocates_nothing_that_stays(many: Talker, ticks: bool) -> None:
    with many.batch(SIZE) as batch:
        for i in range(SIZE):
            batch.open(i % 3, seed=i)
        require_steady(lambda n: steps(batch, n, ticks), LONG // 10)


def test_the_loop_makes_no_garbage_for_the_collector(talker: Talker) -> None:
    with talker.open() as stream:
        play(stream, WARM)
        gc.collect()
        gc.disable()
        try:
            play(stream, WARM)
            assert gc.collect() <= CYCLES
        finally:
            gc.enable()


def test_streams_that_come_and_go_leave_nothing(many: Talker) -> None:
    def visit(batch: Batch, n: int) -> None:
        for i in range(n):
            with batch.open(seed=i) as stream:
                stream.push(speech(5000))
                while batch.step():
                    pass

    with many.batch(SIZE) as batch:
        visit(batch, WARM_VISITS)
        gc.collect()
        before = sys.getallocatedblocks()
        visit(batch, VISITS)
        gc.collect()
        after = sys.getallocatedblocks()
    assert after - before < VISIT_OBJECTS


def test_minutes_in_one_push_need_their_copy_and_no_more(talker: Talker) -> None:
    minutes = np.zeros(200 * 16000, np.float32)
    with talker.open() as stream:
        play(stream, WARM)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            frames = stream.push(minutes)
            _, peak = tracemalloc.get_traced_memory()
            # The copy, and passing arrays of the check that every sample is sound.
            assert peak - before < 2.5 * minutes.nbytes
            for _ in frames:
                pass
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 100_000
        assert stream.stats().frames > 5_900


def test_a_late_hop_costs_what_an_early_one_does(talker: Talker) -> None:
    with talker.open() as stream:
        play(stream, WARM, block=16000)
        early = stream.stats()
        play(stream, 5 * WARM, block=16000)
        late = stream.stats()
    # `late` includes the early hops: half again as slow in all means far slower at the end.
    assert late.latency_ms.p50 < 1.5 * early.latency_ms.p50


def test_the_frames_of_years_are_those_of_seconds(talker: Talker, toy: Toy) -> None:
    """The same state at another time, where frame and sample fall together as they did and noise is the same."""
    frame, later = 420, 420 * 10**9
    assert frame % toy.period == 0
    with talker.open(noise=lambda _: np.zeros(3)) as stream:
        kept(stream.push(speech(16000 * 14 + 1000)))
        snapshot = stream.state()
        assert snapshot.frame == frame
        expected = kept(stream.push(speech(16000, 1)))
        stream.restore(
            replace(
                snapshot, frame=later, index=later, samples=snapshot.samples + (later - frame) * 16000 // 30
            )
        )
        frames = [(f.index, f.vertices.copy()) for f in stream.push(speech(16000, 1))]
    assert [index for index, _ in frames] == [*range(later, later + len(expected))]
    np.testing.assert_array_equal([vertices for _, vertices in frames], expected)


def test_a_model_loads_without_a_batch(tmp_path: Path) -> None:
    """Graphs of many rows are opened when a batch asks for them."""
    directory = Toy(rows=(ROWS,)).write(tmp_path)
    (directory / "hop_b3.onnx").unlink()
    with Talker.load(directory).open() as stream:
        assert kept(stream.push(speech(16000)))
