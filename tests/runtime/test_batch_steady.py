"""What a batch costs after a long time: memory that does not grow, neither by steps nor by voices."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from streamtalk import Talker
from streamtalk.batch import Batch
from tests.runtime.toy import Toy, speech

SLOTS = 3
WARM_STEPS, STEPS = 600, 1500  # Python's free lists fill up during the first
WARM_VISITS, VISITS = 150, 300
GROWTH_BYTES = 4096  # tracemalloc's own rounding and Python's small-object caches; 3 bytes a step show
VOICE_BYTES = 16384
"""Less than one voice holds (its latency histogram alone is 17 KiB). Caches of numpy and pybind fill up for a thousand
visits, by 7 KB over these; then nothing grows.
"""


@pytest.fixture(scope="module")
def many(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Talker:
    """The toy for three voices."""
    return Talker.load(toy.with_(batch=SLOTS).write(tmp_path_factory.mktemp("many")), threads=1)


def steps(batch: Batch, n: int) -> None:
    """That many steps of streams of which every third starves now and then."""
    pcm = speech(160)
    made = 0
    while made < n:
        for i, stream in enumerate(batch.streams):
            if i or made % 50 < 25:
                stream.push(pcm)
        while batch.step():
            made += 1


def test_the_steady_loop_allocates_nothing_that_stays(many: Talker) -> None:
    with many.batch() as batch:
        for i in range(SLOTS):
            batch.open(i, seed=i)
        steps(batch, WARM_STEPS)
        gc.collect()
        tracemalloc.start()
        try:
            steps(batch, WARM_STEPS)
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            steps(batch, STEPS)
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < GROWTH_BYTES
    assert peak - before < 256 * 1024  # the largest passing array, not a pile of them


def test_voices_that_come_and_go_leave_nothing(many: Talker) -> None:
    def visit(batch: Batch, n: int) -> None:
        for i in range(n):
            with batch.open(seed=i) as stream:
                stream.push(speech(3000))
                while batch.step():
                    pass

    with many.batch() as batch:
        tracemalloc.start()
        try:
            visit(batch, WARM_VISITS)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            visit(batch, VISITS)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < VOICE_BYTES
