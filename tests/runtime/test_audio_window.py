"""Integer audio time against exact fractions and plain search; the buffer of samples against a list."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from functools import partial
from math import ceil, floor

import numpy as np
import pytest

from streamtalk.audio_window import Clock, Timeline
from tests.runtime.drive import CtrlC
from tests.runtime.toy import speech

FPS = (24, 25, 29, 30, 60)
SIZES = ((1, 960, 1440), (3, 320, 2613), (4, 960, 0), (4, 640, -1240), (6, 0, -1967))
"""Hop, context and lookahead; less than none leaves gaps between windows."""


@pytest.mark.parametrize("fps", FPS)
def test_a_frame_belongs_to_the_nearest_sample_halves_up(fps: int) -> None:
    clock = Clock(16000, fps, 1, 960, 1440)
    for frame in [*range(500), 10**9, 10**12 + 1]:
        assert clock.sample_of(frame) == floor(Fraction(frame * 16000, fps) + Fraction(1, 2))
        assert clock.window_start(frame) == clock.sample_of(frame) - 960
    assert Clock(3, 2, 1, 0, 1).sample_of(1) == 2  # 1.5


@pytest.mark.parametrize("fps", FPS)
@pytest.mark.parametrize(("hop", "context", "lookahead"), SIZES)
def test_frames_are_ready_by_whole_hops_with_a_full_window(
    fps: int, hop: int, context: int, lookahead: int
) -> None:
    clock = Clock(16000, fps, hop, context, lookahead)
    window = context + ceil(Fraction((hop - 1) * 16000, fps)) + lookahead
    assert clock.window_samples == window

    def search(n: int) -> int:
        frames = 0
        while (frames + hop) * 16000 <= n * fps and clock.window_start(frames) + window <= n:
            frames += hop
        return frames

    for n in [*range(0, 12000, 37), *range(3000, 3300)]:
        assert clock.frames_ready(n) == search(n), n
        assert clock.frames_in(n) == floor(Fraction(n * fps, 16000))
    first = next(n for n in range(20000) if clock.frames_ready(n))
    assert clock.delay_samples == first == max(window - context, ceil(Fraction(hop * 16000, fps)))
    assert clock.delay_s == first / 16000


def test_frames_between_two_samples() -> None:
    clock = Clock(rate=3, fps=2, hop=1, context_samples=1, lookahead_samples=3)
    # Frames belong to samples 0, 2 (1.5 rounded), 3, 5 and wait for the three from there.
    assert [clock.frames_ready(n) for n in range(9)] == [0, 0, 0, 1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_a_timeline_holds_what_a_list_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    timeline = Timeline(100, start=-7)
    everything: list[float] = []
    for _ in range(400):
        samples = speech(int(rng.choice([0, 1, 3, 40, 250])), int(rng.integers(1 << 30)))
        timeline.append(samples)
        everything += samples.tolist()
        assert timeline.end == len(everything) - 7
        timeline.drop_before(int(rng.integers(timeline.start - 5, timeline.end + 5)))
        n = int(rng.integers(0, timeline.end - timeline.start + 1))
        expected = np.array(everything[timeline.start + 7 :][:n], np.float32)
        np.testing.assert_array_equal(timeline.window(timeline.start, n), expected)


def test_ctrl_c_leaves_no_half_of_a_push() -> None:
    rng, timeline = np.random.default_rng(0), Timeline(100)
    append, drop = CtrlC(), CtrlC()
    everything = speech(40_000)
    while timeline.end < 30_000:
        done, n = timeline.end, int(rng.choice([1, 40, 250]))
        with suppress(KeyboardInterrupt):
            append(partial(timeline.append, everything[done : done + n]))
        assert timeline.end in (done, done + n)
        with suppress(KeyboardInterrupt):
            drop(partial(timeline.drop_before, int(rng.integers(timeline.start, timeline.end + 1))))
        kept = timeline.window(timeline.start, timeline.end - timeline.start)
        np.testing.assert_array_equal(kept, everything[timeline.start : timeline.end])
    assert min(append.sweeps, drop.sweeps) > 50


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
