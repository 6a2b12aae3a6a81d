"""Metrics on arrays whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from streamtalk_training import metrics
from streamtalk_training.visemes import Phone

FPS = 30.0
PAIRS = np.array([[0, 1], [2, 3]])


def face(gap: np.ndarray) -> np.ndarray:
    """Vertices [L, 5, 3] whose two lip pairs stand `gap` [L] apart; vertex 4 stays."""
    vertices = np.zeros((len(gap), 5, 3), np.float32)
    vertices[:, [0, 2], 1] = gap[:, None]
    return vertices


def test_lve_is_the_worst_lip_vertex_squared() -> None:
    true = np.zeros((2, 5, 3), np.float32)
    predicted = true.copy()
    predicted[0, 1, 0] = 0.003
    predicted[0, 2, 1] = 0.004
    predicted[1, 4, 2] = 1.0  # no lip vertex
    assert metrics.lip_vertex_error(predicted, true, np.arange(4)) == pytest.approx(0.004**2 / 2)


def test_fdd_counts_what_the_prediction_lacks() -> None:
    template = np.zeros((5, 3), np.float32)
    true = np.zeros((4, 5, 3), np.float32)
    true[::2, 4, 0] = 2.0  # squared displacement 4, 0, 4, 0: deviation 2
    still = np.zeros_like(true)
    assert metrics.face_dynamics_deviation(still, true, template, np.array([4])) == pytest.approx(2.0)
    assert metrics.face_dynamics_deviation(true, still, template, np.array([4])) == pytest.approx(-2.0)


def test_mod_is_the_mean_difference_of_the_gaps() -> None:
    gap = np.array([0.0, 0.01])
    assert metrics.mouth_opening_difference(face(gap), face(gap + 0.002), PAIRS) == pytest.approx(0.002)


def test_closures_and_false_closures() -> None:
    gap = np.full(60, 0.02)
    gap[15:18] = 0.001  # 0.5 s to 0.6 s
    gap[30] = 0.001  # 1.0 s
    closed = metrics.closed_frames(metrics.lip_gaps(face(gap), PAIRS))
    assert closed.nonzero()[0].tolist() == [15, 16, 17, 30]
    bilabials = [Phone(0.48, 0.49, "p", "PBM"), Phone(0.2, 0.3, "b", "PBM")]
    # The first has no frame of its own; frame 15 lies within 40 ms of it.
    assert metrics.closure_recall(closed, bilabials, FPS) == metrics.Share(1, 2)
    vowel = [Phone(0.99, 1.31, "a", "AA"), Phone(0.5, 0.6, "m", "PBM")]
    assert metrics.false_closures(closed, vowel, FPS) == metrics.Share(1, 10)  # frames 30 to 39


def test_shares_pool_and_survive_nothing() -> None:
    assert metrics.pooled([metrics.Share(1, 2), metrics.Share(2, 2)]) == metrics.Share(3, 4)
    assert np.isnan(metrics.pooled([]).value)


def test_roll_rate_needs_half_of_the_usual_roll() -> None:
    roll = np.zeros(60, np.float32)
    roll[10:14] = 1.0
    roll[40] = 0.4
    phones = [Phone(0.36, 0.42, "f", "FV"), Phone(1.32, 1.35, "v", "FV")]
    assert metrics.roll_rate(roll, phones, FPS) == metrics.Share(1, 2)


@pytest.mark.parametrize("lag", [-4, 0, 3])
def test_lag_is_how_late_the_prediction_comes(lag: int) -> None:
    true = np.random.default_rng(0).normal(size=400).astype(np.float32)
    assert metrics.lag_frames(np.roll(true, lag), true) == lag


def test_correlation() -> None:
    track = np.sin(np.arange(50) / 5).astype(np.float32)
    assert metrics.correlation(3 * track + 1, track) == pytest.approx(1.0)
    assert np.isnan(metrics.correlation(np.ones(50, np.float32), track))


def test_quiet_is_far_from_any_speech() -> None:
    phones = [Phone(0, 1, "_", "SIL"), Phone(1, 1.5, "a", "AA"), Phone(1.5, 3, "_", "SIL")]
    quiet = metrics.quiet_frames(90, phones, FPS)
    assert quiet.nonzero()[0].tolist() == [*range(21), *range(55, 90)]  # .3 s before 1 s, and after 1.5 s


def test_only_long_vowels_are_sustained() -> None:
    phones = [Phone(0, 0.1, "a", "AA"), Phone(0.5, 0.7, "a", "AA"), Phone(1, 2, "m", "PBM")]
    assert metrics.sustained_frames(60, phones, FPS).nonzero()[0].tolist() == list(range(15, 22))


@pytest.mark.parametrize(("hertz", "share"), [(2.0, 0.0), (12.0, 1.0)])
def test_tremble_is_what_is_fast(hertz: float, share: float) -> None:
    wave = np.sin(2 * np.pi * hertz * np.arange(300) / FPS)
    frames = np.zeros(300, np.bool_)
    frames[100:200] = True
    lips = np.zeros((300, 2, 3), np.float32)
    lips[:, :, 1] = wave[:, None]
    energy = metrics.tremble(lips, frames, FPS)
    assert energy == pytest.approx(share * float(np.square(wave[frames]).sum()), abs=0.5)  # of 50
    assert metrics.tremble(lips, np.zeros(300, np.bool_), FPS) == 0
    assert metrics.tremble(lips[:20], frames[:20], FPS) == 0


def test_blinks_are_counted_where_they_begin() -> None:
    lids = np.zeros(30, np.float32)
    lids[[0, 10, 11, 12, 20]] = 0.9
    lids[25] = 0.4
    assert metrics.blinks(lids).tolist() == [0, 10, 20]
