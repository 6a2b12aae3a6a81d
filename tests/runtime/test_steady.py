"""What a stream costs after a long time: memory that does not grow, time that does not either."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np

from streamtalk import Stream, Talker
from tests.runtime.toy import speech

WARM_FRAMES, FRAMES = 600, 10_000
GROWTH_BYTES = (
    4096  # tracemalloc's own rounding and Python's small-object caches; a leak of 1 byte a frame shows
)
CYCLES = 5  # objects that only the collector can free, of interpreter bookkeeping


def play(stream: Stream, n_frames: int, block: int = 160) -> None:
    """The loop and nothing else: `stats`, asked for every block, leaves a few kB behind that numpy keeps."""
    pcm = speech(block)
    made = 0
    while made < n_frames:
        for _ in stream.push(pcm):
            made += 1


def test_the_steady_loop_allocates_nothing_that_stays(talker: Talker) -> None:
    with talker.open() as stream:
        play(stream, WARM_FRAMES)
        gc.collect()
        tracemalloc.start()
        try:
            play(stream, WARM_FRAMES)
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            play(stream, FRAMES)
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < GROWTH_BYTES
    assert peak - before < 256 * 1024  # the largest passing array, not a pile of them


def test_the_loop_makes_no_garbage_for_the_collector(talker: Talker) -> None:
    with talker.open() as stream:
        play(stream, WARM_FRAMES)
        gc.collect()
        gc.disable()
        try:
            play(stream, WARM_FRAMES)
            assert gc.collect() <= CYCLES
        finally:
            gc.enable()


def test_ten_minutes_in_one_push_need_their_copy_and_no_more(talker: Talker) -> None:
    minutes = np.zeros(600 * 16000, np.float32)
    with talker.open() as stream:
        play(stream, WARM_FRAMES)
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
        assert stream.stats().frames > 18_000


def test_a_late_frame_costs_what_an_early_one_does(talker: Talker) -> None:
    with talker.open() as stream:
        play(stream, WARM_FRAMES, block=16000)
        early = stream.stats()
        play(stream, 5 * WARM_FRAMES, block=16000)
        late = stream.stats()
    # `late` includes the early frames: half again as slow in all means far slower at the end.
    assert late.latency_ms.p50 < 1.5 * early.latency_ms.p50
