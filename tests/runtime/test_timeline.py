"""The audio buffer against a plain list, and its size."""

from __future__ import annotations

import numpy as np
import pytest

from streamtalk.timeline import Timeline
from tests.runtime.toy import speech


@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_a_list_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    timeline = Timeline(100, start=-7)
    everything: list[float] = []
    for _ in range(400):
        samples = speech(int(rng.choice([0, 1, 3, 40, 250])), int(rng.integers(1 << 30)))
        timeline.append(samples)
        timeline.append_silence(2)
        everything += [*samples.tolist(), 0.0, 0.0]
        assert timeline.end == len(everything) - 7
        timeline.drop_before(int(rng.integers(timeline.start, timeline.end + 1)))
        n = int(rng.integers(0, timeline.end - timeline.start + 1))
        expected = np.array(everything[timeline.start + 7 :][:n], np.float32)
        np.testing.assert_array_equal(timeline.window(timeline.start, n), expected)


def test_a_long_push_is_held_and_then_let_go() -> None:
    timeline = Timeline(1000)
    before = timeline.nbytes
    timeline.append(speech(100_000))
    assert timeline.nbytes >= 400_000
    timeline.drop_before(99_900)
    assert timeline.nbytes == before
    np.testing.assert_array_equal(timeline.window(99_900, 100), speech(100_000)[99_900:])


def test_small_pushes_never_grow_it() -> None:
    timeline = Timeline(1000)
    for i in range(10_000):
        timeline.append(speech(33, i))
        timeline.drop_before(timeline.end - 500)
    assert timeline.nbytes == 4000


def test_a_copy_is_independent() -> None:
    timeline = Timeline(100)
    timeline.append(speech(50))
    twin = timeline.copy()
    timeline.drop_before(50)
    timeline.append(speech(90, 1))
    np.testing.assert_array_equal(twin.window(0, 50), speech(50))
