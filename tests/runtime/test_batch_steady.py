"""What a batch costs after a long time: memory that does not grow, neither by steps nor by voices."""

from __future__ import annotations

import gc
import sys
import tracemalloc

import pytest

from streamtalk import Talker
from streamtalk.batch import Batch
from tests.runtime.toy import Toy, speech

SLOTS = 3
WARM_STEPS, STEPS = 600, 1500  # Python's free lists fill up during the first
WARM_VISITS, VISITS = 150, 500
GROWTH_BYTES = 4096  # tracemalloc's own rounding and Python's small-object caches; 3 bytes a step show
VISIT_OBJECTS = 300
"""What may be left: less than one object of every voice. Python's and pybind's own caches fill up for some hundred
visits, by 20 to 140 over these. Bytes tell less: tracemalloc goes on counting what libraries free behind its back,
until the address is used again.
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
        visit(batch, WARM_VISITS)
        gc.collect()
        before = sys.getallocatedblocks()
        visit(batch, VISITS)
        gc.collect()
        after = sys.getallocatedblocks()
    assert after - before < VISIT_OBJECTS
