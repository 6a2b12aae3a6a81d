"""Noise: a function of seed and frame, normal, and the same in every version."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from streamtalk import UsageError
from streamtalk.noise import GivenNoise, SeededNoise
from tests.runtime.drive import CtrlC

SAMPLING_TOLERANCE = 0.02  # 4 sigma of the mean of 40 000 normal values
ULP = 1e-6  # libm may round the last bit of a float64 differently


def row(seed: int, frame: int, width: int = 8) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    out = np.empty(width, np.float32)
    SeededNoise(seed, width)(frame, out)
    return out


def test_any_frame_in_any_order() -> None:
    noise, a, b = SeededNoise(7, 8), np.empty(8, np.float32), np.empty(8, np.float32)
    for frame in (5, 0, 10**12, 5, 1):
        noise(frame, a)
        np.testing.assert_array_equal(a, row(7, frame))
    noise(2, b)
    assert not np.array_equal(a, b)
    assert not np.array_equal(row(7, 3), row(8, 3))


def test_the_rows_never_change() -> None:
    # Recorded from this implementation: a saved seed must give the same face in ten years.
    expected = [-0.4147822, -2.0394955, -0.338247, 0.6766941, 0.124134]
    np.testing.assert_allclose(row(7, 3, 5), expected, atol=ULP)


def test_ctrl_c_within_a_draw_spoils_no_row() -> None:
    noise, out, ctrl_c = SeededNoise(7, 8), np.empty(8, np.float32), CtrlC()
    while ctrl_c.sweeps < 6:
        with suppress(KeyboardInterrupt):
            ctrl_c(partial(noise, 12, out))
            np.testing.assert_array_equal(out, row(7, 12))
        noise(0, out)  # of the block that the draw replaces
        np.testing.assert_array_equal(out, row(7, 0))
    assert ctrl_c.ended > 50


def test_it_is_standard_normal_and_uncorrelated() -> None:
    rows = np.stack([row(1, frame, 401) for frame in range(100)])
    assert abs(rows.mean()) < SAMPLING_TOLERANCE
    assert abs(rows.std() - 1) < SAMPLING_TOLERANCE
    assert abs((rows**4).mean() - 3) < 10 * SAMPLING_TOLERANCE
    assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < SAMPLING_TOLERANCE
    assert (
        abs((rows[:, :200] * rows[:, 201:]).mean()) < SAMPLING_TOLERANCE
    )  # the two halves of Box and Muller


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", True])
def test_a_seed_is_an_integer_of_64_bits(seed: object) -> None:
    with pytest.raises(UsageError, match="seed"):
        SeededNoise(seed, 4)  # type: ignore[arg-type]


def test_given_noise_is_checked() -> None:
    out = np.empty(2, np.float32)
    with pytest.raises(UsageError, match=r"\[frames, 2\]"):
        GivenNoise(np.zeros((3, 4)), 2)
    given = GivenNoise(np.ones((3, 2)), 2)
    given(2, out)
    with pytest.raises(UsageError, match="3 rows"):
        given(3, out)
    with pytest.raises(UsageError, match="finite"):
        GivenNoise(lambda _: np.array([0.0, np.nan]), 2)(0, out)


def test_streams_do_not_all_draw_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose seeds follow each other: each time a few streams draw their next rows, and never all of them."""
    drawn: list[int] = []
    plain = SeededNoise._draw

    def counted(noise: SeededNoise, first: int) -> None:
        drawn[-1] += 1
        plain(noise, first)

    monkeypatch.setattr(SeededNoise, "_draw", counted)
    streams, out = [SeededNoise(seed, 4) for seed in range(16)], np.empty(4, np.float32)
    for frame in range(24):
        drawn.append(0)
        for stream in streams:
            stream(frame, out)
    assert drawn == [16] + 23 * [2]
