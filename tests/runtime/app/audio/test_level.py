"""The level meter on signals whose level is known."""

from __future__ import annotations

import numpy as np
import pytest

from streamtalk.app.audio.level import QUIETEST_DBFS, LevelMeter


def test_a_sine_at_half_scale_is_9_db_down() -> None:
    meter = LevelMeter(16000)
    sine = 0.5 * np.sin(np.arange(32000) * 0.3).astype(np.float32)
    for i in range(0, 32000, 160):
        meter.add(sine[i : i + 160])
    assert meter.mean_dbfs == pytest.approx(-9.03, abs=0.05)
    assert meter.recent_dbfs == pytest.approx(-9.03, abs=0.1)
    assert not meter.clips
    for _ in range(300):
        meter.add(np.zeros(160, np.float32))
    assert meter.recent_dbfs < -50
    assert meter.mean_dbfs > -15


def test_silence_nothing_and_clipping() -> None:
    meter = LevelMeter(16000)
    assert meter.mean_dbfs == meter.recent_dbfs == QUIETEST_DBFS
    meter.add(np.zeros(0, np.float32))
    meter.add(np.zeros(990, np.float32))
    assert meter.mean_dbfs == QUIETEST_DBFS
    meter.add(np.array([1, -1] * 5, np.float32))
    assert meter.clipped_share == pytest.approx(0.01)
    assert meter.clips
