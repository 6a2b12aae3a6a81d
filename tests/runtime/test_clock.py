"""Integer audio time against exact fractions and plain search."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest

from streamtalk.clock import Clock

FPS = (24, 25, 29, 30, 60)


def clock(fps: int, hop: int = 1, window: int = 2400, context: int = 960) -> Clock:
    return Clock(16000, fps, hop, window, context)


@pytest.mark.parametrize("fps", FPS)
def test_a_frame_belongs_to_the_nearest_sample_halves_up(fps: int) -> None:
    for frame in [*range(500), 10**9, 10**12 + 1]:
        assert clock(fps).sample_of(frame) == floor(Fraction(frame * 16000, fps) + Fraction(1, 2))


def test_halves_go_up() -> None:
    assert Clock(3, 2, 1, 1, 0).sample_of(1) == 2  # 1.5


@pytest.mark.parametrize("fps", FPS)
@pytest.mark.parametrize(
    ("hop", "window", "context"), [(1, 2400, 960), (3, 4000, 320), (4, 1000, 960), (1, 400, 0)]
)
def test_frames_ready_is_what_a_search_finds(fps: int, hop: int, window: int, context: int) -> None:
    subject = clock(fps, hop, window, context)

    def search(n: int) -> int:
        frames = 0
        while (frames + 1) * 16000 <= n * fps and subject.window_start(frames - frames % hop) + window <= n:
            frames += 1
        return frames

    for n in [*range(0, 12000, 37), *range(3000, 3300)]:
        assert subject.frames_ready(n) == search(n), n


def test_frames_ready_where_frames_fall_between_two_samples() -> None:
    subject = Clock(rate=3, fps=2, hop=1, window_samples=4, context_samples=1)
    # Frames belong to samples 0, 2 (1.5 rounded), 3, 5 and wait for the three from there.
    assert [subject.frames_ready(n) for n in range(9)] == [0, 0, 0, 1, 1, 2, 3, 3, 4]


def test_delay_is_the_window_beyond_the_frame() -> None:
    assert clock(30).delay_s == (2400 - 960) / 16000
